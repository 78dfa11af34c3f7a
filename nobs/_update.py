"""What an update is about to use, its learning rates and its loss scale, noted at the end of backward.

Not in `recorder.step`: by then a scheduler may have moved the rate, and the scaler its scale.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ._row import LOSS_SCALE, LiveRow
from .errors import BadSetting, explain

MOST_RATES = 8
"""Of more parameter groups than this, the learning rates of the first are recorded."""


class UpdateWatch:
    """Notes the learning rates of some optimizers and the scale of a GradScaler, once a backward.

    Args:
        row: what lives on an accelerator is copied there, into this row: reading it would wait, and it changes in place.
        optimizer: one, a list, or None.
        scaler: a GradScaler, or None.

    Raises:
        BadSetting: an optimizer without param_groups, or a scaler without a scale.
    """

    def __init__(
        self, row: LiveRow, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None, scaler: Any
    ) -> None:
        self._row = row
        self._optimizers = _as_list(optimizer)
        if scaler is not None and not hasattr(scaler, "get_scale"):
            what = f"a {type(scaler).__name__}"
            raise BadSetting(
                explain("Recorder(scaler=...)", what, "a torch.amp.GradScaler", 'scaler=torch.amp.GradScaler("cuda")')
            )
        self._scaler = scaler
        self._rates: dict[str, float] | None = None
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._handles)

    def attach(self) -> None:
        """Ask the row to be called at the end of each backward, and the optimizers to tell of each step. Keeps none alive."""
        self._row.before_update = weakref.WeakMethod(self.note)
        if not self._handles:
            tell = partial(_note_step, weakref.ref(self._row))
            for optimizer in map(_innermost, self._optimizers):
                if hasattr(optimizer, "_optimizer_step_post_hooks"):
                    self._handles.append(optimizer.register_step_post_hook(tell))

    def detach(self) -> None:
        """Take that back, unless somebody else has asked since."""
        if self._row.before_update == weakref.WeakMethod(self.note):
            self._row.before_update = None
        _remove(self._handles)

    def note(self) -> None:
        """Look at the rates and the scale now."""
        self._rates = {}
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups if "lr" in group]
        for i, group in enumerate(groups[:MOST_RATES]):
            self._note_rate("lr" if i == 0 else f"lr.{i}", group["lr"], self._rates)
        scale = getattr(self._scaler, "_scale", None)
        if isinstance(scale, Tensor):
            self._row.write_scalar(LOSS_SCALE, scale)

    def _note_rate(self, name: str, rate: Tensor | float, on_host: dict[str, float]) -> None:
        if isinstance(rate, Tensor) and rate.device.type != "cpu":
            self._row.write_scalar(name, rate)
        else:
            on_host[name] = float(rate)

    def take(self) -> dict[str, float]:
        """The rates that live on the host, as noted in the running step's last backward (now, if it had none); then forget."""
        if self._rates is None:
            self.note()
        rates, self._rates = self._rates or {}, None
        return rates

    @property
    def optimizers(self) -> int:
        """How many there are."""
        return len(self._optimizers)

    def facts(self) -> dict[str, object]:
        """Which optimizers there are, and how slowly one of Adam's family forgets: beta2, from the first group that has one."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        decays = [float(group["betas"][1]) for group in groups if len(group.get("betas", ())) == 2]
        names = ", ".join(dict.fromkeys(type(_innermost(optimizer)).__name__ for optimizer in self._optimizers))
        return ({"optimizer": names} if names else {}) | ({"second_moment_decay": decays[0]} if decays else {})

    def forget(self) -> None:
        """The running step is dropped."""
        self._rates = None


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _innermost(optimizer: Any) -> Any:
    """The optimizer that steps, inside wrappers (Lookahead and its like) that keep it under this name."""
    inner = getattr(optimizer, "optimizer", None)
    return _innermost(inner) if isinstance(inner, torch.optim.Optimizer) and inner is not optimizer else optimizer


def _note_step(row: weakref.ref[LiveRow], optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """An optimizer has stepped. Fused ones, and those that write through `.data`, do not count their writes."""
    told = None if torch.compiler.is_compiling() else row()  # a compiled step counts them, and must not be changed
    if told is not None:
        told.stepped[id(optimizer)] = told.telling[id(optimizer)] = weakref.ref(optimizer)


def _as_list(optimizer: Any) -> list[torch.optim.Optimizer]:
    several = [] if optimizer is None else list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for one in several:
        if not hasattr(one, "param_groups"):
            expected = "an optimizer with param_groups, or a list of such"
            raise BadSetting(explain("Recorder(optimizer=...)", f"a {type(one).__name__}", expected, "optimizer=optimizer"))
    return several
