"""Read a dump or a black box from disk, whatever it turns out to be."""

from __future__ import annotations

from pathlib import Path

from ._blackbox import MAGIC, OpenBox, read
from ._codec import SUFFIX
from ._parse import loads
from ._recover import report_of
from ._schema import Report
from .errors import UnreadableDump, explain, reason

MOST_BYTES = 1 << 30
_RANK = len("rank00000")


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
        raise _no_file(file, reason(error)) from None
    if size > MOST_BYTES:
        raise _no_file(file, "more than 1 GiB")
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
    raise _no_file(path, got)


def find(path: Path) -> Path:
    """The dump or black box that a path means: the file itself, or of a folder the one with the latest news."""
    try:
        found = _newest([*_dumps(path), *path.rglob(f"*{SUFFIX}")]) if path.is_dir() else path
    except (OSError, ValueError) as error:
        raise _no_file(path, reason(error)) from None
    if found is None:
        raise _no_file(path, "a folder without dumps and black boxes")
    return found


def find_black_box(path: Path) -> Path | None:
    """The black box that a path means, likewise; None where a folder has none (yet)."""
    try:
        return _newest([*path.rglob(f"*{SUFFIX}")]) if path.is_dir() else path
    except (OSError, ValueError) as error:
        raise _no_file(path, reason(error)) from None


def dump_of(box: Path) -> Path | None:
    """The dump of a black box's rank, made since its last record; None where there is none."""
    made_s = {file: _news_s(file) for file in box.parent.glob(f"step*/{box.name[:_RANK]}.json")}
    return max((file for file in made_s if made_s[file] >= _news_s(box)), key=lambda file: made_s[file], default=None)


def _dumps(folder: Path) -> list[Path]:
    """By their names; in a folder without such names any JSON may be one, but for a trace that was exported beside it."""
    of_ranks = [file for file in folder.rglob("rank*.json") if len(file.name) == _RANK + len(".json")]
    return of_ranks or [file for file in folder.glob("*.json") if not file.name.endswith(".trace.json")]


def _newest(files: list[Path]) -> Path | None:
    """The file with the latest news; of its kind and folder the lowest rank, and of that rank's the newest."""
    news_s = {file: _news_s(file) for file in files if file.is_file()}
    if not news_s:
        return None
    newest = max(news_s, key=lambda file: (news_s[file], str(file)))
    beside = [file for file in news_s if (file.parent, file.suffix) == (newest.parent, newest.suffix)]
    return min(beside, key=lambda file: (file.name[:_RANK], -news_s[file]))


def _news_s(file: Path) -> float:
    """As of when a file is, in Unix time: a black box as of its last record, as a file system need not notice mapped writes."""
    if file.suffix != SUFFIX:
        return file.stat().st_mtime
    try:
        with OpenBox(file) as box:
            return box.last_time_s() or 0.0
    except UnreadableDump:
        return 0.0


def _no_file(path: Path, got: str) -> UnreadableDump:
    expected = (
        "a dump, <directory>/<run>/step<N>/rank<N>.json, a black box, <directory>/<run>/rank<N>.blackbox, or a folder of them"
    )
    return UnreadableDump(explain(f"reading {path}", got, expected, "nobs show crashes"))
