"""`nobs plot`."""

from __future__ import annotations

import argparse

from ..errors import BadSetting, explain
from ._common import cannot_write, json_option, opened, output, output_options, path_option, print_json

EXAMPLES = """examples:
  nobs plot                          the newest run, beside its dump
  nobs plot crashes/RUN -o crash.png"""


def options(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    path_option(parser)
    output_options(parser, "beside what is read")
    json_option(parser, "the path")


def run(options: argparse.Namespace) -> int:
    """Draw a dump or a black box as PNG."""
    path, report = opened(options.path)
    out = output(options, path.with_suffix(".png"), path)
    if out.suffix.lower() != ".png":
        raise BadSetting(explain("drawing a picture", str(out), "a PNG file", f"-o {out.name or 'crash'}.png"))
    from ..render.figure import save_png  # matplotlib takes a second

    try:
        save_png(report, out)
    except (OSError, ValueError) as error:  # a name with a NUL, numbers that no axis can hold
        raise cannot_write(out, error) from None
    print_json({"path": str(out)}) if options.json else print(out)
    return 0
