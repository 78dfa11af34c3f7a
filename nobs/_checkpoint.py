"""The states of triggers on their way into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def packed(state: Any) -> Any:
    """NumPy arrays as tensors and its scalars as numbers, which `torch.load(weights_only=True)` takes; the rest as it is."""
    return _mapped(state, (np.ndarray, np.generic), _plain)


def _plain(value: Any) -> Any:
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value.item()


def unpacked(state: Any) -> Any:
    """The state again: tensors become arrays."""
    return _mapped(state, Tensor, lambda tensor: tensor.numpy().copy())


def _mapped(state: Any, kind: type | tuple[type, ...], convert: Callable[[Any], Any]) -> Any:
    if isinstance(state, kind):
        return convert(state)
    if isinstance(state, dict):
        return {key: _mapped(value, kind, convert) for key, value in state.items()}
    if isinstance(state, (list, tuple)):  # a named tuple goes as a plain one
        return (list if isinstance(state, list) else tuple)(_mapped(value, kind, convert) for value in state)
    return state
