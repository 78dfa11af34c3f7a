"""What the training loop gives to a step: its numbers, checked, and the name of its batch, as it is then."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._names import safe_text
from .errors import BadLoss, explain

_MOST_INDICES = 100
"""Of a tensor that names a batch, so many elements are kept."""


def batch_name(batch: object) -> object:
    """What names a batch, as it is now: its text, or a copy of a tensor on an accelerator, whose text would wait for it."""
    if batch is None or (isinstance(batch, Tensor) and batch.device.type != "cpu"):
        return batch if batch is None else batch.detach().clone()
    if isinstance(batch, Tensor) and batch.layout is torch.strided and not batch.is_nested:
        batch = batch.flatten()[:_MOST_INDICES].tolist()  # torch's own text of a tensor takes longer than a step's bookkeeping
    return safe_text(batch)


def checked_scalar(name: str, value: Any) -> Tensor | float:
    """A single real number as a float, or a tensor of one as it is, without looking at its value.

    Raises:
        BadLoss: it is something else.
    """
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex() and not value.is_meta and not value.is_nested:
            return value
        got = f"a {value.dtype} tensor of shape {list(value.shape)}" + (" on meta" if value.is_meta else "")
    else:
        number = value.item() if isinstance(value, (np.ndarray, np.generic)) and value.size == 1 else value
        try:
            if hasattr(number, "__float__"):  # float("0.5") would take a text
                return float(number)
        except (TypeError, ValueError, OverflowError):
            pass
        got = f"a {type(value).__name__}"
    expected = "one number: a Python number or a tensor with one element"
    raise BadLoss(explain(f"recording {name}", got, expected, f"{name}.mean(), say"))
