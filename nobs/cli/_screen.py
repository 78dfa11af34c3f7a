"""A run on the whole screen of a terminal, until it is over or somebody leaves; the terminal is left as it was found."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ._follow import Follower
from ._keys import Keyboard

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment
    from rich.text import Text

    from ..render.live import View

TICK_S = 0.1
"""So often the size of the terminal is looked at, so long a key waits at most."""


def screen() -> Console | None:
    """The terminal to draw on; None where stdout is none, or one that cannot move its cursor."""
    from rich.console import Console

    console = Console(highlight=False)
    try:
        able = os.isatty(sys.stdout.fileno()) and console.is_terminal
    except (OSError, ValueError):
        able = False
    return console if able and not console.is_dumb_terminal and not console.legacy_windows else None


def draw(follower: Follower, interval_s: float, console: Console) -> bool:
    """Show the run on the whole screen; False where somebody quit before it was over."""
    from ..render.live import View

    view, why = View(), "suspend"
    while why == "suspend":
        with _terminated(), Keyboard() as keyboard, console.screen():
            view, why = _watched(follower, interval_s, console, keyboard, view)
        if why == "suspend":
            os.kill(0, signal.SIGTSTP)  # as the terminal would have done; from here it goes on with `fg`
    return why == "over"


def _watched(follower: Follower, interval_s: float, console: Console, keyboard: Keyboard, view: View) -> tuple[View, str]:
    """Draw whenever something has changed, until the run is "over", or somebody "quit"s or "suspend"s; and the last view."""
    from rich.console import ConsoleDimensions

    from ..render._glyphs import that_fit
    from ..render.live import LEAVE, frame, press

    glyphs, scene = that_fit(console.encoding), follower.scene()
    drawn: object = None
    look_at_s, news = 0.0, False
    while True:
        if time.monotonic() >= look_at_s:
            news = follower.look() or news
            look_at_s = time.monotonic() + interval_s
            if follower.over and not view.paused:
                return view, "over"
            if news and not view.paused:
                scene, news = follower.scene(), False
            state, quiet_s = follower.standing
            if (state, quiet_s) != (scene.state, scene.quiet_s):
                scene = replace(scene, state=state, quiet_s=quiet_s)
        columns, height = os.get_terminal_size(sys.stdout.fileno())
        console.size = ConsoleDimensions(columns or 80, height or 24)  # a pseudo terminal may have no size
        if (scene, view, console.size) != drawn:
            drawn = (scene, view, console.size)
            _put(console, frame(scene, view, *console.size, glyphs))
        for key in keyboard.pressed(TICK_S):
            if key in LEAVE:
                return view, "over" if follower.over and LEAVE[key] == "quit" else LEAVE[key]
            view = press(view, key, scene, console.size.height)


def _put(console: Console, lines: Sequence[Text]) -> None:
    """The lines on the whole screen, as they are: rich need not look where to break them."""
    from rich.segment import Segment

    def fits(segment: Segment) -> Segment:  # what the encoding lacks is written out, and may be cut for it
        return segment._replace(text=segment.text.encode(console.encoding, "backslashreplace").decode(console.encoding))

    drawn = [[fits(segment) for segment in line.render(console)] for line in lines]
    console.update_screen_lines(Segment.set_shape(drawn, *console.size))


@contextmanager
def _terminated() -> Iterator[None]:
    """In this block SIGTERM unwinds the stack, so that the terminal is left as it was found."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.getsignal(signal.SIGTERM)
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        with suppress(ValueError, TypeError):
            signal.signal(signal.SIGTERM, before)
