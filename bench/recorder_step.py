"""What `recorder.step` takes on the host, alone: calls in a row, with nothing between them that would empty the caches.

    python bench/recorder_step.py                 # 4, 25 and 300 layers

A row is put back before each call, with one percent of noise, so that the triggers, which have learned from a hundred rows
before, find a healthy run. `bench/scaling.py` times the same call in a training loop, where the caches are cold.
"""

from __future__ import annotations

import sys
import tempfile
import time

import numpy as np
import torch
from torch import nn

import nobs
from nobs._row import FIRST_TAP_LINE

LEARNING, MEASURED = 130, 600
"""Calls before the first that counts, and those that count."""


def calls_us(layers: int, folder: str) -> np.ndarray:
    """Microseconds of each call, `[MEASURED]`, for a model of so many linear layers: six taps each."""
    torch.manual_seed(0)
    model = nobs.instrument(nn.Sequential(*[nn.Linear(16, 16) for _ in range(layers)]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = nobs.Recorder(model, optimizer=optimizer, directory=folder, on_failure="warn")
    loss = model(torch.randn(8, 16)).square().mean() + 1
    loss.backward()
    row, loss = recorder._ring.row, loss.detach()
    kept, draw = row.values.clone(), np.random.default_rng(0)
    sizes = np.exp(draw.normal(size=len(kept) - FIRST_TAP_LINE) / 2)
    kept[FIRST_TAP_LINE:, :2] = torch.from_numpy(np.stack([sizes, sizes / 3], 1))  # no gradient vanishes through the depth
    noise = torch.from_numpy(np.exp(draw.normal(size=(20, len(sizes), 1)) / 100)).float()
    taken = []
    for number in range(LEARNING + MEASURED):
        row.values.copy_(kept)
        row.values[FIRST_TAP_LINE:, :2] *= noise[number % len(noise)]
        recorder._update.note()  # as a backward does
        begin = time.perf_counter()
        recorder.step(loss)
        taken.append((time.perf_counter() - begin) * 1e6)
    return np.array(taken[LEARNING:])


def main() -> int:
    print("layers    taps   median     mean      p99   microseconds")
    with tempfile.TemporaryDirectory(prefix="nobs-bench-") as folder:
        for layers in (4, 25, 300):
            taken = calls_us(layers, folder)
            print(f"{layers:6}{6 * layers:8}{np.median(taken):9.0f}{taken.mean():9.0f}{np.percentile(taken, 99):9.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
