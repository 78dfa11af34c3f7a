"""The eyes: a tap on the output of a layer, and the subclass that puts it there.

A tap is an identity `autograd.Function`: forward folds the tensor's line into a slot, backward does the same for the
gradient. It is injected by giving the layer a subclass of its own type, one per type and not per layer, so that identical
layers share one compiled graph. There is no module hook, no parameter or buffer is added, and the traps that this design
walks around are listed where it does.
"""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import functools
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _stats
from ._row import LiveRow

PREFIX = "_nobs_"


class Tap(torch.autograd.Function):
    """Identity. Folds the line of `x` into `slot`, and later that of its gradient into `grad_slot`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, grad_slot: Tensor, clock: Tensor) -> Tensor:
        # On ctx, not by save_for_backward: the slot is written before backward runs, and a saved tensor must not be.
        ctx.grad_slot = grad_slot
        # The device's own count of taps gives the order of execution, under compile too. In place: one clock a model.
        clock.add_(1)
        _stats.fold(slot, _stats.measure(x, clock))
        # Neither x nor a view of it: an in-place activation behind the layer must stay legal.
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # No clock here: its count would not depend on the gradient, and the partitioner would move it into the forward.
        # Dynamo forbids asking a gradient for its layout; the gradients of a compiled graph are strided anyway.
        if torch.compiler.is_compiling() or _stats.measurable(grad):
            _stats.fold(ctx.grad_slot, _stats.measure(grad))
        return grad, None, None, None


def tap_outputs(layer: nn.Module, row: LiveRow, output: Any) -> Any:
    """Put every tensor of a layer's output through its tap; anything else passes as it is."""
    tap = functools.partial(_tap_tensor, layer, row)
    if torch.compiler.is_compiling():
        return _map_tensors(tap, output)
    # functorch (vmap, func.grad) and forward AD hand out tensors that are no readings of anything: left alone.
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return output
    try:
        return _map_tensors(tap, output)
    except Exception as error:  # nobs must never end a run: stop recording, and let the recorder say so once
        row.give_up(error)
        return output


def _tap_tensor(layer: nn.Module, row: LiveRow, x: Tensor) -> Tensor:
    if not _stats.measurable(x):
        return x
    return Tap.apply(x, layer._nobs_output, layer._nobs_output_grad, row.clock)  # type: ignore[no-any-return,no-untyped-call]


def _map_tensors(tap: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Rebuild tuples, lists, mappings and dataclasses around the tapped tensors, each of its own type."""
    if isinstance(output, Tensor):
        return tap(output)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_map_tensors(tap, part) for part in output))
    if isinstance(output, (tuple, list)):
        return type(output)(_map_tensors(tap, part) for part in output)
    if type(output) is dict:
        return {key: _map_tensors(tap, part) for key, part in output.items()}
    if isinstance(output, MutableMapping):
        rebuilt = copy.copy(output)
        for key, part in output.items():
            rebuilt[key] = _map_tensors(tap, part)
        return rebuilt
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        changed = copy.copy(output)
        for field in dataclasses.fields(output):  # past a frozen __setattr__ and __init__: only the tensors change
            object.__setattr__(changed, field.name, _map_tensors(tap, getattr(output, field.name)))
        return changed
    return output


def tapped_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer type that taps its output; the same one for every layer of the type."""
    for subclass in plain.__subclasses__():
        if subclass.__dict__.get("_nobs_plain") is plain:
            return subclass

    class Tapped(plain):  # type: ignore[misc,valid-type]
        _nobs_plain = plain
        _nobs_row: LiveRow | None = None  # a layer that the user made with `type(self)(...)` has no slots, and no tap

        @functools.wraps(plain.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = plain.forward(self, *args, **kwargs)
            row = self._nobs_row
            # Evaluation leaves no trace; a frozen tower, without grad but in training, does.
            if row is not None and row.recording and (self.training or torch.is_grad_enabled()):
                return tap_outputs(self, row, output)
            return output

        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
            """`.to()`, `.cuda()`, `.to_empty()`: the slots follow to the device, and stay float32 under `.half()`."""
            super()._apply(fn, recurse)
            row = self._nobs_row
            if row is not None:
                device = fn(torch.zeros((), device=row.values.device)).device
                if device != row.values.device:
                    row.move(device)
                bind(self, row, self._nobs_tap)
                if row.rehook is not None:
                    row.rehook()  # some moves replace the parameters: from meta, say
            return self

        def __reduce_ex__(self, protocol: Any) -> Any:
            """Pickles, `torch.save` and `deepcopy` get the plain layer: a copy neither writes here nor needs nobs."""
            make, args, *rest = super().__reduce_ex__(protocol)
            # pickle insists that the argument of __newobj__ is the object's very class
            if getattr(make, "__name__", "") == "__newobj__" and len(args) == 1:
                make, args = copyreg._reconstructor, (plain, object, None)  # type: ignore[attr-defined]
            args = tuple(plain if arg is Tapped else arg for arg in args)
            if rest and isinstance(rest[0], dict):
                rest[0] = {key: value for key, value in rest[0].items() if not key.startswith(PREFIX)}
            return (make, args, *rest)

    Tapped.__name__, Tapped.__qualname__, Tapped.__module__ = plain.__name__, plain.__qualname__, plain.__module__
    Tapped.__doc__ = plain.__doc__
    return Tapped


def bind(layer: nn.Module, row: LiveRow, tap: int | None) -> None:
    """Give a layer the slots of its output (line `tap`; None: it has none) and of the output's gradient (the next line).

    Plain attributes, and not buffers: invisible to state_dict, DDP, FSDP and optimizers, and taken as static memory by
    CUDA graphs because they are reached through a module.
    """
    layer._nobs_row, layer._nobs_tap = row, tap  # type: ignore[assignment]
    if tap is not None:
        layer._nobs_output, layer._nobs_output_grad = row.slot(tap), row.slot(tap + 1)


def unbind(layer: nn.Module) -> None:
    """Give the layer its plain class back and take every attribute of nobs away."""
    layer.__class__ = layer._nobs_plain  # type: ignore[assignment]
    for key in [key for key in vars(layer) if key.startswith(PREFIX)]:
        delattr(layer, key)
