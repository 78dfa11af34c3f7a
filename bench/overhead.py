"""What recording costs: bare and observed steps of one model, interleaved in one process, as medians of paired ratios.

    python bench/overhead.py                      # prints a table; --json FILE writes the raw figures
    NOBS_MNIST=DIR python bench/overhead.py       # on real images

The model is the ConvNet of examples/mnist_failure.py, all sites at every step, plain SGD, with `recorder.step` and its
triggers in the observed step. Machines are noisy: the figures are ratios taken side by side, with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import nobs

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import mnist_data
from mnist_failure import ConvNet

BATCH = 64


def stepper(images, labels, compiled: bool, observed: bool, every: int) -> Callable[[int], float]:
    """One training loop as a function of the step; gives the seconds that the step took."""
    torch.manual_seed(0)
    model = ConvNet()
    if observed:
        nobs.instrument(model, every=every)
    step_model = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = nobs.Recorder(model, optimizer=optimizer, directory=tempfile.mkdtemp()) if observed else None

    def step(number: int) -> float:
        batch = torch.arange(BATCH) + (number * BATCH) % (len(images) - BATCH)
        x, y = images[batch], labels[batch]
        begin = time.perf_counter()
        loss = nn.functional.cross_entropy(step_model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if recorder is not None:
            recorder.step(loss)
        return time.perf_counter() - begin

    return step


def measure(images, labels, compiled: bool, every: int, pairs: int, warmup: int = 20) -> dict:
    """Bare and observed in turn, the order of the two changing from pair to pair."""
    bare, observed = (stepper(images, labels, compiled, seen, every) for seen in (False, True))
    for number in range(warmup):
        bare(number), observed(number)
    times = np.zeros((pairs, 2))
    for number in range(pairs):
        for which in (0, 1) if number % 2 else (1, 0):
            times[number, which] = (bare, observed)[which](number)
    ratios = times[:, 1] / times[:, 0]
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return {
        "mode": "compiled" if compiled else "eager",
        "every": every,
        "ratio_median": float(median),
        "ratio_quartiles": [float(low), float(high)],
        "bare_ms": float(np.median(times[:, 0]) * 1e3),
        "observed_ms": float(np.median(times[:, 1]) * 1e3),
        "pairs": pairs,
    }


def machine() -> dict:
    """What the figures were taken on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "nobs": nobs.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    images, labels = mnist_data.load(Path(os.environ["NOBS_MNIST"]) if "NOBS_MNIST" in os.environ else None)
    rows = [measure(images, labels, compiled, every, options.pairs) for compiled in (False, True) for every in (1, 10)]
    print(f"{'mode':10}{'every':>6}{'ratio':>8}  quartiles       bare      observed")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"{row['mode']:10}{row['every']:6}{row['ratio_median']:8.3f}  {low:.3f} to {high:.3f}"
            f"{row['bare_ms']:8.2f} ms{row['observed_ms']:9.2f} ms"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
