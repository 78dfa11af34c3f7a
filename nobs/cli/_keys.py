"""The keys that somebody presses, one by one and not echoed. None where stdin is no terminal, or there is no termios."""

from __future__ import annotations

import os
import re
import select
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

try:
    import termios
    import tty
except ImportError:  # Windows
    _TERMINALS = False
else:
    _TERMINALS = True

NAMES: Mapping[str, str] = {
    **{f"\x1b{by}{end}": name for by in "[O" for end, name in zip("ABHF", ("up", "down", "home", "end"), strict=True)},
    **{f"\x1b[{number}~": name for number, name in ((1, "home"), (7, "home"), (4, "end"), (8, "end"))},
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b": "escape",
    "\x1a": "suspend",
    "\t": "tab",
    " ": "space",
}
"""What a terminal sends -> the name of the key; a letter is its own name."""

_KEY = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|\x1b[^\x1b]|.", re.DOTALL)
_HALF = re.compile(r"\x1b(\[[0-?]*|O)?\Z")
_REST_S = 0.05
"""A key of several characters may come in two parts, the second so much later; a lone Escape has none."""


def names_of(typed: str) -> list[str]:
    """The keys in what a terminal sent; those without a name are left out unless they are letters."""
    keys = _KEY.findall(typed)
    return [NAMES.get(key, key) for key in keys if key in NAMES or len(key) == 1]


class Keyboard:
    """Within its block, the terminal at stdin gives each key at once; afterwards it is as it was.

    Ctrl-C is a KeyboardInterrupt as ever. Ctrl-Z is a key: whoever draws must tidy up before it stops.
    """

    def __init__(self) -> None:
        self._terminal = _stdin_terminal()
        self._before: list[Any] = []

    def __enter__(self) -> Keyboard:
        if self._terminal is not None:
            self._before = termios.tcgetattr(self._terminal)
            tty.setcbreak(self._terminal)
            mode = termios.tcgetattr(self._terminal)
            mode[6][termios.VSUSP] = b"\0"
            termios.tcsetattr(self._terminal, termios.TCSADRAIN, mode)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._terminal is not None:
            with suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(self._terminal, termios.TCSADRAIN, self._before)

    def pressed(self, timeout_s: float) -> list[str]:
        """The names of the keys pressed, waited for at most so long; "q" where the terminal is gone."""
        if self._terminal is None:
            time.sleep(timeout_s)
            return []
        typed = b""
        while _readable(self._terminal, _REST_S if typed else timeout_s):
            part = _read(self._terminal)
            if not part:
                return ["q"]
            typed += part
            if not _HALF.search(typed.decode(errors="replace")):
                break
        return names_of(typed.decode(errors="replace"))


def _stdin_terminal() -> int | None:
    """The descriptor of stdin, where that is a terminal."""
    try:
        descriptor = sys.stdin.fileno()
        return descriptor if _TERMINALS and os.isatty(descriptor) else None
    except (AttributeError, OSError, ValueError):  # no stdin, none that is a file, a closed one
        return None


def _readable(descriptor: int, timeout_s: float) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1024)
    except OSError:
        return b""
