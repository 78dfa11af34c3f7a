"""How the cost of nobs grows: with layers, with capacity, with the size of the batch; and what `recorder.step` takes alone.

    python bench/scaling.py                       # three tables; --json FILE writes the raw figures
    python bench/scaling.py --mode compiled       # compiled whole: slow, a thousand layers take minutes
    python bench/scaling.py --quick               # does everything run?

The model is a chain of residual linear layers of one width, six taps each, in eager. Steps are paired as in
`bench/overhead.py`; `recorder.step` is timed within the observed ones, on the host alone: it is not waited for the device.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from machine import machine, save
from overhead_census import held_bytes
from overhead_loop import Loop
from overhead_measure import compare, cost_of, warm_up
from overhead_options import modes_of, scratch, silence
from overhead_tools import KEPT, record
from overhead_workloads import Tiny, Workload
from torch import Tensor, nn

WIDTH = 32

USUAL = {"layers": 100, "capacity": KEPT, "batch": 32}
"""What holds where another thing is varied."""

HEADINGS = "   taps  bare ms   ratio    quartiles      +ms  us/tap   median    mean      p99       MB"

VARIED: dict[str, dict[str, Sequence[int]]] = {
    "layers": {"all": (10, 30, 100, 300, 1000), "quick": (5, 10)},
    "capacity": {"all": (10, 100, 1000, 10_000), "quick": (5, 50)},
    "batch": {"all": (8, 64, 512, 4096), "quick": (4, 8)},
}
"""What is varied, and over which values."""


def chain(layers: int, batch: int, device: torch.device) -> Workload:
    """So many tiny layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Tiny(WIDTH) for _ in range(layers))).to(device)
    drawn = torch.randn(batch, WIDTH, device=device), torch.randint(WIDTH, (batch,), device=device)
    optimizer = partial(_sgd, fused=True if device.type == "cuda" else None)
    return Workload("chain", model, [drawn], optimizer, list, device, torch.float32)


def _sgd(model: nn.Module, fused: bool | None) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)


def point(layers: int, capacity: int, batch: int, options: argparse.Namespace, folder: Path) -> dict:
    """One line of a table."""
    torch._dynamo.reset()
    device = torch.device(options.device)
    bare = Loop(chain(layers, batch, device), options.mode, None, folder)
    before = held_bytes(device)
    observed = Loop(chain(layers, batch, device), options.mode, partial(record, capacity=capacity), folder)
    after, taken_us = observed.after, []

    def timed(loss: Tensor) -> None:
        begin = time.perf_counter()
        after(loss)
        taken_us.append((time.perf_counter() - begin) * 1e6)

    observed.after = timed
    trained = [*observed.workload.model.parameters(), *observed.workload.batch(0)]
    own_bytes = held_bytes(device) - before - sum(tensor.nbytes for tensor in trained)
    try:
        warm_up((bare, observed), options.warm_up, options.seconds)
        taken_us.clear()
        cost = cost_of([compare(bare, observed, options.pairs, options.seconds)], 1)
        taps = observed.tool.read()
    finally:
        observed.tool.close()
    return {
        "layers": layers,
        "capacity": capacity,
        "batch": batch,
        "taps": taps,
        "cost": asdict(cost),
        "tap_us": cost.extra_ms * 1e3 / taps,
        "recorder_step_us": {
            "median": float(np.median(taken_us)),
            "mean": float(np.mean(taken_us)),
            "p99": float(np.percentile(taken_us, 99)),
        },
        "held_bytes": own_bytes,
        "held_bytes_said": observed.tool.held_bytes,
    }


def line(varied: str, at: dict) -> str:
    """A line of the table of what is varied."""
    cost, step = at["cost"], at["recorder_step_us"]
    quartiles = "{:.3f}-{:.3f}".format(*cost["quartiles"])
    return (
        f"{at[varied]:8}{at['taps']:7}{cost['bare_ms']:9.2f}{cost['ratio']:8.3f}{quartiles:>13}{cost['extra_ms']:9.3f}{at['tap_us']:8.2f}"
        f"{step['median']:9.1f}{step['mean']:8.1f}{step['p99']:9.1f}{at['held_bytes'] / 1e6:9.2f}"
    )


def tables(options: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> Iterator[dict]:
    """Every table that was asked for, said as it is done."""
    for varied in options.vary:
        say(f"\n{'':45}step{'':14}recorder.step, us{'':7}holds\n{varied:>8}{HEADINGS}")
        for value in VARIED[varied]["quick" if options.quick else "all"]:
            with silence(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                at = point(**{**USUAL, varied: value}, options=options, folder=folder)
            gc.collect()
            say(line(varied, at))
            yield {"varied": varied, **at}


def main(arguments: Sequence[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vary", nargs="+", choices=list(VARIED), default=list(VARIED))
    parser.add_argument("--mode", choices=modes_of(device), default="eager")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=30, help="no more pairs for a line when they have taken so long")
    parser.add_argument("--warm-up", type=int, default=60, help="steps before the first that counts")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="few layers and few steps")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.warm_up, options.seconds = 6, 3, 2
    about = machine()
    with scratch() as folder:
        done = list(tables(options, folder, lambda text: print(text, flush=True)))
    save(options.json, about, mode=options.mode, rows=done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
