"""One parameter that is watched: where it is, and what the running step has read of it; and a backward that reaches some."""

from __future__ import annotations

import weakref
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle


class Watched:
    """A parameter, found by its layer and name and held weakly: the model is free to die, and to replace it.

    Attributes:
        line: of its value in the row; its gradient's is the next.
        blanks: since which blanking of the row the last gradient was read.
        gone: its gradient was once gone at the end of a backward, where it is read otherwise: an optimizer in the backward.
        version: how often the parameter had been written to at that reading.
        used: an optimizer has said that it used that reading.
        told: there is an optimizer that says so.
        floor: what the step's updates so far have used; None before the first.
        valued: since which blanking of the row the value was read.
    """

    __slots__ = ("blanks", "floor", "gone", "handle", "layer", "line", "name", "told", "used", "valued", "version")

    def __init__(self, layer: nn.Module, name: str, line: int) -> None:
        self.layer, self.name, self.line = weakref.ref(layer), name, line
        self.handle: RemovableHandle | None = None
        self.blanks = self.valued = -1
        self.version = 0
        self.floor: Tensor | None = None
        self.used = self.told = self.gone = False

    def held(self) -> Tensor | None:
        """The parameter that the layer has by this name now."""
        layer = self.layer()
        return None if layer is None else layer._parameters.get(self.name)

    def now(self) -> Tensor | None:
        """The same, if it has memory: a lazy one has none until its layer has run."""
        layer = self.layer()
        parameter = None if layer is None else layer._parameters.get(self.name)
        return None if parameter is None or is_lazy(parameter) else parameter

    def updated(self, parameter: Tensor) -> bool:
        """Whether an update has used the last reading."""
        return self.used or (not self.told and version_of(parameter) != self.version)


Mark: TypeAlias = "tuple[int, int, int]"


def mark_of(parameter: Tensor | None) -> Mark:
    """What tells whether the gradient of a parameter was written to."""
    gradient = None if parameter is None else parameter.grad
    return id(parameter), id(gradient), 0 if gradient is None else version_of(gradient)


def written_between(before: Mark, after: Mark) -> bool:
    """Whether it was, of two marks of one parameter."""
    return before != after and before[0] == after[0]


class Backward(NamedTuple):
    """A backward that runs: since which blanking of the row, the parameters that received a gradient in it, by the id of their
    `Watched`, and marks of all gradients when it began (none where no other rank could change one)."""

    blanks: int
    reached: dict[int, Tensor]
    before: list[Mark]


def forget_ended(running: dict[int, Backward], blanks: int) -> None:
    """Drop what backwards of earlier steps, ended by an error, have left behind."""
    if len(running) >= 8:
        for task, backward in list(running.items()):  # a copy, and in place: other threads put theirs in
            if backward.blanks != blanks:
                running.pop(task, None)


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version
