"""The eyes: a tap on the output of a layer.

A tap folds the line of a tensor into a slot, and later that of its gradient into the next: by an identity `autograd.Function`,
one for Dynamo to trace and one for everywhere else, or by a hook, where a tensor must stay the user's own. The traps that they
walk around are listed where they do.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils.hooks import unserializable_hook

from . import _stats
from ._row import LiveRow


class Tap(torch.autograd.Function):
    """Identity, inside a graph. Folds the line of `x` into `slot`, and later that of its gradient into `grad_slot`."""

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
        _stats.fold(ctx.grad_slot, _stats.measure(grad))
        return grad, None, None, None


_FOLDING = threading.Lock()
"""A fold reads and writes: of two threads that run one model, neither may overwrite what the other has just folded in."""


@torch._dynamo.disable  # type: ignore[untyped-decorator]  # in a loop whose graph broke Dynamo would compile this as well
def _fold_now(row: LiveRow, x: Tensor, slot: Tensor, clock: Tensor | None = None) -> None:
    """Fold the line of a tensor into a slot. An error of nobs must never end a run: recording stops, and is said once."""
    try:
        if not _stats.measurable(x):
            return
        if clock is not None:
            with _FOLDING:
                clock = clock.add_(1).clone()
        measured = _stats.measure(x, clock)
        with _FOLDING:
            _stats.fold(slot, measured)
    except Exception as error:
        row.give_up(error)


def tap_in_graph(layer: nn.Module, row: LiveRow, output: Any) -> Any:
    """The output of a layer with every tensor put through its tap, while Dynamo traces; anything else passes as it is."""

    def tap(x: Tensor) -> Tensor:
        slots = layer._nobs_output, layer._nobs_output_grad
        return Tap.apply(x, *slots, row.clock) if _stats.measurable(x) else x  # type: ignore[no-untyped-call]

    return output if _no_training() else _map_tensors(tap, output)


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def tap_eagerly(layer: nn.Module, row: LiveRow, output: Any, given: tuple[Any, ...]) -> Any:
    """The same outside of graphs. Where a tensor must stay the user's own, a hook on it sees its gradient.

    Through the tap goes the gradient of what is given away; a hook sees that of the tensor, and with it of what the layer has
    made of it itself.
    """
    if torch.autograd.forward_ad._current_level >= 0 or _no_training():  # dual numbers are no readings either
        return output
    slot: Any = layer._nobs_output
    grad_slot: Any = layer._nobs_output_grad
    found = list(_tensors_in(output))
    tensors, fixed = {id(x): x for x, _ in found}, {id(x) for x, stays in found if stays}
    replaced = {}
    try:
        for name, x in tensors.items():
            if isinstance(x, FakeTensor) or not _stats.measurable(x):  # a fake one has a shape and no values
                continue
            _fold_now(row, x, slot, row.clock)
            # Not on a leaf, a parameter that is its layer's output: there hooks would stay, one more each step.
            if not x.requires_grad or x.is_leaf:
                continue
            fold = unserializable_hook(partial(_fold_gradient, row, grad_slot))  # type: ignore[no-untyped-call]  # no warning then
            if name not in fixed and not _has_second_name(x, layer, tensors.values(), given):
                replaced[name] = Identity.apply(x, fold)  # type: ignore[no-untyped-call]
                vars(replaced[name]).update(vars(x))  # what the user has written on it
            else:
                x.register_hook(fold)  # type: ignore[no-untyped-call]
        if replaced:
            return _rebuilt(lambda x: replaced.get(id(x), x), output, _stays)
    except Exception as error:
        row.give_up(error)
    return output


def _has_second_name(x: Any, layer: nn.Module, together: Iterable[Tensor], given: tuple[Any, ...]) -> bool:
    """Whether somebody else knows the tensor: a write to what stands in for it would not reach the gradient there."""
    root = _root(x)
    shared = any(other is not x and _root(other) is root for other in together)
    return shared or any(other is x for other in (*vars(layer).values(), *given)) or not torch.is_grad_enabled()


def _root(x: Any) -> Any:
    return x._base if x._is_view() else x


class Identity(torch.autograd.Function):
    """Stands in for a tensor, with its memory, and folds its gradient. A hook would be lost where a view is written to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fold: Callable[[Tensor | None], None]) -> Tensor:
        ctx.fold = fold
        ctx.set_materialize_grads(False)  # a gradient that does not exist must not come out as one of zeros
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        ctx.fold(grad)
        return grad, None


