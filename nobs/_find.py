"""Which files of nobs lie below a folder, and which of them is meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ._blackbox import OpenBox
from ._codec import SUFFIX
from ._names import printable
from .errors import UnreadableDump, explain, reason

_RANK = len("rank00000")
_OF_A_RANK = re.compile(r"rank\d{5}(-\d+)?\.json")


def find(path: Path) -> Path:
    """The dump or black box that a path means: the file itself, or what the newest run in a folder tells of itself.

    Of several ranks that is the first dump, of which the lowest rank, so that a rank that failed is not hidden behind one that
    did not; where none has dumped, the lowest rank's black box.

    Raises:
        UnreadableDump: a folder without such files.
    """
    words = last_words(path)
    dumps = _news([file for file in words if file.suffix != SUFFIX])
    if len(words) == 1 or not dumps:
        return words[0]
    first = min(dumps, key=lambda file: dumps[file])
    return next(file for file in words if file in dumps and file.parent == first.parent)


def last_words(path: Path) -> list[Path]:
    """Of the newest run in a folder the latest that each rank has told, by rank; a file itself.

    Raises:
        UnreadableDump: a folder without dumps and black boxes.
    """
    news_s = _newest_run(path, lambda folder: _dumps(folder) + _boxes(folder))
    if not news_s:
        raise no_file(path, "a folder without dumps and black boxes")
    latest = {file.name[:_RANK]: file for file in sorted(news_s, key=lambda file: (news_s[file], str(file)))}
    return [latest[rank] for rank in sorted(latest)]


def files_of_ranks(path: Path) -> dict[int, tuple[Path, ...]]:
    """Of the newest run in a folder the files of each rank, the one to read first: black boxes, which hold all, then dumps, of
    either the newest first.

    Where there is one run only, no box is opened but those of which a rank has several.

    Raises:
        UnreadableDump: a folder without dumps and black boxes.
    """
    try:
        files = [file for file in _dumps(path) + _boxes(path) if file.is_file()] if path.is_dir() else [path]
    except (OSError, ValueError) as error:
        raise no_file(path, reason(error)) from None
    if len({_run_of(file) for file in files}) > 1:
        files = list(_newest_run(path, lambda folder: files))
    if not files:
        raise no_file(path, "a folder without dumps and black boxes")
    of_rank: dict[int, list[Path]] = {}
    for file in files:
        of_rank.setdefault(_rank_of(file), []).append(file)
    return {rank: tuple(_best_first(of_rank[rank])) for rank in sorted(of_rank)}


def _best_first(files: list[Path]) -> list[Path]:
    if len(files) == 1:
        return files
    return sorted(files, key=lambda file: (file.suffix == SUFFIX, _news_s(file), str(file)), reverse=True)


def _rank_of(file: Path) -> int:
    digits = file.name[_RANK - 5 : _RANK]
    return int(digits) if file.name.startswith("rank") and digits.isdigit() else 0


def find_black_box(path: Path) -> Path | None:
    """The black box that a path means: the file itself, or of a folder the lowest rank's of the newest run; None without any."""
    news_s = _newest_run(path, _boxes)
    return min(news_s, key=lambda file: (file.name[:_RANK], -news_s[file]), default=None)


def beside(box: Path) -> list[Path]:
    """The black boxes of the same rank and folder, itself among them."""
    return [file for file in box.parent.iterdir() if file.suffix == SUFFIX and file.name[:_RANK] == box.name[:_RANK]]


def dump_of(box: Path) -> Path | None:
    """The dump made of a black box since its last record: the one that its recorder told it of, else a recovered one."""
    with OpenBox(box) as opened:
        status, last_s = opened.status(), opened.last_time_s() or 0.0
    told = None if status is None or status.dump is None else Path(status.dump)
    if told is not None:  # the whole folder may have moved
        there = [box.parent / told.parent.name / told.name, told]
    else:
        steps = sorted(folder for folder in box.parent.iterdir() if folder.name.startswith("step"))
        there = [folder / f"{box.stem}.json" for folder in reversed(steps)]
    return next((file for file in there if file.is_file() and file.stat().st_mtime >= last_s), None)


def _run_of(file: Path) -> Path:
    """The folder of a file's run: a dump lies in one of its step."""
    return file.parent.parent if file.suffix != SUFFIX and file.parent.name.startswith("step") else file.parent


def _newest_run(path: Path, files_in: Callable[[Path], list[Path]]) -> dict[Path, float]:
    """As of when each file of the newest run in a folder is; a file itself, and its time is of no matter."""
    try:
        news_s = _news(files_in(path)) if path.is_dir() else {path: 0.0}
    except (OSError, ValueError) as error:
        raise no_file(path, reason(error)) from None
    if not news_s:
        return {}
    run = _run_of(max(news_s, key=lambda file: (news_s[file], str(file))))
    return {file: time_s for file, time_s in news_s.items() if _run_of(file) == run}


def _boxes(folder: Path) -> list[Path]:
    return list(folder.rglob(f"*{SUFFIX}"))


def _dumps(folder: Path) -> list[Path]:
    """By their names; without any, any JSON may be one, but for a trace that was exported beside it."""
    of_ranks = [file for file in folder.rglob("rank*.json") if _OF_A_RANK.fullmatch(file.name)]
    if of_ranks or next(folder.rglob(f"*{SUFFIX}"), None) is not None:  # beside black boxes it is what somebody wrote of them
        return of_ranks
    return [file for file in folder.glob("*.json") if not file.name.endswith(".trace.json")]


def _news(files: list[Path]) -> dict[Path, float]:
    return {file: _news_s(file) for file in files if file.is_file()}


def _news_s(file: Path) -> float:
    """As of when a file is, in Unix time: a black box as of its last record, as a file system need not notice mapped writes."""
    if file.suffix != SUFFIX:
        return file.stat().st_mtime
    try:
        with OpenBox(file) as box:
            return box.last_time_s() or 0.0
    except UnreadableDump:
        return 0.0


def no_file(path: Path, got: str) -> UnreadableDump:
    """The error for a path that means no file of nobs."""
    expected = "a dump (<directory>/<run>/step<N>/rank<N>.json), a black box (<directory>/<run>/rank<N>.blackbox), or a folder"
    type_this = "nobs show PATH, below the directory that the Recorder writes to (./crashes if it was told no other)"
    return UnreadableDump(explain(f"reading {printable(str(path))}", got, expected, type_this))
