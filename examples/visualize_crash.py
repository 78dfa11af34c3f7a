"""Draw the failure signature of a dump, from the dump alone: no model, no data, no torch.

python examples/visualize_crash.py crashes            # the newest dump below a folder
python examples/visualize_crash.py DUMP -o crash.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nobs
from nobs.render.figure import save_png


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, help="a JSON that nobs wrote, or a folder")
    parser.add_argument("-o", "--output", type=Path, default=Path("crash.png"))
    options = parser.parse_args()
    try:
        report = nobs.load(options.dump)
        print(report.summary())
        for layer in report.layers[:5]:
            print(f"  {layer.name} ({layer.type}): {', '.join(layer.sites)}")
        print(save_png(report, options.output).resolve())
    except (nobs.NobsError, OSError, ValueError) as error:
        print(f"visualize_crash: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
