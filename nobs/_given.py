"""What the training loop gives to a step: its numbers, checked, and the name of its batch, as it is then."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._names import safe_text
from .errors import BadLoss, explain

_MOST_INDICES = 100
"""Of a batch that names itself so many elements are looked at; more do not fit into its text."""
_NUMBERS = frozenset({int, float, bool})


def batch_name(batch: object) -> object:
    """What names a batch, as it is now: a short text, or, of a tensor on an accelerator, its first elements, copied there.

    The text of a tensor would be waited for, and that of a whole batch takes longer than all the rest of a step.
    """
    if isinstance(batch, Tensor) and batch.layout is torch.strided and not batch.is_nested:
        first = _first(batch.detach())
        return safe_text(first.tolist()) if first.device.type == "cpu" else first.clone()
    if type(batch) in (list, tuple):
        first_items = batch[:_MOST_INDICES]  # type: ignore[index]
        if _NUMBERS.issuperset(map(type, first_items)):  # as a rule; the long way takes ten times as long
            return safe_text(first_items)
    return batch if batch is None else safe_text(batch if isinstance(batch, str) else _SHORT.repr(batch))


def _first(batch: Tensor) -> Tensor:
    """The first elements, without a copy of the others, however they lie in memory."""
    while batch.dim() > 1:
        row = batch[0].numel() if len(batch) else 0
        batch = batch[0] if row >= _MOST_INDICES else batch[: _MOST_INDICES // max(1, row) + 1].flatten()
    return batch.reshape(-1)[:_MOST_INDICES]


class _Short(reprlib.Repr):
    """Texts of containers, cut; a tensor in them is told by its type."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = _MOST_INDICES
        self.maxlevel = 4
        self.maxstring = self.maxother = 200

    def repr1(self, x: Any, level: int) -> str:
        return f"<{x.dtype} {list(x.shape)}>" if isinstance(x, Tensor) else super().repr1(x, level)


_SHORT = _Short()


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
