"""Put the taps into a model, and take them out again."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from . import _names, _tapped
from ._columns import OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD
from ._gradients import GradientWatch
from ._launch import disabled
from ._layers import Named, Select, choose, device_of, named_modules
from ._row import LiveRow, rows_of
from ._table import Tap, TapTable
from .errors import (
    AlreadyInstrumented,
    BadSetting,
    NobsWarning,
    NothingToRecord,
    NotInstrumented,
    explain,
    whole_number,
)

Model = TypeVar("Model", bound=nn.Module)


def instrument(model: Model, *, layers: Select | Iterable[Select] | None = None, every: int = 1) -> Model:
    """Put taps into a model, before `torch.compile`, and give the same object back.

    Afterwards each step leaves, on the device, eight float32 for every layer's output, the output's gradient, each
    parameter and each parameter's gradient. A `nobs.Recorder` or a `nobs.RingBuffer` reads them. Parameters, state_dict
    and isinstance are as without; pickles and deep copies come out without taps.

    Args:
        model: any module. Every layer that owns parameters is recorded, and every norm.
        layers: record these layers instead: a layer type, a glob pattern over layer names (`"blocks.*.up"`), a function
            `(name, module) -> bool`, or a list of such.
        every: run the taps on every `every`-th step only. One more compiled graph; the loss is still recorded each step.

    Raises:
        AlreadyInstrumented: the model or a part of it has its taps.
        NothingToRecord: it has no layer to record.
        UnknownLayer: a pattern or type in `layers` that fits no layer.
        BadSetting: `every` below 1.

    Cost: 64 bytes of device memory an output and 64 a parameter; at each step one read of each tapped tensor. The first model
    of a process takes half a second more, in which a C++ compiler makes the kernel for the CPU, if there is one.
    With `NOBS_DISABLE=1` in the environment nothing is done at all.
    """
    if not isinstance(model, nn.Module):
        raise BadSetting(
            explain("nobs.instrument(model)", f"a {type(model).__name__}", "a torch.nn.Module", "nobs.instrument(model)")
        )
    every = whole_number("nobs.instrument(..., every=...)", "every", every, 1)
    if disabled():
        return model
    named = named_modules(model)
    _refuse_second_time(named)
    chosen = choose(named, layers)
    if not chosen:
        none = ", none of which owns parameters" if layers is None else f", of which layers={layers!r} chooses none"
        raise NothingToRecord(
            explain(
                f"nobs.instrument({type(model).__name__}(...))",
                f"{len(named)} modules{none}",
                "at least one layer",
                "layers=nn.ReLU, say, to record layers without parameters" if layers is None else "layers=None for all layers",
            )
        )
    _warn_if_compiled(model)
    _attach(chosen, every)
    return model


def uninstrument(model: Model) -> Model:
    """Take the taps out again and give the same object back, exactly the model that `instrument` was given.

    Raises:
        NotInstrumented: it has no taps.
    """
    if disabled():
        return model
    rows = rows_of(model)
    if not rows:
        raise NotInstrumented(
            explain(
                "nobs.uninstrument(model)",
                f"a {type(model).__name__} without taps",
                "an instrumented model",
                "model = nobs.instrument(model)",
            )
        )
    tapped = [module for module in model.modules() if vars(module).get("_nobs_row") is not None]
    _refuse_changed(tapped)
    for row in rows:
        row.pause(True)  # a recorder that still holds the row records nothing from here on
        if row.watch is not None:
            row.watch.remove()
    for module in tapped:
        _tapped.take_out(module)
    return model


def _refuse_second_time(named: Named) -> None:
    for name, module in named.items():
        if vars(module).get("_nobs_row") is not None:
            raise AlreadyInstrumented(
                explain(
                    "nobs.instrument(model)",
                    f"a model whose layer {name!r} has its tap already",
                    "a model without taps",
                    "nobs.uninstrument(model) first, or drop the second call",
                )
            )


def _refuse_changed(tapped: list[nn.Module]) -> None:
    for module in tapped:
        if not _tapped.can_be_taken_out(module):
            raise BadSetting(
                explain(
                    "nobs.uninstrument(model)",
                    f"a {type(module).__name__} whose class was changed again after nobs.instrument",
                    "the class that nobs gave it",
                    "undo first what changed it (fully_shard, say), or load the state_dict into a new model",
                )
            )


def _attach(chosen: Named, every: int) -> None:
    """Lay out the table, then give each layer its class and slots, and watch the parameters."""
    taps: list[Tap] = []
    outputs: list[tuple[nn.Module, int | None]] = []
    parameters: dict[nn.Parameter, tuple[nn.Module, str, int]] = {}
    for name, module in chosen.items():
        kind = _tapped.plain_name(module)
        outputs.append((module, len(taps) if _has_output(name, module) else None))
        if outputs[-1][1] is not None:
            taps += [Tap(name, kind, "output", OUTPUT), Tap(name, kind, "output.grad", OUTPUT_GRAD)]
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter not in parameters:  # tied: counted under its first name
                parameters[parameter] = module, key, len(taps)
                site = f"parameter {key}" if key == "output" else key
                taps += [Tap(name, kind, site, PARAMETER), Tap(name, kind, f"{site}.grad", PARAMETER_GRAD)]
    row = LiveRow(TapTable(tuple(taps)), device_of(chosen, "nobs.instrument(model)") or torch.device("cpu"), every)
    for name, module in chosen.items():
        _refuse_unwilling(name, module)  # before anything is changed
    row.watch = GradientWatch(row, list(parameters.values()))
    for module, tap in outputs:
        _tapped.put_in(module, row, tap)


def _has_output(name: str, module: nn.Module) -> bool:
    """Whether calls of the module go through its class's forward."""
    kind = type(module)
    if "forward" in vars(module):
        why = "its forward was replaced on the object itself. Instrument the model before that is done"
    elif not _tapped.has_forward(kind):
        why = "its forward is no plain method of its class"
    else:
        return kind.forward is not nn.Module.forward
    warnings.warn(
        f"nobs cannot record the output of {_names.printable(name)}: {why}; its parameters are recorded",
        NobsWarning,
        stacklevel=5,
    )
    return False


