"""The kernels for tensors on a CUDA device, in Triton, which torch brings along there.

A tensor is read by up to `_PROGRAMS` programs. Each leaves six partial sums in a scratch; the one that is done last adds
them up and folds the line, so that a tap is one launch. Parameters and their gradients are read all together, by two.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._stats import code_of
from ._reading import Reading, in_memory_order

_PROGRAMS = 256
"""Programs that share one tensor at the most; a power of two."""

_BLOCK = 8192
_WARPS = 8
_CHUNK = 8 * _BLOCK
"""Elements of a parameter that one program reads."""

_FINISH = 128
"""Chunks that are added up at a time."""

_PARTIAL = 6
"""Numbers that a program leaves, float64: squares, largest, nan, posinf, neginf, zeros."""

_READ = {dtype: code_of(dtype) / 16 for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex32)}
"""What is read as float32 without loss, and its code; float64 is left to `_stats`."""


@functools.cache
def library() -> Any:
    """The kernels; None where there is no Triton."""
    try:
        from . import _triton
    except ImportError:
        return None
    return _triton


def reads(dtype: torch.dtype) -> bool:
    """Whether the kernels read tensors of this dtype."""
    return dtype in _READ


@functools.cache
def _scratch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the programs of one launch leave their sums, and the count of those that are done: one a device, for good.

    Made before the first graph is captured: what is allocated inside belongs to the graph. Two streams that run taps at the
    same time would mix them up; a model's forward and backward run on one.
    """
    with torch.inference_mode(False):
        sums = torch.zeros(_PARTIAL, _PROGRAMS, dtype=torch.float64, device=device)
        return sums, torch.zeros(1, dtype=torch.int32, device=device)


def prepare(device: torch.device) -> None:
    """Take the scratch now: not inside the capture of a graph."""
    if library() is not None:
        _scratch(device)


def fold(x: Tensor, line: Tensor, clock: Tensor | None) -> bool:
    """Fold a tensor into a line, and advance the clock by one, if there is one; whether that could be done. One launch."""
    kernels = library()
    code = _READ.get(x.dtype)
    if kernels is None or code is None:
        return False
    x = in_memory_order(x)
    count = x.numel()
    sums, done = _scratch(x.device)
    programs = max(1, min(_PROGRAMS, -(-count // _BLOCK)))
    most = 1 if programs == 1 else _PROGRAMS
    ticks = clock is not None
    given = (x, count, line, line if clock is None else clock, sums, done, code, ticks, _BLOCK, most)
    _launch(kernels.fold, programs, (x.dtype, x.data_ptr() % 16 == 0, count < 1 << 31, ticks, most), given)
    return True


_compiled: dict[Any, Any] = {}


def _launch(kernel: Any, programs: int, kind: tuple[Any, ...], args: tuple[Any, ...]) -> None:
    """Launch a kernel; from the second launch of a kind on past Triton's own look at each argument, which takes 15 us."""
    device = args[0].device
    if device.index != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            _launch(kernel, programs, kind, args)
            return
    kind = (kernel, device.index, kind)
    compiled = _compiled.get(kind)
    if compiled is None:
        _compiled[kind] = kernel[(programs,)](*args, num_warps=_WARPS)
    else:
        compiled[(programs, 1, 1)](*args)


def fold_all(row: Tensor, readings: Sequence[Reading]) -> bool:
    """The same for many tensors, each into its line of the row: two launches for each dtype."""
    kernels = library()
    dtypes = [reading[0].dtype for reading in readings]
    there = all(reading[0].device == row.device for reading in readings)
    if kernels is None or not there or not all(map(_READ.__contains__, dtypes)):
        return False
    for dtype in dict.fromkeys(dtypes):
        _fold_alike(kernels, row, dtype, [reading for reading in readings if reading[0].dtype == dtype])
    return True


def _fold_alike(kernels: Any, row: Tensor, dtype: torch.dtype, readings: list[Reading]) -> None:
    given, lines, firsts, fresh = zip(*readings, strict=True)
    tensors = list(map(in_memory_order, given))
    plan = _plan(tuple(x.numel() for x in tensors), lines, firsts, fresh, row.device)
    places = _sent([x.data_ptr() for x in tensors], row.device)
    sums, room = plan.sums, plan.sums.shape[1]
    if plan.chunks:
        given_chunks = (places, plan.counts, plan.of_chunk, plan.begins, sums, room, tensors[0], _CHUNK, _BLOCK)
        _launch(kernels.read_all, plan.chunks, (tensors[0].dtype,), given_chunks)
    given_lines = (row, plan.counts, plan.begins, sums, room, plan.lines, plan.firsts, plan.fresh, _READ[dtype], _FINISH)
    _launch(kernels.fold_all, len(tensors), (), given_lines)


class _Plan(NamedTuple):
    """Which program reads what, on the device: the same each step, as a rule."""

    chunks: int
    of_chunk: Tensor
    begins: Tensor
    counts: Tensor
    lines: Tensor
    firsts: Tensor
    fresh: Tensor
    sums: Tensor


@functools.lru_cache(maxsize=16)
def _plan(
    counts: tuple[int, ...], lines: tuple[int, ...], firsts: tuple[int, ...], fresh: tuple[bool, ...], device: torch.device
) -> _Plan:
    """Of each chunk its tensor; of each tensor its first chunk (and behind the last, their number); and room for their sums."""
    each = [-(-count // _CHUNK) for count in counts]
    begins = list(itertools.accumulate(each, initial=0))
    of_chunk = [tensor for tensor, chunks in enumerate(each) for _ in range(chunks)]

    def there(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)  # waits, in the first step only

    return _Plan(
        begins[-1],
        there(of_chunk, torch.int32),
        there(begins, torch.int32),
        there(counts, torch.int64),
        there(lines, torch.int32),
        there(firsts, torch.float32),
        there(fresh, torch.int32),
        torch.empty(_PARTIAL, -(-max(1, begins[-1]) // 16) * 16, dtype=torch.float64, device=device),
    )


_captured: list[Tensor] = []
"""Tables of addresses that a captured graph copies anew each time it is replayed."""


def _sent(addresses: list[int], device: torch.device) -> Tensor:
    """The addresses on the device, sent without waiting."""
    host = torch.tensor(addresses, dtype=torch.int64, pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return host.to(device, non_blocking=True)
