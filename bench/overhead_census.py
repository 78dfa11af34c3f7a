"""What is counted in steps of its own: questions to the device, graphs and breaks, bytes; and the floor of a tap."""

from __future__ import annotations

import gc
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from overhead_loop import KINDS, Loop, owners
from overhead_measure import waiting
from overhead_workloads import Workload
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

ASKING = frozenset({"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::unique_dim"})
"""Operators that give the host a number or a size of the device's: with an accelerator each waits for it."""


@dataclass(frozen=True)
class Graphs:
    """What Dynamo made of the first steps of a loop.

    Attributes:
        graphs, breaks: how many; `reason`: of the most frequent break, its first line.
        skipped_cudagraphs: graphs that ran without CUDA graphs though these were asked for.
        cache: what the cache of AOTAutograd said: hits, misses, and graphs that bypassed it.
    """

    graphs: int
    breaks: int
    reason: str
    skipped_cudagraphs: int
    cache: dict[str, int]


def graphs_of(loop: Loop, steps: int = 3) -> Graphs:
    """Run the first steps, and count what was compiled."""
    counters.clear()
    with loop.tool.active():
        for _ in range(steps):
            loop.step()
    breaks = counters["graph_break"]
    reason = max(breaks, key=breaks.__getitem__).strip().splitlines()[0] if breaks else ""
    return Graphs(
        graphs=counters["stats"]["unique_graphs"],
        breaks=sum(breaks.values()),
        reason=reason,
        skipped_cudagraphs=counters["inductor"]["cudagraph_skips"],
        cache={name: n for name, n in counters["aot_autograd"].items() if name.startswith("autograd_cache")},
    )


# -- asking ------------------------------------------------------------------------------------------------------------


def asks_of(loop: Loop, steps: int = 1) -> float:
    """How often the host asks the device for something in a step: on CUDA how often it waits for it, as CUDA itself warns.

    On a CPU nothing waits; counted are operators of `ASKING`, `tolist`, `cpu` and `to("cpu")` on the thread that trains, which
    with an accelerator would. `numpy` is not, which takes only what is on the host.
    """
    count = _warned if loop.workload.device.type == "cuda" else _asked
    with loop.tool.active(), count() as number:
        for _ in range(steps):
            loop.step()
    return number() / steps


@contextmanager
def _warned() -> Iterator[Callable[[], int]]:
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(w.message) for w in caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _asked() -> Iterator[Callable[[], int]]:
    calls: list[str] = []

    def counting(name: str) -> Callable[..., object]:
        real = getattr(Tensor, name)

        def counted(self: Tensor, *args: object, **kwargs: object) -> object:
            if name != "to" or "cpu" in map(str, (*args, *kwargs.values())):
                calls.append(name)
            return real(self, *args, **kwargs)

        return counted

    with ExitStack() as stack, profile(activities=[ProfilerActivity.CPU]) as profiled:
        for name in ("tolist", "cpu", "to"):
            stack.enter_context(mock.patch.object(Tensor, name, counting(name)))
        yield lambda: len(calls) + sum(event.name in ASKING for event in profiled.events())


def step_call_waits(loop: Loop) -> str | None:
    """On CUDA: what was said when the tool's own call at the end of a step was forbidden to wait; None if nothing was.

    A tool may catch the error that it gets, and warn.
    """
    after = loop.after
    if after is None or loop.workload.device.type != "cuda":
        return None

    def strict(loss: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            after(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with warnings.catch_warnings(record=True) as caught, mock.patch.object(loop, "after", strict), loop.tool.active():
        warnings.simplefilter("always")
        try:
            loop.step()
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return next((str(w.message).splitlines()[0] for w in caught if "synchronizing" in str(w.message)), None)


# -- memory ------------------------------------------------------------------------------------------------------------


def held_bytes(device: torch.device) -> int:
    """What lives now: on CUDA as its allocator counts, on a CPU the storages of all tensors that Python can reach."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and _has_memory(o)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _has_memory(tensor: Tensor) -> bool:
    """Whether it is a tensor with memory of the host's, and none that a compiler has only thought of."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False


def peak_bytes(loop: Loop) -> int:
    """The most that a step holds above what was held before it, as the allocator counts."""
    with loop.tool.active():
        if loop.workload.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loop.step()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            loop.step()
    memory = sorted((e.start_ns(), e.nbytes()) for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]")
    return int(np.cumsum([0] + [n for _, n in memory]).max())


# -- the floor ---------------------------------------------------------------------------------------------------------


def reads_of(workload: Workload, repeats: int = 7) -> dict[str, tuple[int, float]]:
    """One read of each tensor that could be tapped (`torch.sum`), in the order of a step: how many, and microseconds, by kind."""
    tensors = _tensors_of(workload)
    wait = waiting(workload.device)
    return {kind: (len(tensors[kind]), min(_read_us(tensors[kind], wait) for _ in range(repeats))) for kind in KINDS}


def _read_us(tensors: list[Tensor], wait: Callable[[], object]) -> float:
    wait()
    begin = time.perf_counter()
    for tensor in tensors:
        torch.sum(tensor)
    wait()
    return (time.perf_counter() - begin) * 1e6


def _tensors_of(workload: Workload) -> dict[str, list[Tensor]]:
    kept: dict[str, list[Tensor]] = defaultdict(list)

    def keep(module: nn.Module, args: object, output: object) -> None:
        output = output[0] if isinstance(output, tuple) else output
        kept["output"].append(output.detach())
        output.register_hook(lambda gradient: kept["output.grad"].append(gradient.detach()))

    handles = [module.register_forward_hook(keep) for _, module in owners(workload.model)]
    workload.loss(workload.model, workload.batch(0)).backward()
    for handle in handles:
        handle.remove()
    parameters = list(workload.model.parameters())
    return {**kept, "parameter": [p.detach() for p in parameters], "parameter.grad": [p.grad for p in parameters]}
