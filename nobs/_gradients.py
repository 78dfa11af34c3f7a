"""Parameters and their accumulated gradients, read at the end of each backward.

The first parameter that receives its gradient asks the autograd engine to call back when backward is done. That is before
any clipping, unscaling, step or zero_grad, whatever the order of the user's calls, and outside every compiled graph.

A gradient accumulates in `.grad`, so a later backward of the step overwrites the reading of an earlier one, unless `.grad`
was written to in between (zeroed, clipped, replaced): then the two fold, and the step shows the worse. A parameter's value
is its first reading of the step: as the optimizer was about to find it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, MutableMapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from . import _stats
from ._row import FIRST_TAP_LINE, LiveRow


class _Reading(NamedTuple):
    """The last reading of a gradient: since which blanking of the row, of which memory in which version, what it folds with."""

    blanks: int
    address: int
    version: int
    floor: Tensor | None


class GradientWatch:
    """Writes the lines of parameters and of their gradients into a row.

    Knows parameters by their layer and name, held weakly: the model is free to die, and to replace them.
    """

    def __init__(self, row: LiveRow, parameters: list[tuple[nn.Module, str, int]]) -> None:
        """Watch parameters, given as layer, own name, and line in the table; the gradient's line is the next."""
        self._row = row
        self._places = [(weakref.ref(layer), name, tap) for layer, name, tap in parameters]
        self._taps: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
        self._handles: MutableMapping[Tensor, RemovableHandle] = WeakIdKeyDictionary()
        self._readings: MutableMapping[Tensor, _Reading] = WeakIdKeyDictionary()
        self._valued: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
        self._touched: dict[int, list[weakref.ref[Tensor]]] = {}
        self.hook()

    def hook(self) -> None:
        """Put a hook on every parameter that asks for a gradient and has none: new ones, and those unfrozen since."""
        for parameter, tap in self._parameters():
            self._hook(parameter, tap)

    def _hook(self, parameter: Tensor, tap: int) -> None:
        if parameter.requires_grad and parameter not in self._handles:
            self._taps[parameter] = tap
            register = parameter.register_post_accumulate_grad_hook
            earlier = list((parameter._post_accumulate_grad_hooks or {}).items())
            self._handles[parameter] = register(self._arm)  # type: ignore[no-untyped-call]
            hooks: Any = parameter._post_accumulate_grad_hooks
            for key, hook in earlier:  # behind an optimizer in the backward the gradient is gone: to the front
                del hooks[key]
                hooks[key] = hook

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._places.clear()

    def _parameters(self) -> Iterator[tuple[Tensor, int]]:
        for reference, name, tap in self._places:
            layer = reference()
            parameter = None if layer is None else layer._parameters.get(name)
            if parameter is not None:
                yield parameter, tap

    def _arm(self, parameter: Tensor) -> None:
        """One call per parameter and backward: note it, and ask for one callback per backward.

        The engine numbers its backwards, and nested ones (reentrant checkpointing) have numbers of their own.
        """
        task = torch._C._current_graph_task_id()
        if task not in self._touched:
            if len(self._touched) >= 8:  # what backwards that ended in an error have left behind
                self._touched.clear()
            self._touched[task] = []
            engine: Any = torch.autograd.Variable._execution_engine
            # Queued twice over, to run behind DDP's own callback, which waits for the reduction.
            engine.queue_callback(lambda: engine.queue_callback(partial(self._read, task)))
        if not self._row.recording:
            return
        hooks = parameter._post_accumulate_grad_hooks
        if hooks is not None and len(hooks) > 1:  # an optimizer in the backward: behind this hook the gradient is gone
            self._guarded(partial(self._write_now, parameter))
        else:
            self._touched[task].append(weakref.ref(parameter))

    def _read(self, task: int) -> None:
        """The callback at the end of a backward."""
        references = self._touched.pop(task, [])
        if self._row.paused:  # this backward leads to no update of the recorded run
            return
        before_update = self._row.before_update and self._row.before_update()
        if before_update is not None:
            self._guarded(before_update)
        if self._row.recording:
            self._guarded(partial(self._write, [p for p in (ref() for ref in references) if p is not None]))

    def _guarded(self, write: Any) -> None:
        """nobs must never end a run: on an error recording stops, and the recorder says so once."""
        try:
            with torch.no_grad():  # under create_graph the engine runs callbacks with grad mode on
                write()
        except Exception as error:
            self._row.give_up(error)

    def _write(self, touched: list[Tensor]) -> None:
        for parameter in touched:
            self._write_gradient(parameter)
        for parameter, tap in self._parameters():  # those without a gradient in this backward too
            self._write_value(parameter, tap)
            self._hook(parameter, tap)

    def _write_now(self, parameter: Tensor) -> None:
        self._write_gradient(parameter)
        self._write_value(parameter, self._taps[parameter])

    def _write_gradient(self, parameter: Tensor) -> None:
        gradient, blanks = parameter.grad, self._row.blanks
        if gradient is None:
            return
        address = gradient.data_ptr() if gradient.layout == torch.strided else 0
        last = self._readings.get(parameter)
        line = self._row.values[FIRST_TAP_LINE + self._taps[parameter] + 1]
        floor = None
        if last is not None and last.blanks == blanks:
            # Accumulating is one in-place write. A new tensor starts at version 0, zeroing and adding makes two.
            goes_on = (address, gradient._version) == (last.address, last.version + 1)
            floor = last.floor if goes_on else line.clone()
        self._readings[parameter] = _Reading(blanks, address, gradient._version, floor)
        measured = _measured(gradient)
        if measured is not None:
            line.copy_(measured if floor is None else torch.maximum(floor, measured))

    def _write_value(self, parameter: Tensor, tap: int) -> None:
        if self._valued.get(parameter) != self._row.blanks:
            self._valued[parameter] = self._row.blanks
            measured = _measured(parameter)
            if measured is not None:
                self._row.values[FIRST_TAP_LINE + tap].copy_(measured)


def _measured(tensor: Tensor) -> Tensor | None:
    if tensor.layout == torch.sparse_coo:  # Embedding(sparse=True): the rows that were looked up
        tensor = tensor.coalesce().values()
    return _stats.measure(tensor) if _stats.measurable(tensor) and not tensor.is_meta else None