def _refuse_unwilling(name: str, module: nn.Module) -> None:
    try:
        _tapped.tapped_type(module)
    except TypeError as error:  # a metaclass or an __init_subclass__ of the user's
        raise BadSetting(
            explain(
                f"nobs.instrument: making a subclass of {type(module).__name__} for {name!r}",
                str(error),
                "a layer type that can be subclassed without arguments",
                "layers=[...] without this layer",
            )
        ) from error


def _warn_if_compiled(model: nn.Module) -> None:
    """Taps put in after the first compiled call are seen, at the price of compiling again; say so once."""
    innermost = getattr(model, "_orig_mod", model)
    code = getattr(type(innermost).forward, "__code__", None)
    ran = code is not None and torch._dynamo.eval_frame._debug_get_cache_entry_list(code)  # of any model of this class
    if ran and (_is_compiled(model) or any(_is_wrapper_of(model, holder) for holder in gc.get_referrers(model))):
        warnings.warn(
            explain(
                "nobs.instrument(model)",
                "a model that torch.compile has compiled already: its next call compiles again",
                "taps before the first compiled call",
                "model = nobs.instrument(model), and then torch.compile(model)",
            ),
            NobsWarning,
            stacklevel=3,
        )


def _is_compiled(model: nn.Module) -> bool:
    return isinstance(model, torch._dynamo.OptimizedModule) or any(m._compiled_call_impl is not None for m in model.modules())


def _is_wrapper_of(model: nn.Module, holder: object) -> bool:
    """Whether `holder` is where a `torch.compile(model)` keeps its model."""
    return isinstance(holder, dict) and holder.get("_orig_mod") is model
