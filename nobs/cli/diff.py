"""`nobs diff`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .._codec import number
from .._difference import TOLERANCE, Difference, LayerDifference, Pair, Reading, Span, Spot, compare
from .._names import printable
from .._schema import Report
from ..errors import UnknownLayer
from ._common import chosen, given_path, json_option, layer_option, opened, print_json

EXAMPLES = """examples:
  nobs diff crashes/RUN1 crashes/RUN2            a crash against a healthy run
  nobs diff RUN1 RUN2 --layer conv1 --layer fc   of two layers only
  nobs diff RUN1 RUN2 --tolerance 0              of one seed: the first bit that is not the same
  nobs diff RUN1 RUN2 --json | jq .first

exit codes: 0 whether they differ or not, 2 wrong usage, no step in common or an unreadable file"""


def options(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    for name in "ab":
        about = "a dump, a black box, or a folder: the newest in it"
        parser.add_argument(name, type=given_path, metavar=name.upper(), help=about)
    layer_option(parser)
    about = f"two norms differ if by more than this share of the larger one (without: {TOLERANCE:g})"
    parser.add_argument("-t", "--tolerance", type=float, default=TOLERANCE, metavar="SHARE", help=about)
    json_option(parser, "the differences")


def run(options: argparse.Namespace) -> int:
    """Compare two runs step by step: which layers part first, and which leave."""
    a, b = opened(options.a), opened(options.b)
    if a[0] == b[0]:
        print(f"nobs: A and B are the same file: {printable(str(a[0]))}", file=sys.stderr)
    layers = _chosen(options.layer, a[1], b[1]) if options.layer else None
    difference = compare(a[1].history, b[1].history, options.tolerance, layers)
    if options.json:
        print_json({"a": str(a[0]), "b": str(b[0]), **_plain(difference)})
        return 0
    from ..render.difference import print_difference  # rich is not needed for --json

    print_difference(difference, a, b)
    return 0


def _chosen(typed: list[str], *reports: Report) -> set[str]:
    """The layers that somebody typed, in whichever run they are.

    Raises:
        UnknownLayer: one fits none in either run, or begins several.
    """
    found: set[str] = set()
    for name in typed:
        unknown = []
        for report in reports:
            try:
                found.update(chosen([name], report))
            except UnknownLayer as error:
                unknown.append(error)
        if len(unknown) == len(reports):
            raise unknown[0]
    return found


def _plain(difference: Difference) -> dict[str, Any]:
    """A comparison as JSON can hold it."""
    return {
        "tolerance": difference.tolerance,
        "steps": {
            "common": _span(difference.common),
            "measured": difference.measured and _span(difference.measured),
            "only_a": [_span(span) for span in difference.only_a],
            "only_b": [_span(span) for span in difference.only_b],
        },
        "first": next(({"layer": layer.name, "type": layer.type, **_spot(at)} for at, layer in difference.parting), None),
        "first_apart": next((_layer(layer) for _, layer in difference.leaving), None),
        "layers": [_layer(layer) for layer in difference.layers],
        "scalars": [
            {"name": scalar.name, "parts": scalar.parts and _pair(scalar.parts), "last": scalar.last and _pair(scalar.last)}
            for scalar in difference.scalars
        ],
        "only_in_a": [{"layer": layer, "site": site} for layer, site in difference.only_in_a],
        "only_in_b": [{"layer": layer, "site": site} for layer, site in difference.only_in_b],
    }


def _span(span: Span) -> list[int]:
    return [span.first, span.last, span.count]


def _layer(layer: LayerDifference) -> dict[str, Any]:
    spots = {"parts": layer.parts, "leaves": layer.leaves, "apart": layer.apart, "largest": layer.largest}
    found = {name: at and _spot(at) for name, at in spots.items()}
    return {"layer": layer.name, "type": layer.type, "always": layer.always, **found}


def _spot(at: Spot) -> dict[str, Any]:
    return {"site": at.site, "step": at.step, "a": _reading(at.a), "b": _reading(at.b), "ratio": number(at.ratio)}


def _reading(reading: Reading | None) -> dict[str, Any] | None:
    return None if reading is None else {"norm": number(reading.norm), "nonfinite": reading.nonfinite}


def _pair(pair: Pair) -> dict[str, Any]:
    return {"step": pair.step, "a": number(pair.a), "b": number(pair.b)}
