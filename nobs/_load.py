"""Read a dump or a black box from disk, whatever it turns out to be."""

from __future__ import annotations

from pathlib import Path

from ._blackbox import MAGIC, read
from ._codec import SUFFIX
from ._find import find, no_file
from ._parse import loads
from ._recover import report_of
from ._schema import Report
from .errors import reason

MOST_BYTES = 1 << 30


def load(path: str | Path) -> Report:
    """The report in a dump, or of a black box. Executes nothing of what is in the file, and needs no torch.

    Args:
        path: a JSON or a black box that nobs wrote, or a folder, of which the newest is taken.

    Raises:
        UnreadableDump: there is none, or it is truncated, foreign, from a newer release, or hostile.
    """
    file = find(Path(path))
    if is_black_box(file):
        return report_of(read(file))
    try:
        size = file.stat().st_size
        content = b"" if size > MOST_BYTES else file.read_bytes()
    except (OSError, ValueError) as error:
        raise no_file(file, reason(error)) from None
    if size > MOST_BYTES:
        raise no_file(file, "more than 1 GiB")
    return loads(content, str(file))


def is_black_box(path: Path) -> bool:
    """Whether a file begins like a black box, or is called like one.

    Raises:
        UnreadableDump: it cannot be read, or is no file.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                return path.suffix == SUFFIX or file.read(len(MAGIC)) == MAGIC
        got = "no plain file" if path.exists() else "no such file"  # of a pipe, say, nobody knows when it ends
    except (OSError, ValueError) as error:  # a name too long, a file that may not be read, a NUL
        got = reason(error)
    raise no_file(path, got)
