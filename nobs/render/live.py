"""A run as it stands on a screen of any size, and what a key does to it. Pure: the same scene, view and size, the same frame.

From the top: how the run stands, what the triggers saw, the layer to look at, the loss, and all layers over the last steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.text import Text

from ._glyphs import Glyphs
from ._heatmap import TITLES, heat_map, legend, room_for
from ._scene import SIDES, SORTS, Scene
from ._vitals import height_of_vitals, lines_for, vitals

TALL = 60
"""The height of a page that may be as long as it is."""

KEYS = (("q", "quit"), ("arrows", "scroll"), ("s", "sort"), ("o", "{}s"), ("space", "{}"))


@dataclass(frozen=True)
class View:
    """What somebody chose to see: one of SORTS, one of SIDES, the first layer shown, and whether the picture stands still.

    `top` is None until somebody scrolls: then what is shown goes with the layer that failed.
    """

    sort: str = "execution"
    side: str = SIDES[0]
    top: int | None = None
    paused: bool = False


LEAVE: Mapping[str, str] = {"q": "quit", "Q": "quit", "escape": "quit", "suspend": "suspend"}
"""The keys that end the picture, and how."""

_SCROLLS: Mapping[str, Callable[[int, int, int], int]] = {
    "up": lambda top, page, count: top - 1,
    "down": lambda top, page, count: top + 1,
    "page up": lambda top, page, count: top - page,
    "page down": lambda top, page, count: top + page,
    "home": lambda top, page, count: 0,
    "end": lambda top, page, count: count,
}
_ALSO = {"k": "up", "j": "down", "g": "home", "G": "end", "tab": "o"}
_CHOICES: Mapping[str, Callable[[View], View]] = {
    "s": lambda view: replace(view, sort=_next(tuple(SORTS), view.sort), top=None),
    "o": lambda view: replace(view, side=_next(SIDES, view.side)),
    "space": lambda view: replace(view, paused=not view.paused),
}


def _next(choices: tuple[str, ...], chosen: str) -> str:
    return choices[(choices.index(chosen) + 1) % len(choices)]


def press(view: View, key: str, scene: Scene, height: int) -> View:
    """The view after a key, on a screen of this height; the same after a key without a meaning."""
    key = _ALSO.get(key, key)
    if key in _SCROLLS:
        layers, page = scene.sorted(view.sort, view.side), page_of(scene, height)
        top = _SCROLLS[key](_first(scene, view, layers, page), page, len(layers))
        return replace(view, top=_inside(top, layers, page))
    return _CHOICES[key](view) if key in _CHOICES else view


def _inside(top: int, layers: Sequence[int], page: int) -> int:
    return max(0, min(top, len(layers) - page))


def _first(scene: Scene, view: View, layers: Sequence[int], page: int) -> int:
    """The first layer shown, as a place in `layers`: as somebody scrolled, else such that the layer that failed is there."""
    if view.top is not None:
        return _inside(view.top, layers, page)
    at = next((i for i, layer in enumerate(layers) if scene.layers[layer] == scene.marked), 0)
    return 0 if at < page else _inside(at - page // 2, layers, page)


def page_of(scene: Scene, height: int) -> int:
    """How many layers a screen of this height shows."""
    around = 2 + lines_for("axis", height) + lines_for("legend", height)  # with the title and the keys
    return max(1, height - height_of_vitals(scene, height) - around)


def frame(scene: Scene, view: View, width: int, height: int | None, glyphs: Glyphs) -> list[Text]:
    """The lines of a screen, at most `height` (None: as many as there are layers), none wider than `width`."""
    tall, room = height or TALL, room_for(scene, width)
    layers = scene.sorted(view.sort, view.side)
    page = len(layers) if height is None else page_of(scene, tall)
    top = _first(scene, view, layers, page)
    shown = layers[top : top + page]
    axis, *rows = heat_map(scene, shown, view.side, room, glyphs)
    lines = vitals(scene, view.paused, room, width, tall, glyphs)
    lines += [_title(view, top, len(shown), len(layers), width), *[axis] * lines_for("axis", tall), *rows]
    if height is not None:  # the keys stand at the bottom
        lines += [Text("")] * (page - len(shown))
    lines += [legend(glyphs)] * lines_for("legend", tall) + [_keys(view)] * (height is not None)
    return [_fitted(line, width, glyphs) for line in lines[:height]]


def _fitted(line: Text, width: int, glyphs: Glyphs) -> Text:
    """The line in `width` columns; a message that is cut says so."""
    if line.cell_len > width:
        line = line.copy()
        line.truncate(max(0, width - 1), overflow="crop")
        line.append(glyphs.ellipsis)
    line.no_wrap = True
    return line


def _title(view: View, top: int, shown: int, count: int, width: int) -> Text:
    """What is shown, and which of the layers."""
    says = f" {view.side} norms, {TITLES[view.sort]}"
    place = f"layers {top + 1} to {top + shown} of {count}" if shown < count else f"{count} layers"
    title = Text(says, style="bold")
    return title.append(place.rjust(width - len(says) - 1), "dim") if len(says) + len(place) + 2 <= width else title


def _keys(view: View) -> Text:
    """The keys that do something here."""
    told = {"o": _next(SIDES, view.side), "space": "go on" if view.paused else "pause"}
    parts = [Text.assemble((f" {key} ", "reverse"), f" {does.format(told.get(key, ''))}") for key, does in KEYS]
    return Text(" ") + Text("  ").join(parts)
