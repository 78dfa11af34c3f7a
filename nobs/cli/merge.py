"""`nobs merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._codec import write_whole
from .._merge import dumps, merge
from .._ranks import Ranks
from ._common import cannot_write, json_option, output, path_option

EXAMPLES = """examples:
  nobs merge                                   the newest run below ./crashes
  nobs merge crashes/RUN --json | jq .first    which rank, layer, site and step
  nobs merge crashes/RUN -o merged.json        for another program

Each rank is read from its black box, or without one from its dump. The norms of parameters that ranks share are of the whole."""


def options(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    path_option(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the merged report there as JSON as well")
    parser.add_argument("-f", "--force", action="store_true", help="write over what exists where -o says")
    json_option(parser, "the merged report")


def run(options: argparse.Namespace) -> int:
    """Print one report of all ranks of a run: which rank, layer and step first, who differs, is late, died or is missing."""
    ranks = merge(options.path)
    if options.output is not None:
        path = output(options, options.output, Path(ranks.file))
        try:
            write_whole(path, dumps(ranks).encode())
        except (OSError, ValueError) as error:
            raise cannot_write(path, error) from None
    show(ranks, options.path, options.json)
    return 0


def show(ranks: Ranks, path: Path, as_json: bool) -> None:
    """Print the merged report."""
    if as_json:
        print(dumps(ranks), end="")
        return
    from ..render.ranks import print_ranks  # rich is not needed for --json

    print_ranks(ranks, path)
