"""One read of a tensor, folded into its line: the fastest way there is on its device.

    _cpu.py, _cpu.cpp    a C++ kernel, compiled when the first model is instrumented
    _cuda.py             Triton kernels
    _stats (below)       torch's operations: what the kernels are tested against, and what other devices use

In a compiled graph a kernel is one operator: the graph is hardly larger than without nobs, nor slower to compile, and in
eager and in compiled code the same kernel reads the same memory.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _stats
from . import _cpu, _cuda
from ._reading import Reading as Reading
from ._reading import measurable_part as measurable_part

_KERNELS = {"cpu": _cpu, "cuda": _cuda}

_FOLDING = threading.Lock()
"""Without a kernel a fold reads, and then writes: of two threads that run one model, neither may overwrite the other's."""


def prepare(device: torch.device) -> None:
    """Make ready what would else be made in the first step, maybe inside of a graph."""
    if device.type in _KERNELS:
        _KERNELS[device.type].prepare(device)


def one_operator(x: Tensor) -> bool:
    """Whether a kernel is to read such a tensor as one operator of a graph.

    Not complex ones, which Inductor takes in no operator that writes. Nor half images on a CPU: what an operator reads is
    written to memory, maybe in another order than what is beside it, and where Inductor (of torch 2.13) then transposes half
    values its code reads what was never written: a bfloat16 ResNet had NaN in its gradients.
    """
    kernel = _KERNELS.get(x.device.type)
    if kernel is None or x.is_complex() or (x.device.type == "cpu" and x.dtype.itemsize == 2 and x.dim() > 3):
        return False
    return kernel.library() is not None and kernel.reads(x.dtype)


def fold(x: Tensor, line: Tensor, clock: Tensor | None = None) -> None:
    """Fold a tensor's statistics into a line of the row, in place; with a clock, which advances, its place in the order too.

    Args:
        x: any tensor that is `measurable`, with values of its own.
        line: `[8]` float32 on the same device.
        clock: `[1]` float32 on the same device.

    Cost: one read of `x`. Waits for nothing.
    """
    if x.is_cpu and line.is_cpu:
        done = _cpu.fold(x, line, clock)
    else:
        done = x.is_cuda and x.device == line.device and _cuda.fold(x, line, clock)
    if done:
        return
    with _FOLDING, torch.no_grad():
        if clock is not None:
            clock = clock.add_(1).clone()
        _stats.fold(line, _stats.measure(x, 1 if clock is None else clock))


def fold_all(row: Tensor, readings: Sequence[Reading]) -> None:
    """The same for many tensors at once, each into its line of the row, `[lines, 8]` float32."""
    if not readings:
        return
    kernel = _KERNELS.get(row.device.type)
    if kernel is not None and kernel.fold_all(row, readings):
        return
    with _FOLDING, torch.no_grad():
        for tensor, line, first, fresh in readings:
            measured = _stats.measure(tensor, first)
            row[line].copy_(measured if fresh else torch.maximum(row[line], measured))
