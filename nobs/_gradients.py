"""Parameters and their accumulated gradients, read at the end of each backward.

The first parameter that receives its gradient asks the autograd engine to call back when backward is done. That is before
any clipping, unscaling, step or zero_grad, whatever the order of the user's calls, and outside every compiled graph.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from . import _stats
from ._row import FIRST_TAP_LINE, LiveRow


class GradientWatch:
    """Writes the lines of parameters and of their gradients into a row.

    Holds every parameter weakly: the model must be free to die.
    """

    def __init__(self, row: LiveRow) -> None:
        self._row = row
        self._lines: MutableMapping[Tensor, int] = WeakIdKeyDictionary()  # parameter -> line of its value; the gradient's is next
        self._handles: MutableMapping[Tensor, RemovableHandle] = WeakIdKeyDictionary()
        self._touched: list[weakref.ref[Tensor]] = []
        self._armed_for = -1

    def watch(self, parameter: Tensor, tap: int) -> None:
        """Record this parameter in line `tap` of the table and its gradient in the next. A second time changes nothing."""
        self._lines[parameter] = tap
        self._hook(parameter)

    def _hook(self, parameter: Tensor) -> None:
        if parameter.requires_grad and parameter not in self._handles:
            self._handles[parameter] = parameter.register_post_accumulate_grad_hook(self._arm)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._lines.clear()

    def _arm(self, parameter: Tensor) -> None:
        """One call per parameter and backward: note it, and ask for one callback per backward.

        The backward is told by the engine's own number for it, so one that ended in an error leaves nothing armed.
        """
        if not self._row.recording:
            return
        task = torch._C._current_graph_task_id()
        if task != self._armed_for:
            self._armed_for = task
            self._touched.clear()
            engine: Any = torch.autograd.Variable._execution_engine
            # Queued twice over, to run behind DDP's own callback, which waits for the reduction.
            engine.queue_callback(lambda: engine.queue_callback(self._read))
        self._touched.append(weakref.ref(parameter))

    def _read(self) -> None:
        touched = [parameter for parameter in (ref() for ref in self._touched) if parameter is not None]
        self._touched.clear()
        self._armed_for = -1
        try:
            with torch.no_grad():  # under create_graph the engine runs callbacks with grad mode on
                if self._row.before_update is not None:
                    self._row.before_update()
                self._write({self._lines[p] + 1: p.grad for p in touched if p in self._lines})
                self._write({line: p for p, line in list(self._lines.items())})
                for parameter in list(self._lines):  # unfrozen since: its gradient is read from the next backward on
                    self._hook(parameter)
        except Exception as error:  # nobs must never end a run: stop recording, and let the recorder say so once
            self._row.give_up(error)

    def _write(self, tensors: dict[int, Tensor | None]) -> None:
        """Overwrite lines, not fold: the gradient accumulates in `.grad`, so the last backward of a step has all of it."""
        values = self._row.values
        for tap, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.layout == torch.sparse_coo:  # Embedding(sparse=True): the rows that were looked up
                tensor = tensor.coalesce().values()
            if _stats.measurable(tensor) and not tensor.is_meta:
                values[FIRST_TAP_LINE + tap].copy_(_stats.measure(tensor))
