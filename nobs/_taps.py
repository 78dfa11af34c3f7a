"""The eyes: a tap on the output of a layer.

A tap folds the line of a tensor into a slot, and later that of its gradient into the next. The tensor stays the user's own:
nothing is put in its place, and its gradient is read by a hook on the node that made it. So a write to the tensor, or to
another name of its memory, reaches every gradient that it reaches without nobs.

In a graph the whole tap is one operator, which Dynamo takes as it is. AOTAutograd then finds the kernel in it (or the
arithmetic, where there is none), and, when it runs the backward to trace it, the hook: both become part of the graph, on every
torch from 2.7.
"""

from __future__ import annotations

import inspect
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental import proxy_tensor

from . import _kernels, _stats
from ._callers import tried_out
from ._local import local
from ._onlookers import no_training, no_training_eagerly, readable, unseen
from ._row import LiveRow


def tap_in_graph(layer: nn.Module, row: LiveRow, given: Any, output: Any) -> None:
    """Tap every tensor in the output of a layer, while Dynamo traces; `given` is what the layer was called with."""
    if not no_training():
        inputs = _tensors_in(given, [])
        for x in _tensors_in(output, []):
            _TAP(x, inputs, layer._nobs_output, layer._nobs_output_grad, row.clock)


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def tap_eagerly(layer: nn.Module, row: LiveRow, given: Any, output: Any) -> None:
    """The same outside of graphs."""
    if no_training_eagerly() or tried_out():
        return
    slot: Any = layer._nobs_output
    grad_slot: Any = layer._nobs_output_grad
    try:
        with torch._C.DisableTorchFunctionSubclass():  # a tensor type of the user's may answer as it likes
            for x in _tensors_in(output, []):
                part = local(x)
                if readable(part):
                    with unseen():
                        _kernels.fold(part, slot, row.clock)
                inputs = _tensors_in(given, []) if x._is_view() else []
                _on_gradient(x, inputs, partial(_fold_gradient_unseen, row, grad_slot))
    except Exception as error:
        row.give_up(error)


def _fold_gradient(row: LiveRow, slot: Tensor, gradient: Tensor) -> None:
    """Fold the line of a gradient into its slot. An error of nobs must never end a run: recording stops, and is said once."""
    if not row.recording:  # the backward of a recorded forward, but inside `paused()`
        return
    try:
        part = local(gradient)
        if readable(part) and _stats.measurable(part):  # it may be of another kind than its tensor
            with unseen():
                _kernels.fold(part, slot)
    except Exception as error:
        row.give_up(error)


_fold_gradient_unseen = torch._dynamo.disable(_fold_gradient)  # type: ignore[no-untyped-call]
"""As a hook; in a loop whose graph broke Dynamo would compile it as well."""


def _fold_in_graph(x: Tensor, given: list[Tensor], slot: Tensor, grad_slot: Tensor, clock: Tensor) -> None:
    """What the operator is made of. Called with tensors that stand for the user's: Dynamo's, then AOTAutograd's.

    Whoever runs Dynamo's graph as it is (`backend="eager"`) calls it in each step, and the hook is one on the user's tensor.
    """
    part = local(x)
    if isinstance(part, FakeTensor):
        return  # Dynamo's: it asks what comes out, which is nothing, and through it no gradient ever comes
    # The device's own count of taps gives the order of execution, under compile too. In place: one clock a model. Without
    # gradients, as a write to the user's own buffer would be: the graph has no more to return than without nobs.
    with torch.no_grad():
        _fold_traced(part, slot, clock)
    _save_unchecked(grad_slot)

    def fold(grad: Tensor) -> None:
        # No clock here: its count would not depend on the gradient, and the partitioner would move it into the forward.
        with torch.no_grad():
            _fold_traced(local(grad), grad_slot, None)

    _on_gradient(x, given, fold)


def _fold_traced(x: Tensor, slot: Tensor, clock: Tensor | None) -> None:
    """The kernel of the device, as one operator of the graph; where there is none, its arithmetic."""
    if _kernels.one_operator(x):
        _FOLD(x.detach(), slot, clock)
        return
    if clock is not None:
        clock.add_(1)
    _stats.fold(slot, _stats.measure_in_graph(x, 1 if clock is None else clock))


