"""Which layers of a model are recorded: by default every one that owns parameters, and every norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import nn

from . import _names
from .errors import BadSetting, UnknownLayer, explain

Select: TypeAlias = "type[nn.Module] | str | Callable[[str, nn.Module], bool]"
Named: TypeAlias = "dict[str, nn.Module]"

LAYER_TYPES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
"""Recorded even without parameters of their own (a norm without affine, a parametrized Linear). Any module that owns
parameters is recorded besides."""


def named_modules(model: nn.Module) -> Named:
    """Modules by clean name, without compile wrappers. Of a wrapper and the wrapped, which share a name, the wrapped."""
    return {_names.clean(name): m for name, m in model.named_modules() if not isinstance(m, torch._dynamo.OptimizedModule)}


def choose(named: Named, layers: Select | Iterable[Select] | None) -> Named:
    """The layers that a user asked for, in the model's order.

    Raises:
        UnknownLayer: a pattern or type that fits none.
        BadSetting: neither pattern nor type nor function.
    """
    if layers is None:
        return {name: module for name, module in named.items() if _by_default(module)}
    wanted: list[Any] = [layers] if _is_select(layers) or not isinstance(layers, Iterable) else list(layers)
    for select in wanted:
        if not _is_select(select):
            what = f"a {type(select).__name__}" if isinstance(select, nn.Module) else repr(select)
            there = "a layer type, a glob pattern, a function (name, module) -> bool, or a list of such"
            raise BadSetting(explain("nobs.instrument(layers=...)", what, there, 'layers=["blocks.*", torch.nn.Linear]'))
    chosen: set[str] = set()
    for select in wanted:
        found = {name for name, module in named.items() if _fits(select, name, module)}
        if not found and not (callable(select) and not isinstance(select, type)):
            raise _unknown(select, named)
        chosen |= found
    return {name: module for name, module in named.items() if name in chosen}


def device_of(layers: Named, doing: str) -> torch.device | None:
    """The one device that layers are on; None if nothing of them is on any.

    Raises:
        BadSetting: they are on several.
    """
    devices = {
        p.device: name for name, m in layers.items() for p in (*m._parameters.values(), *m._buffers.values()) if p is not None
    }
    if len(devices) > 1:
        raise BadSetting(
            explain(
                doing,
                "layers on " + " and ".join(f"{device} ({name})" for device, name in devices.items()),
                "all recorded layers on one device",
                "nobs.instrument(model, layers=[...]) with the layers of one device",
            )
        )
    return next(iter(devices), None)


def _is_select(select: object) -> bool:
    if isinstance(select, type):
        return issubclass(select, nn.Module)
    return isinstance(select, str) or (callable(select) and not isinstance(select, nn.Module))


def _fits(select: Select, name: str, module: nn.Module) -> bool:
    if isinstance(select, type):
        return isinstance(module, select)
    if isinstance(select, str):
        return bool(_names.matching(select, [name]))
    return bool(select(name, module))


def _by_default(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return isinstance(module, LAYER_TYPES) or any(p is not None for p in module._parameters.values())


def _unknown(select: Select, named: Named) -> UnknownLayer:
    if isinstance(select, str):
        there = "a name or pattern such as " + ", ".join(repr(name) for name in _names.nearest(select, named))
        return UnknownLayer(
            explain("nobs.instrument(layers=...)", f"{select!r}, which fits no layer", there, "layers=None for all layers")
        )
    kinds = sorted({type(module).__name__ for module in named.values()})
    what = getattr(select, "__name__", repr(select))
    return UnknownLayer(
        explain(
            "nobs.instrument(layers=...)",
            f"{what}, of which there is no layer",
            f"one of {', '.join(kinds)}",
            "layers=None for all layers",
        )
    )
