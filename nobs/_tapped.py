"""How a tap comes behind a layer: by a subclass of the layer's own type, given to it in place.

One per type and not per layer, so that identical layers share one compiled graph. There is no module hook, and no parameter
or buffer is added.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ._row import LiveRow
from ._taps import tap_eagerly, tap_in_graph

PREFIX = "_nobs_"


def tapped_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer type that taps its output; the same one for every layer of the type."""
    if "_nobs_plain" in vars(plain):  # of a copy, which kept the class but has no row
        return plain
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
                # Branched here and not a call further: frames of torch's layers are left alone, those of ours are compiled.
                if torch.compiler.is_compiling():
                    tap_in_graph(self, row, (args, kwargs), output)
                else:
                    tap_eagerly(self, row, (args, kwargs), output)
            return output

        def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
            """`.to()`, `.cuda()`, `.to_empty()`: the slots follow to the device, and stay float32 under `.half()`."""
            super()._apply(fn, *args, **kwargs)
            row = self._nobs_row
            if row is not None:
                device = fn(torch.zeros((), device=row.values.device)).device
                if device != row.values.device:
                    row.move(device)
                row.bind(self, self._nobs_tap)
                if row.watch is not None:
                    row.watch.hook()  # some moves replace the parameters: from meta, say
            return self

        def __reduce_ex__(self, protocol: Any) -> Any:
            """Pickles, `torch.save` and `deepcopy` get the plain layer: a copy neither writes here nor needs nobs."""
            make, args, *rest = super().__reduce_ex__(protocol)
            # pickle insists that the first argument of __newobj__ is the object's very class
            if getattr(make, "__name__", "") == "__newobj__":
                own = plain.__new__ is not object.__new__
                make = plain.__new__ if own else copyreg._reconstructor  # type: ignore[attr-defined]
                args = (plain, *args[1:]) if own else (plain, object, None)
            args = tuple(plain if arg is Tapped else arg for arg in args)
            return (make, args, *(_without_taps(rest[0]), *rest[1:])) if rest else (make, args)

    Tapped.__name__, Tapped.__qualname__, Tapped.__module__ = plain.__name__, plain.__qualname__, plain.__module__
    Tapped.__doc__ = plain.__doc__
    if has_forward(plain):
        Tapped.forward.__code__ = _code_in_place_of(plain.forward, Tapped.forward.__code__)  # type: ignore[attr-defined]
    else:
        del Tapped.forward
    return Tapped


def has_forward(kind: type[nn.Module]) -> bool:
    """Whether the forward of a layer type is a method, behind which a tap can come."""
    return not isinstance(inspect.getattr_static(kind, "forward"), (staticmethod, classmethod, property))


def _without_taps(state: Any) -> Any:
    """A layer's state as it is pickled, plain or in a tuple, without what nobs has put there."""
    if isinstance(state, tuple):
        return tuple(_without_taps(part) for part in state)
    if not isinstance(state, dict):
        return state
    return {key: value for key, value in state.items() if not key.startswith(PREFIX) and not _becomes_tapped(key, value)}


def _becomes_tapped(key: str, value: Any) -> bool:
    """Whether this attribute is the tapped class that a lazy layer is to become."""
    return key == "cls_to_become" and "_nobs_plain" in vars(value)


def _code_in_place_of(plain: Any, code: CodeType) -> CodeType:
    """Code of its own for each type, as Dynamo counts recompilations by it; and of torch's file where the plain one is.

    Dynamo leaves frames of torch's own layers alone and only traces through them, and knows them by their file. Where the
    user's graph is broken around such layers, ours must not become graphs either.
    """
    if hasattr(plain, "__code__") and torch._dynamo.trace_rules.check(plain):
        return code.replace(co_filename=plain.__code__.co_filename, co_firstlineno=plain.__code__.co_firstlineno)
    return code.replace()


def put_in(layer: nn.Module, row: LiveRow, tap: int | None) -> None:
    """Give a layer its tapped class, and its slots in the row (`LiveRow.bind`).

    Raises:
        TypeError: its type refuses to be subclassed.
    """
    own, kind = vars(layer), type(layer)  # not by setattr, which may be the user's
    object.__setattr__(layer, "__class__", tapped_type(layer))
    if _is_parametrized(layer):
        own["_nobs_was"] = kind
    if _is_unshaped(layer):  # its first call changes its class: to one with a tap
        own["cls_to_become"] = tapped_class(layer.cls_to_become)  # type: ignore[arg-type]
    row.bind(layer, tap)


def tapped_type(layer: nn.Module) -> type[nn.Module]:
    """The class with which a layer has its tap.

    Raises:
        TypeError: its type refuses to be subclassed.
    """
    kind, plain = type(layer), _own_type(layer)
    tapped = tapped_class(plain)
    return tapped if plain is kind else _with_base(kind, tapped)


def take_out(layer: nn.Module) -> None:
    """Give the layer its plain class back and take every attribute of nobs away."""
    kind, tapped = type(layer), _own_type(layer)
    plain, was = tapped._nobs_plain, vars(layer).get("_nobs_was")  # type: ignore[attr-defined]
    if tapped is not kind:  # the very class that parametrize made, unless more was parametrized since, or less
        plain = was if was is not None and vars(was).keys() == vars(kind).keys() else _with_base(kind, plain)
    object.__setattr__(layer, "__class__", plain)
    own = vars(layer)
    for key in [key for key, value in own.items() if key.startswith(PREFIX) or _becomes_tapped(key, value)]:
        del own[key]


def can_be_taken_out(layer: nn.Module) -> bool:
    """Whether the layer's class is still the one that nobs gave it."""
    return "_nobs_plain" in vars(_own_type(layer))


def plain_name(layer: nn.Module) -> str:
    """What a layer's type is called; a lazy one's is called what it becomes."""
    kind: Any = layer.cls_to_become if _is_unshaped(layer) else type(layer)
    return str(kind.__name__)


def _own_type(layer: nn.Module) -> type[nn.Module]:
    """The layer's type without what parametrize has put over it: for this one layer, and taken off again one day."""
    return type(layer).__bases__[0] if _is_parametrized(layer) else type(layer)


def _is_parametrized(layer: nn.Module) -> bool:
    kind = type(layer)  # a user's own attribute of that name is no parametrization
    return is_parametrized(layer) and kind.__name__ == f"Parametrized{kind.__bases__[0].__name__}"


def _with_base(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """A class as parametrize makes it, for one layer, over another base."""
    body = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    return type(kind.__name__, (base,), body)


def _is_unshaped(layer: nn.Module) -> bool:
    return isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params()