def _fold_gradient(row: LiveRow, slot: Tensor, grad: Tensor | None) -> None:
    if grad is not None:  # an operator behind the layer may give none, which is not one of zeros
        _fold_now(row, grad, slot)


def _tensors_in(output: Any, fixed: bool = False) -> Iterator[tuple[Tensor, bool]]:
    """All tensors in tuples, lists, mappings and dataclasses, and whether one is in a container that stays as it is.

    A list or dict may be the user's cache, handed on from layer to layer: it must stay the same object.
    """
    if isinstance(output, Tensor):
        yield output, fixed
        return
    fixed = fixed or _stays(output)
    for part in _parts(output):
        yield from _tensors_in(part, fixed)


def _parts(output: Any) -> Iterable[Any]:
    if isinstance(output, (tuple, list)):
        return output
    if isinstance(output, Mapping):
        return output.values()
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    return ()


def _stays(container: Any) -> bool:
    """Whether a container is kept as it is outside of graphs."""
    frozen = isinstance(container, Mapping) and not isinstance(container, MutableMapping)
    return frozen or _is_strange(container) or type(container) in (list, dict, OrderedDict)


def _is_strange(container: Any) -> bool:
    """A tuple or list of the user's own type: nobody knows how to make another."""
    known = (
        type(container) in (tuple, list) or hasattr(container, "_fields") or type(container).__module__ == "torch.return_types"
    )
    return isinstance(container, (tuple, list)) and not known


def _no_training() -> bool:
    """Whether the tensors are no readings of anything: under vmap and func.grad, and where a model is exported or traced."""
    # By type: while Dynamo traces, the interpreter that is not there is not None. The flag, and not is_exporting(), which is
    # always true to the Dynamo of torch 2.7.
    transformed = isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return transformed or torch.compiler._is_exporting_flag or tracing


def _map_tensors(tap: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Rebuild tuples, lists, mappings and dataclasses around the tapped tensors, each of its own type."""
    if isinstance(output, Tensor):
        return tap(output)
    tapped: list[tuple[Tensor, Tensor]] = []

    def once(x: Tensor) -> Tensor:
        """A tensor that is in the output twice is tapped once, and stays one tensor."""
        for before, after in tapped:
            if x is before:
                return after
        tapped.append((x, tap(x)))
        return tapped[-1][1]

    return _rebuilt(once, output, _is_strange)


def _rebuilt(tap: Callable[[Tensor], Tensor], output: Any, stays: Callable[[Any], bool]) -> Any:
    if isinstance(output, Tensor):
        return tap(output)
    if stays(output):
        return output
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_rebuilt(tap, part, stays) for part in output))
    if isinstance(output, (tuple, list)):
        return type(output)(_rebuilt(tap, part, stays) for part in output)
    if type(output) is dict:
        return {key: _rebuilt(tap, part, stays) for key, part in output.items()}
    if isinstance(output, MutableMapping):
        rebuilt = copy.copy(output)
        for key, part in output.items():
            rebuilt[key] = _rebuilt(tap, part, stays)
        return rebuilt
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        changed = copy.copy(output)
        for field in dataclasses.fields(output):  # past a frozen __setattr__ and __init__: only the tensors change
            object.__setattr__(changed, field.name, _rebuilt(tap, getattr(output, field.name), stays))
        return changed
    return output
