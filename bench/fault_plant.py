"""How a fault gets into a running training: what it may change of a step, and the layer that it is planted in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Moment:
    """A step that is about to run, for a fault to change.

    `since` counts from the step of the fault; `layer` is the layer that it is planted in; `loss` alters what is reported
    and differentiated, `weight_of_loss` only the gradients.
    """

    since: int
    layer: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: dict[str, Tensor]
    targets: Tensor
    generator: torch.Generator
    loss: Callable[[Tensor], Tensor] = field(default=lambda loss: loss)
    weight_of_loss: float = 1.0

    @property
    def weight(self) -> Tensor:
        """The layer's first parameter: a weight, for each layer here."""
        return next(self.layer.parameters())

    def knob(self, place: int, value: float) -> None:
        vars(self.layer)["knobs"][place] = value


GAIN, ADD, GRAD_GAIN, GRAD_ADD = range(4)


class Plant(torch.autograd.Function):
    """y * gain + add forward, grad * gain + add backward, the numbers in one tensor `[4]`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, knobs: Tensor) -> Tensor:
        ctx.save_for_backward(knobs.clone())
        return y * knobs[GAIN] + knobs[ADD]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (knobs,) = ctx.saved_tensors
        return grad * knobs[GAIN] * knobs[GRAD_GAIN] + knobs[GRAD_ADD], None


def plant(layer: nn.Module) -> None:
    """Make a layer one that faults can act in. Its output (of an LSTM, the sequence) goes through its knobs and twist."""
    kind = type(layer)

    def forward(self: nn.Module, *args: Any) -> Any:
        out = kind.forward(self, *args)
        if isinstance(self, nn.LSTMCell):
            return changed(self, out[0]), changed(self, out[1])
        return (changed(self, out[0]), *out[1:]) if isinstance(out, tuple) else changed(self, out)

    def changed(self: nn.Module, y: Tensor) -> Tensor:
        y = Plant.apply(y, vars(self)["knobs"])
        return y if vars(self)["twist"] is None else vars(self)["twist"](y)

    layer.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    vars(layer)["knobs"], vars(layer)["twist"] = torch.tensor([1.0, 0.0, 1.0, 0.0]), None


def reset(layer: nn.Module) -> None:
    """The layer as it was."""
    vars(layer)["knobs"].copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]))
    vars(layer)["twist"] = None
