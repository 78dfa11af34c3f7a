"""`nobs export`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from .._codec import write_whole
from .._names import printable
from ..errors import BadSetting, explain
from ..export import FORMATS
from ._common import (
    cannot_write,
    chosen,
    json_option,
    layer_option,
    opened,
    output,
    output_options,
    path_option,
    print_json,
)

EXAMPLES = """formats:
  csv          one table for pandas, R and Excel: a row for each step and site that ran, and for each scalar
  npz          NumPy arrays, bit for bit
  trace        for ui.perfetto.dev and chrome://tracing
  tensorboard  a folder for tensorboard --logdir; needs the package tensorboard

examples:
  nobs export                                          the newest run as CSV, beside its dump
  nobs export crashes/RUN -f trace -o run.trace        -o - is stdout
  nobs export DUMP -l conv1 -f csv -o - | cut -d, -f1,6,8"""

STDOUT = Path("-")


def options(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    path_option(parser)
    parser.add_argument("-f", "--format", choices=[*FORMATS], default="csv", help="see below; without it csv")
    output_options(parser, "beside what is read; - for stdout", force=["--force"])
    layer_option(parser)
    json_option(parser, "format, path, steps and bytes")


def run(options: argparse.Namespace) -> int:
    """Write a dump or a black box for another program: CSV, npz, a trace, TensorBoard."""
    form = FORMATS[options.format]
    to_stdout = options.output == STDOUT
    if to_stdout and (options.json or not form.text):
        got = "-o - together with --json" if options.json else f"-o - for {options.format}"
        raise BadSetting(explain("exporting to stdout", got, "csv or trace, and nothing else on stdout", "-o FILE"))
    path, report = opened(options.path)
    out = path if to_stdout else output(options, path.with_suffix(form.suffix), path)
    if options.layer:
        report = replace(report, history=report.history.only(chosen(options.layer, report)))
    content = form.content(report)
    if to_stdout:
        _print(content.decode())
        return 0
    try:
        write_whole(form.file(out), content)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL, or none at all
        raise cannot_write(out, error) from None
    about = {"format": options.format, "path": str(out), "steps": len(report.history), "bytes": len(content)}
    print_json(about) if options.json else print(out)
    return 0


def _print(text: str) -> None:
    """Text to stdout; to a terminal without what could move its cursor."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    for line in text.splitlines():
        print(printable(line))
