"""`nobs show`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from .. import _codec
from .._find import files_of_ranks
from .._merge import merge as merged
from . import merge
from ._common import chosen, json_option, layer_option, opened, path_option

EXAMPLES = """examples:
  nobs show                          the newest run below ./crashes
  nobs show crashes/RUN              of a run: its dump, or its black box if that is newer
  nobs show RUN --layer conv1        every site of a layer
  nobs show DUMP --json | jq .findings"""


def options(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    path_option(parser)
    layer_option(parser)
    json_option(parser, "the report")


def run(options: argparse.Namespace) -> int:
    """Print the report of a dump, or of a black box; of a folder with several ranks that of all of them."""
    if not options.layer and len(files_of_ranks(options.path)) > 1:
        merge.show(merged(options.path), options.path, options.json)
        return 0
    path, report = opened(options.path)
    layers = chosen(options.layer, report) if options.layer else None
    if options.json:
        shown = report if layers is None else replace(report, history=report.history.only(layers))
        print(_codec.dumps(shown), end="")
        return 0
    if layers is None:
        from ..render.terminal import print_report  # rich is not needed for --json

        print_report(report, path)
    else:
        from ..render.sites import print_sites

        print_sites(report, layers)
    return 0
