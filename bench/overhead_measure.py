"""Two loops against each other: steps in turn, and the medians of their paired ratios."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from overhead_loop import Loop

FEWEST = 5
"""Pairs that are measured however long they take."""


@dataclass(frozen=True)
class Cost:
    """What a tool costs a step, next to the same steps without it.

    Attributes:
        ratio: observed over bare, the median of all pairs; `quartiles` theirs.
        ratio_of_sums: all observed steps over all bare ones: with what comes only now and then, and with the noise.
        bare_ms, observed_ms: medians of a step.
        extra_ms: the median of what a pair differs by.
        pairs: how many; each is of `steps` steps.
        rounds: the median ratio of each round, in which both models were made anew: how much is luck of the memory they got.
    """

    ratio: float
    quartiles: tuple[float, float]
    ratio_of_sums: float
    bare_ms: float
    observed_ms: float
    extra_ms: float
    pairs: int
    steps: int
    rounds: tuple[float, ...]


BLOCK = 20
"""Steps of a block."""


def compare(bare: Loop, observed: Loop, pairs: int, seconds: float, period: int = 1) -> np.ndarray:
    """Single steps in turn, seconds a step `[pairs, 2]`; a pair is `period` of each, for what happens every so many steps."""
    taken = _in_turn(bare, observed, 1, pairs * period, seconds, FEWEST * period)
    whole = len(taken) // period * period
    return taken[:whole].reshape(-1, period, 2).mean(1)


def compare_blocks(bare: Loop, observed: Loop, pairs: int, seconds: float) -> np.ndarray:
    """Blocks of steps in turn, with no waiting inside a block: how fast they go where the host runs ahead of the device."""
    return _in_turn(bare, observed, BLOCK, pairs, seconds, FEWEST)


def _in_turn(bare: Loop, observed: Loop, steps: int, pairs: int, seconds: float, fewest: int) -> np.ndarray:
    """Seconds a step, `[pairs, 2]`; which of the two goes first changes from pair to pair."""
    taken: list[list[float]] = []
    until = time.perf_counter() + seconds
    while len(taken) < pairs and (len(taken) < fewest or time.perf_counter() < until):
        pair = [0.0, 0.0]
        for which in (0, 1) if len(taken) % 2 else (1, 0):
            pair[which] = time_s((bare, observed)[which], steps)
        taken.append(pair)
    return np.array(taken)


def time_s(loop: Loop, steps: int = 1) -> float:
    """Seconds a step, over so many steps; the device has finished before and after."""
    with loop.tool.active():
        wait = waiting(loop.workload.device)
        wait()
        begin = time.perf_counter()
        for _ in range(steps):
            loop.step()
        wait()
        return (time.perf_counter() - begin) / steps


def waiting(device: torch.device) -> Callable[[], object]:
    """What waits for a device."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def warm_up(loops: tuple[Loop, Loop], steps: int, seconds: float) -> None:
    """So many steps of each, fewer where they are slow: compiled, with their memory, the triggers past their learning."""
    until = float("inf")
    for number in range(steps):
        for loop in loops:
            time_s(loop)
        if number == 0:
            until = time.perf_counter() + seconds  # what compiling takes is no part of it
        if number + 1 >= FEWEST and time.perf_counter() > until:
            return


def cost_of(rounds: list[np.ndarray], steps: int) -> Cost:
    """What a tool costs, from the pairs of some rounds, each `[pairs, 2]` seconds a step; a pair is of `steps` steps."""
    taken = np.concatenate(rounds)
    ratios = taken[:, 1] / taken[:, 0]
    low, median, high = np.percentile(ratios, [25, 50, 75]).tolist()
    bare, observed = taken.sum(0)
    return Cost(
        ratio=median,
        quartiles=(low, high),
        ratio_of_sums=float(observed / bare),
        bare_ms=float(np.median(taken[:, 0]) * 1e3),
        observed_ms=float(np.median(taken[:, 1]) * 1e3),
        extra_ms=float(np.median(taken[:, 1] - taken[:, 0]) * 1e3),
        pairs=len(taken),
        steps=steps,
        rounds=tuple(float(np.median(one[:, 1] / one[:, 0])) for one in rounds),
    )
