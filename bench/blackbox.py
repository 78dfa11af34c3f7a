"""What the black box costs a step: a row put into it, by the size of the model, and a whole training step with it and without.

    python bench/blackbox.py                      # prints both tables; --json FILE writes the raw figures

The first table writes made rows: through a map, as on ext4 and tmpfs; by `os.pwrite`, as on other file systems; and
through a map with `durable=True`, which waits for the disk. The second trains a network with a recorder that keeps a black
box and with one that does not, step by step in turn; ratios are of the whole step, and of `recorder.step` alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from machine import machine, save  # beside this file
from torch import nn

import nobs
from nobs._blackbox import BlackBox, Header, _storage, this_process
from nobs._blackbox._record import checksum, encode_record
from nobs._history import Row
from nobs._table import Tap, TapTable

LAYERS = (4, 24, 100, 300)
SITES = (("output", "output"), ("output.grad", "output.grad"))
PARAMETERS = ("weight", "bias")


def header(layers: int, capacity: int = 100) -> Header:
    """The header of a model of so many linear layers: six taps each."""
    taps = [Tap(f"layers.{i}", "Linear", site, kind) for i in range(layers) for site, kind in SITES]
    taps += [
        Tap(f"layers.{i}", "Linear", f"{name}{end}", f"parameter{end}")
        for i in range(layers)
        for name in PARAMETERS
        for end in ("", ".grad")
    ]
    return Header("0", "", 0, 1, {}, capacity, TapTable(tuple(taps)), (), this_process())


def rows(table: TapTable, steps: int) -> list[Row]:
    """Made rows: what is in them does not matter to the cost."""
    values = np.random.default_rng(0).random((8, len(table), 8), dtype=np.float32)
    return [Row(step, 0.0, {"loss": 1.0, "lr": 0.1}, table, values[step % 8]) for step in range(steps)]


def times_us(write: Callable[[Row], object], made: list[Row]) -> list[float]:
    """The quartiles of how long each write took, in microseconds."""
    taken = []
    for row in made:
        begin = time.perf_counter()
        write(row)
        taken.append((time.perf_counter() - begin) * 1e6)
    return np.percentile(taken[len(taken) // 10 :], [25, 50, 75]).tolist()


def writing(layers: int, steps: int) -> dict:
    """The cost of a write, by three ways, and what share of it the checksum has."""
    about = header(layers)
    made = rows(about.table, steps)
    with tempfile.TemporaryDirectory() as folder:
        box, durable = (BlackBox([Path(folder) / str(way)], lambda: about, way) for way in (False, True))
        mapped_us = times_us(box.write, made)
        durable_us = times_us(durable.write, made[: steps // 20])
        with mock.patch.object(_storage, "IN_PLACE", frozenset()):
            called_us = times_us(BlackBox([Path(folder) / "call"], lambda: about).write, made)
        layout = box._file.layout
    record = encode_record(made[0], 1, layout)
    checksum_us = times_us(lambda row: checksum(record), made)
    return {
        "layers": layers,
        "taps": len(about.table),
        "record_bytes": layout.record_bytes,
        "file_bytes": layout.total_bytes,
        "mapped_us": mapped_us,
        "checksum_us": checksum_us,
        "pwrite_us": called_us,
        "durable_us": durable_us,
    }


class Residual(nn.Linear):
    """So that a gradient comes through hundreds of them."""

    def forward(self, x):
        return x + 0.1 * super().forward(x)


def stepper(layers: int, blackbox: bool, folder: str) -> Callable[[], tuple[float, float]]:
    """A training loop as a function; gives the seconds that the step took, and `recorder.step` in it."""
    torch.manual_seed(0)
    model = nobs.instrument(nn.Sequential(*(Residual(32, 32) for _ in range(layers))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = nobs.Recorder(model, optimizer=optimizer, directory=folder, blackbox=blackbox)
    x = torch.randn(64, 32)

    def step() -> tuple[float, float]:
        begin = time.perf_counter()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before = time.perf_counter()
        recorder.step(loss)
        end = time.perf_counter()
        return end - begin, end - before

    return step


def training(layers: int, pairs: int, warmup: int = 20) -> dict:
    """With and without in turn, the order of the two changing from pair to pair."""
    with tempfile.TemporaryDirectory() as folder:
        ways = [stepper(layers, blackbox, folder) for blackbox in (False, True)]
        for _ in range(warmup):
            ways[0](), ways[1]()
        taken = np.zeros((pairs, 2, 2))
        for number in range(pairs):
            for which in (0, 1) if number % 2 else (1, 0):
                taken[number, which] = ways[which]()
    quartiles = np.percentile(taken[:, 1] / taken[:, 0], [25, 50, 75], axis=0)
    without_ms, with_ms = np.median(taken, axis=0) * 1e3
    return {
        "layers": layers,
        "step_ratio": quartiles[:, 0].tolist(),
        "recorder_step_ratio": quartiles[:, 1].tolist(),
        "step_ms": [float(without_ms[0]), float(with_ms[0])],
        "recorder_step_ms": [float(without_ms[1]), float(with_ms[1])],
        "pairs": pairs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    written = [writing(layers, options.steps) for layers in LAYERS]
    print("one row into the black box, microseconds: median (quartiles)")
    print(f"{'layers':>6}{'record':>11}{'file':>10}{'mapped':>22}{'checksum':>10}{'pwrite':>9}{'durable':>10}")
    for w in written:
        low, median, high = w["mapped_us"]
        sizes = f"{w['record_bytes'] / 1024:8.1f} KB{w['file_bytes'] / 2**20:7.1f} MB"
        print(
            f"{w['layers']:6}{sizes}{median:8.1f} ({low:.1f} to {high:.1f})"
            f"{w['checksum_us'][1]:10.1f}{w['pwrite_us'][1]:9.1f}{w['durable_us'][1]:10.1f}"
        )
    trained = [training(layers, options.pairs) for layers in LAYERS]
    print("\na training step with a black box / without: median (quartiles)")
    print(f"{'layers':>6}{'whole step':>26}{'recorder.step':>26}{'step':>12}")
    for t in trained:
        ratios = "".join(f"{m:10.3f} ({a:.3f} to {b:.3f})" for a, m, b in (t["step_ratio"], t["recorder_step_ratio"]))
        print(f"{t['layers']:6}{ratios}{t['step_ms'][0]:9.2f} ms")
    save(options.json, machine(), writing=written, training=trained)
    return 0


if __name__ == "__main__":
    sys.exit(main())
