"""What stands above the layers on a live screen: how the run stands, what the triggers saw, the layer to look at, the loss."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.text import Text

from .._names import printable, safe_text, shortened
from ._glyphs import Glyphs, figures
from ._heatmap import BAD, TIMES, VALUE, Room, level_style, padded, times_usual, trend
from ._scene import Scene

LOOKS: Mapping[str, tuple[str, str]] = {
    "running": ("running", "bold green"),
    "silent": ("silent for {} s", "bold yellow"),
    "ended": ("ended", "bold cyan"),
    "failed": ("failed", BAD),
    "exception": ("exception", BAD),
    "sigterm": ("stopped by SIGTERM", BAD),
    "died": ("died", BAD),
}
"""The state of a run -> what is said of it, and its style."""

ROOM: Mapping[str, tuple[tuple[int, int], ...]] = {
    "worst": ((8, 1),),
    "axis": ((9, 1),),
    "facts": ((14, 1),),
    "legend": ((14, 1),),
    "others": ((16, 1),),
    "gap": ((22, 1),),
    "air": ((28, 1),),
    "scalars": ((0, 1), (30, 2), (40, 4), (50, 6)),
    "failures": ((0, 1), (20, 2), (40, 4)),
}
"""Each part of the screen -> from which height on it may take how many lines."""

_LABEL = 9
_LABELS_FROM = 60
"""The width from which on there is room for labels."""


def lines_for(part: str, height: int) -> int:
    """How many lines a part may have on a screen of this height."""
    return max((lines for least, lines in ROOM[part] if height >= least), default=0)


def vitals(scene: Scene, paused: bool, room: Room, width: int, height: int, glyphs: Glyphs) -> list[Text]:
    """All lines above the title of the layers."""
    facts = Text(" " + " | ".join(map(printable, scene.facts)), style="dim")
    gap, air = ([Text("")] * lines_for(part, height) for part in ("gap", "air"))
    worst = [_worst(scene, width, glyphs)] * lines_for("worst", height)
    lines = [_head(scene, paused, width, glyphs), *[facts] * lines_for("facts", height), *gap]
    return [*lines, *_told(scene, height, width), *worst, *gap, *_scalars(scene, room, height, glyphs), *air]


def height_of_vitals(scene: Scene, height: int) -> int:
    """How many lines those are."""
    fixed = 1 + sum(lines_for(part, height) for part in ("facts", "gap", "worst", "gap", "air"))
    return fixed + len(_told(scene, height, 0)) + len(_drawn(scene, height)) + bool(_named(scene, height))


def _head(scene: Scene, paused: bool, width: int, glyphs: Glyphs) -> Text:
    """How the run stands; of a long name what there is room for."""
    says, style = LOOKS[scene.state]
    head = Text.assemble((f" {says.format(scene.quiet_s)} ", f"{style} reverse"))
    if paused:
        head.append(" paused ", "bold yellow reverse")
    head.append(f"  step {scene.steps[-1]}" if len(scene.steps) else "  no step yet", "bold")
    if scene.steps_per_s is not None:
        head.append(f"  {figures(scene.steps_per_s, 3)} steps/s")
    room = width - head.cell_len - 2
    return head.append("  " + shortened([printable(scene.name)], room, glyphs.ellipsis)[0], "dim") if room >= 8 else head


def _labelled(label: str, width: int) -> Text:
    return Text.assemble((f" {label.ljust(_LABEL)} " if width >= _LABELS_FROM else " ", "bold"))


def _given(scene: Scene) -> list[str]:
    """The scalars that there are: the loss first, and further learning rates last."""
    given = [name for name in scene.scalars if scene.given[name].any()]
    return sorted(given, key=lambda name: (name != "loss", name.startswith("lr.")))


def _drawn(scene: Scene, height: int) -> list[str]:
    """The scalars that are drawn."""
    return _given(scene)[: lines_for("scalars", height)]


def _named(scene: Scene, height: int) -> list[str]:
    """The scalars of which the last value is told."""
    return _given(scene)[lines_for("scalars", height) :] if lines_for("others", height) else []


def _scalars(scene: Scene, room: Room, height: int, glyphs: Glyphs) -> list[Text]:
    """The loss, and on a tall screen others, over the steps of the layers below; of the rest the last values in a line."""
    lines = [_scalar(scene, name, room, glyphs) for name in _drawn(scene, height)]
    if names := _named(scene, height):
        pairs = [Text.assemble((f"{printable(name)} ", "bold"), _last(scene, name)) for name in names]
        lines.append(Text(" ") + Text("   ").join(pairs))
    return lines


def _scalar(scene: Scene, name: str, room: Room, glyphs: Glyphs) -> Text:
    """Its course, its last value, and its least."""
    given, values = scene.given[name], scene.scalars[name]
    finite = values[np.isfinite(values)]
    label = shortened([printable(name)], room.left - 2, glyphs.ellipsis)[0]
    last = _last(scene, name)
    line = Text.assemble((f" {padded(label, room.left - 1)}", "bold"), trend(values, given & ~np.isfinite(values), room, glyphs))
    line.append(" " * max(1, VALUE + 1 - len(last))).append(last)
    if finite.size and room.times:
        ways = [f"min {figures(float(finite.min()), count)}" for count in (3, 2)]
        line.append(next((way for way in ways if len(way) <= TIMES), "").rjust(TIMES + 1), "dim")
    return line


def _last(scene: Scene, name: str) -> Text:
    """The last value that was given."""
    value = float(scene.scalars[name][scene.given[name]][-1])
    return Text(figures(value, 4), style="" if np.isfinite(value) else BAD)


def _told(scene: Scene, height: int, width: int) -> list[Text]:
    """What ended the run, and what the triggers saw, the last first."""
    exception = "; ".join(filter(None, map(str.strip, (scene.exception or "").splitlines())))
    ended = [("ended by", printable(safe_text(exception, 400)))] if exception else []
    when = [f"step {f.step}  " * (f"step {f.step}" not in f.message) for f in scene.failures]  # as a rule the message says it
    seen = [f"{step}{printable(f.trigger)}  {printable(f.message)}" for step, f in zip(when, scene.failures, strict=True)][::-1]
    said = [*ended, *zip(("triggers", *[""] * len(seen)), seen, strict=False)][: lines_for("failures", height)]
    lines = [_labelled(label, width).append(text, BAD) for label, text in said]
    return lines or [_labelled("triggers", width).append("no trigger has fired", "green")]


def _worst(scene: Scene, width: int, glyphs: Glyphs) -> Text:
    """The layer to look at: `highest  blocks.3.up  gradient norm 1.2e+03, 140x its usual`."""
    worst = scene.worst
    if worst is None:
        return _labelled("highest", width).append("no reading yet", "dim")
    if worst.since is not None:
        label, says, style = "first bad", f"{worst.side} NaN/Inf since step {worst.since}", BAD
    else:
        norms = scene.sides[worst.side]
        rise = float(norms.last_rises[worst.layer])
        value = figures(float(norms.values[norms.last[worst.layer], worst.layer]), 3)
        times = f"{times_usual(rise)} its usual" if np.isfinite(rise) else "beyond float32"
        label, says, style = "highest", f"{worst.side} norm {value}, {times}", level_style(rise)
    line = _labelled(label, width)
    room = max(8, width - line.cell_len - 2 - len(says))
    return line.append(f"{shortened([printable(scene.layers[worst.layer])], room, glyphs.ellipsis)[0]}  {says}", style)
