"""What several commands ask for: which file, which layers, where to write, and whether in JSON."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._find import find
from .._load import load
from .._names import ROOT, matching, nearest, printable
from .._schema import Report
from ..errors import BadSetting, UnknownLayer, explain, reason

USUAL = Path("crashes")
"""Where a Recorder writes to if nobody says otherwise."""


def path_option(parser: argparse.ArgumentParser, name: str = "path") -> None:
    """What to read: a positional argument that may be left out."""
    about = f"a dump, a black box, or a folder: the newest in it (without: {USUAL})"
    parser.add_argument(name, type=given_path, nargs="?", default=USUAL, metavar="PATH", help=about)


def given_path(text: str) -> Path:
    """A path that somebody typed; not an empty one, which would mean the folder that one happens to be in."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text)


def json_option(parser: argparse.ArgumentParser, what: str) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON, and nothing else")


def output_options(parser: argparse.ArgumentParser, what: str, force: Sequence[str] = ("-f", "--force")) -> None:
    """-o and -f; or --force alone, for a command to which -f means something else."""
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"where to; without it {what}")
    parser.add_argument(*force, action="store_true", help="write over what exists where -o says")


def layer_option(parser: argparse.ArgumentParser) -> None:
    """-l, as often as wanted."""
    about = "only this layer: its name, as much of it as no other begins with, a block, or a pattern; may be repeated"
    parser.add_argument("-l", "--layer", action="append", default=[], metavar="NAME", help=about)


def opened(path: Path) -> tuple[Path, Report]:
    """The file that a path means, and the report in it."""
    file = find(path)
    return file, load(file)


def chosen(typed: list[str], report: Report) -> list[str]:
    """The layers that somebody typed, in execution order; none typed means all.

    Raises:
        UnknownLayer: one fits none, or begins several.
    """
    names = [layer.name for layer in report.layers]
    found = {name for one in typed for name in _meant(one, names)}
    return [name for name in names if name in found or not typed]


def _meant(typed: str, names: list[str]) -> list[str]:
    """The layers that a typed name means: itself, what a pattern fits, all of a block, or the only one that begins so."""
    fitting = matching(typed, names) or [name for name in names if name.startswith(f"{typed}.") and typed != ROOT]
    begins = [name for name in names if name.startswith(typed)]
    if fitting or len(begins) == 1:
        return fitting or begins
    what = f"{len(begins)} layers that begin so" if begins else "no such layer"
    close = [printable(name) for name in begins[:5] or nearest(typed, names)] or ["NAME"]
    there = f"one of {len(names)}; did you mean {', '.join(close)}?"
    raise UnknownLayer(explain(f"looking for the layer {typed!r}", what, there, f"--layer {shlex.quote(close[0])}"))


def output(options: argparse.Namespace, beside: Path, source: Path) -> Path:
    """Where to write: what -o says, else `beside` the source, which is written over.

    Raises:
        BadSetting: it exists, and nobody said --force; or it is the source itself.
    """
    out: Path = options.output or beside
    if out == source or _same(out, source):
        raise BadSetting(explain("writing a file", f"{out}, which is what is read", "another name", "-o FILE"))
    ours = options.output is None and source.name.startswith("rank")  # beside a file of nobs it has the name of nobs
    if not ours and not options.force and _exists(out):
        raise BadSetting(explain("writing a file", f"{out}, which exists", "a new name, or a word that it may go", "add --force"))
    return out


def _same(path: Path, source: Path) -> bool:
    try:
        return path.samefile(source)
    except (OSError, ValueError):  # there is none yet
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: Exception) -> BadSetting:
    """The error for a file that could not be written."""
    return BadSetting(explain(f"cannot write {path}", reason(error), "a place with room and the permission to write", "-o FILE"))


def print_json(data: Any) -> None:
    """JSON on stdout, strict."""
    print(json.dumps(data, allow_nan=False))
