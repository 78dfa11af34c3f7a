"""One training loop: a workload, compiled or not, with a tool that watches it; and the ways to compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from overhead_workloads import Workload
from torch import Tensor, nn

KINDS = ("output", "output.grad", "parameter", "parameter.grad")
"""The tensors of a model that a tool may read."""


def owners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that own parameters: those that nobs records by itself."""
    return [(name, module) for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]


@dataclass(frozen=True)
class Job:
    """What a tool is given to attach itself to, before the model is compiled."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    folder: Path
    """Where it may write."""


@dataclass(frozen=True)
class Attached:
    """A tool that watches one model.

    Attributes:
        before_update: called with the loss behind `backward`, for a tool that reads gradients.
        after: called with the loss when the step is over.
        active: what holds while the loop's own steps run, for a tool that watches all models of the process.
        read: how many readings it took in the last step; 0 says that it saw nothing.
        kinds: which tensors it is to read at each step, of `KINDS`.
        held_bytes: the device memory that it says it holds; None where it says nothing.
        close: takes it off.
    """

    before_update: Callable[[Tensor], object] | None = None
    after: Callable[[Tensor], object] | None = None
    active: Callable[[], AbstractContextManager[object]] = nullcontext
    read: Callable[[], int] = lambda: 0
    kinds: Sequence[str] = ()
    held_bytes: int | None = None
    close: Callable[[], object] = lambda: None


def _eager(model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    return model


def _whole(model: nn.Module, blocks: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, dynamic=False)


def _by_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    for block in blocks:
        block.compile(dynamic=False)
    return model


def _with_graphs(model: nn.Module, blocks: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, dynamic=False, mode="reduce-overhead")


MODES: dict[str, Callable[[nn.Module, Sequence[nn.Module]], Callable[[Tensor], Tensor]]] = {
    "eager": _eager,
    "compiled": _whole,
    "blocks": _by_blocks,
    "graphs": _with_graphs,
}
"""Ways to run a model: as it is; compiled whole; its blocks compiled one by one; compiled whole with CUDA graphs.

`dynamic=False`, as shapes never change here: two loops of one process share Dynamo's memory, and it must not take what
differs between them for a size that varies.
"""


class Loop:
    """A training loop whose steps can be run one at a time.

    Args:
        workload: what is trained; the loop takes its model for itself.
        mode: one of `MODES`.
        attach: puts a tool in, before the model is compiled; None for a bare loop.
        folder: where the tool may write.

    Attributes:
        before_update, after: the calls of the tool in each step; a bench may put its own around them.
    """

    def __init__(self, workload: Workload, mode: str, attach: Callable[[Job], Attached] | None, folder: Path) -> None:
        model, self.workload = workload.model, workload
        self.optimizer = workload.optimizer(model)
        blocks = workload.blocks(model)  # first: a tool may put something in a layer's place
        self.tool = Attached() if attach is None else attach(Job(model, self.optimizer, workload.device, folder))
        self.before_update, self.after = self.tool.before_update, self.tool.after
        self._model = MODES[mode](model, blocks)
        self._mark = torch.compiler.cudagraph_mark_step_begin if mode == "graphs" else None
        self._number = 0

    def step(self) -> None:
        """One step of training, and of the tool."""
        if self._mark is not None:
            self._mark()
        loss = self.workload.loss(self._model, self.workload.batch(self._number))
        loss.backward()
        if self.before_update is not None:
            self.before_update(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.after is not None:
            self.after(loss)
        self._number += 1
