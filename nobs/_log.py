"""How nobs says that something went wrong at run time: in the log, and on stderr, as nobody may be reading the log."""

from __future__ import annotations

import contextlib
import logging
import sys

from ._names import printable, safe_text

log = logging.getLogger("nobs")
log.addHandler(logging.NullHandler())


def complain(what: str, error: BaseException | None = None) -> None:
    """In the log with the error's trace, and on stderr in a line."""
    text = what if error is None else f"{what}: {safe_text(error)}"
    log.warning("nobs %s", text, exc_info=error)
    say(f"nobs {printable(text)}")


def say(text: str) -> None:
    """A line on stderr, which may be closed, or None."""
    with contextlib.suppress(Exception):
        print(text, file=sys.stderr)