def _on_gradient(x: Tensor, given: list[Tensor], fold: Callable[[Tensor], None]) -> None:
    """Call `fold` with the gradient of a layer's output, if one comes: the sum over all that is made of it.

    On the node, and not on the tensor, whose hooks are lost where a view of it is written to.
    """

    def before(grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[place]
        if grad is not None:  # an operator behind the layer may give none, which is not one of zeros
            fold(grad)

    made = _made(x, given)
    node, place = made.grad_fn, made.output_nr
    if node is not None:
        node.register_prehook(before)
    elif x.requires_grad and isinstance(x, FunctionalTensor):
        x.register_hook(fold)  # type: ignore[no-untyped-call]  # what goes into a graph, made outside of it, and comes out again
    # Nor on the user's own leaf, a parameter that is its layer's output: there hooks would stay, one more each step.


def _made(x: Tensor, given: list[Tensor]) -> Tensor:
    """The tensor whose node sees the gradient: x, or what it shows all of in another shape (a linear layer's product).

    A write to a view gives it a new node, of which autograd calls no hook of the old one; to the node behind it the gradient
    comes either way, and with the same statistics. Not where that node made what the layer was given: to it comes the gradient
    of all its uses. (So the gradient of a view of the input, or of a part, that is then written to is not seen.)
    """
    base = x._base if x._is_view() else None
    if base is None or base.grad_fn is None or base.dtype != x.dtype or not _stats.surely(base.numel() == x.numel()):
        return x
    return x if any((g._base if g._is_view() else g) is base for g in given) or _through_users(x, base) else base


def _through_users(x: Tensor, base: Tensor) -> bool:
    """Whether a `Function` of the user's lies between a view and its base: its backward may give another gradient on."""
    node: Any = x.grad_fn
    while node is not None and node is not base.grad_fn:
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return False


def _save_unchecked(slot: Tensor) -> None:
    """Let several forwards run before their backwards: the graph keeps a slot, and the first backward writes to it.

    Backends that compile kernels write past the version counter; those that run aten's operators do not. Since 2.11 torch
    marks what a user's `autograd.Function` keeps on `ctx` so; before, such backends complain. Compiled autograd forgets to
    hand over what is marked.
    """
    if torch._dynamo.config.compiled_autograd:
        return
    for proxy in getattr(proxy_tensor, "_get_proxies", lambda _: ())(slot):
        proxy.node.meta["saved_tensor_with_no_vc_check"] = True


def _tensors_in(output: Any, found: list[Tensor]) -> list[Tensor]:
    """All tensors with a norm in tuples, lists, mappings and dataclasses, each once."""
    if isinstance(output, Tensor):
        # `in` would compare their values
        if _stats.measurable(output) and not any(output is before for before in found):
            found.append(output)
    else:
        for part in _parts(output):
            _tensors_in(part, found)
    return found


def _parts(output: Any) -> Iterable[Any]:
    if isinstance(output, (tuple, list)):
        return output
    if isinstance(output, Mapping):
        return output.values()
    # Of its type: a tracer's stand-in has any attribute. Dynamo of torch 2.7 cannot trace `dataclasses.is_dataclass`.
    return [getattr(output, name, None) for name in getattr(type(output), "__dataclass_fields__", ())]


def _fingerprint() -> str:
    """Of what the operator does. torch keeps compiled code on disk by the operator's name, and cannot look into it."""
    try:
        return (
            f"{zlib.crc32(''.join(inspect.getsource(part) for part in (sys.modules[__name__], _stats, _kernels)).encode()):08x}"
        )
    except OSError:  # no source beside the code
        return "0"


_NAME = f"tap_{_fingerprint()}"
_LIBRARY = torch.library.Library("nobs", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"{_NAME}(Tensor x, Tensor[] given, Tensor(a!) slot, Tensor(b!) grad_slot, Tensor(c!) clock) -> ()")  # type: ignore[no-untyped-call]
_LIBRARY.impl(_NAME, _fold_in_graph, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_TAP = getattr(torch.ops.nobs, _NAME).default

_LIBRARY.define("fold(Tensor x, Tensor(a!) slot, Tensor(b!)? clock) -> ()", tags=(torch.Tag.flexible_layout,))  # type: ignore[no-untyped-call]
_LIBRARY.impl("fold", _kernels.fold, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("nobs::fold", lambda x, slot, clock: None, lib=_LIBRARY)
_FOLD = torch.ops.nobs.fold.default
