"""Parameters and their accumulated gradients, read at the end of each backward.

The first parameter that receives its gradient asks the autograd engine to call back when backward is done. That is before
any clipping, unscaling, step or zero_grad, whatever the order of the user's calls, and outside every compiled graph.

What counts is what an update uses. A gradient accumulates in `.grad`, so a later backward of the step overwrites the reading
of an earlier one, until an optimizer has updated the parameter. Then the reading stands, and folds with that of the step's
next update, if there is one; what a backward leaves behind that no update uses, as the generator's leaves in the
discriminator, is no reading. A parameter's value is its first reading of the step: as the optimizer was about to find it.

That an update came is known from the optimizer, if it was given to the Recorder and has told of a step; else from the
parameter, if it was written to since.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from . import _stats
from ._columns import TRAINED
from ._onlookers import readable, unseen
from ._row import FIRST_TAP_LINE, LiveRow


class _Watched:
    """A parameter, found by its layer and name and held weakly: the model is free to die, and to replace it.

    Attributes:
        line: of its value in the row; its gradient's is the next.
        blanks: since which blanking of the row the last gradient was read.
        gone: its gradient was once gone at the end of a backward, where it is read otherwise: an optimizer in the backward.
        version: how often the parameter had been written to at that reading.
        used: an optimizer has said that it used that reading.
        told: there is an optimizer that says so.
        floor: what the step's updates so far have used; None before the first.
        valued: since which blanking of the row the value was read.
    """

    __slots__ = ("blanks", "floor", "gone", "handle", "layer", "line", "name", "told", "used", "valued", "version")

    def __init__(self, layer: nn.Module, name: str, line: int) -> None:
        self.layer, self.name, self.line = weakref.ref(layer), name, line
        self.handle: RemovableHandle | None = None
        self.blanks = self.valued = -1
        self.version = 0
        self.floor: Tensor | None = None
        self.used = self.told = self.gone = False

    def held(self) -> Tensor | None:
        """The parameter that the layer has by this name now."""
        layer = self.layer()
        return None if layer is None else layer._parameters.get(self.name)

    def now(self) -> Tensor | None:
        """The same, if it has memory: a lazy one has none until its layer has run."""
        parameter = self.held()
        return None if parameter is None or is_lazy(parameter) else parameter

    def updated(self, parameter: Tensor) -> bool:
        """Whether an update has used the last reading."""
        return self.used or (not self.told and _version(parameter) != self.version)


class GradientWatch:
    """Writes the lines of parameters and of their gradients into a row."""

    def __init__(self, row: LiveRow, parameters: list[tuple[nn.Module, str, int]]) -> None:
        """Watch parameters, given as layer, own name, and line in the table; the gradient's line is the next."""
        self._row = row
        self._watched = [_Watched(layer, name, FIRST_TAP_LINE + tap) for layer, name, tap in parameters]
        self._touched: dict[int, tuple[int, list[_Watched]]] = {}
        self._passing: list[_Watched] = []
        self._unsettled: list[_Watched] = []
        self._read_since = -1
        # Of several threads that run backward the last to read has the whole gradient: it must also be the last to write.
        self._writing = threading.RLock()
        self.hook()

    def hook(self) -> None:
        """Put a hook on every parameter that asks for a gradient and has none: new ones, and those unfrozen since."""
        for watched in self._watched:
            parameter = watched.held()
            if parameter is not None and not self._hook(watched, parameter):
                with torch._C.DisableTorchFunctionSubclass():
                    # A swap (`swap_tensors`) takes the engine's end of the hooks away and leaves the list: tie it on again.
                    hooks: Any = parameter._post_accumulate_grad_hooks
                    parameter._post_accumulate_grad_hooks = hooks

    def _hook(self, watched: _Watched, parameter: Tensor) -> bool:
        """Whether the parameter had no hook, and has one now."""
        if not parameter.requires_grad:
            return False
        with torch._C.DisableTorchFunctionSubclass():  # a lazy parameter refuses everything else until it has a shape
            # Known by the hook, and not by a weak reference to it, with which torch refuses to swap it (`swap_tensors`).
            if watched.handle is not None:
                if watched.handle.id in (parameter._post_accumulate_grad_hooks or ()):
                    return False
                watched.handle.remove()
            watched.handle = parameter.register_post_accumulate_grad_hook(partial(self._arm, watched))  # type: ignore[no-untyped-call]
            hooks: Any = parameter._post_accumulate_grad_hooks
        for key in list(hooks)[:-1]:  # behind an optimizer in the backward the gradient is gone: to the front
            hooks[key] = hooks.pop(key)
        return True

    @property
    def idle(self) -> bool:
        """Whether the running step has had no backward through a hooked parameter."""
        return self._read_since != self._row.blanks

    def layers(self) -> dict[str, nn.Module]:
        """The layers whose parameters are watched, by name."""
        taps = self._row.table.taps
        return {taps[w.line - FIRST_TAP_LINE].layer: layer for w in self._watched if (layer := w.layer()) is not None}

    def remove(self) -> None:
        """Take all hooks off, and leave no empty list of them."""
        for watched in self._watched:
            if watched.handle is not None:
                watched.handle.remove()
            parameter = watched.held()
            if parameter is not None and parameter._post_accumulate_grad_hooks == {}:
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        self._watched.clear()

    # Inside a compiled training step backward runs under Dynamo's eyes, which has nothing to compile in these two.

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _arm(self, watched: _Watched, parameter: Tensor) -> None:
        """One call per parameter and backward: note it, and ask for one callback per backward.

        The engine numbers its backwards, and nested ones (reentrant checkpointing) have numbers of their own.
        """
        task = torch._C._current_graph_task_id()
        if task not in self._touched:
            if len(self._touched) >= 8:  # what backwards of earlier steps, ended by an error, have left behind
                for old, (blanks, _) in list(self._touched.items()):  # a copy, and in place: other threads put theirs in
                    if blanks != self._row.blanks:
                        self._touched.pop(old, None)
            self._touched[task] = self._row.blanks, []
            engine: Any = torch.autograd.Variable._execution_engine
            # Queued twice over, to run behind DDP's own callback, which waits for the reduction.
            engine.queue_callback(lambda: engine.queue_callback(partial(self._read, task)))
        if not self._row.recording or parameter.grad is None:  # compiled code may call for a gradient that it does not give
            return
        hooks = parameter._post_accumulate_grad_hooks
        # Maybe an optimizer in the backward: behind this hook the gradient is gone.
        if watched.gone or (hooks is not None and len(hooks) > 1):
            self._guarded(partial(self._write_now, watched, parameter))
        else:
            self._touched.setdefault(task, (self._row.blanks, []))[1].append(watched)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _read(self, task: int) -> None:
        """The callback at the end of a backward."""
        _, touched = self._touched.pop(task, (0, []))
        if self._row.paused:  # this backward leads to no update of the recorded run
            return
        note = None if self._row.before_update is None else self._row.before_update()
        if note is not None:
            self._guarded(note)
        if self._row.recording:
            self._guarded(partial(self._write, touched))

    def _guarded(self, write: Callable[[], None]) -> None:
        """nobs must never end a run: on an error recording stops, and the recorder says so once."""
        try:
            with self._writing, unseen(), torch.no_grad():  # under create_graph the engine runs callbacks with grad mode on
                write()
        except Exception as error:
            self._row.give_up(error)

    def _write(self, touched: list[_Watched]) -> None:
        for watched in self._passing:  # a hook behind ours took the gradient away: it was an optimizer
            watched.used = getattr(watched.now(), "grad", None) is None
        self._passing.clear()
        self._note_updates()
        for watched in touched:
            parameter = watched.now()
            if parameter is not None:
                watched.gone = parameter.grad is None
                self._write_gradient(watched, parameter)
        for watched in self._watched:  # those without a gradient in this backward too
            parameter = watched.now()
            if parameter is not None:
                if not watched.gone:  # else it is updated by now
                    self._write_value(watched, parameter)
                if self._hook(watched, parameter):  # unfrozen since, or put in place of another
                    self._write_gradient(watched, parameter)

    def _write_now(self, watched: _Watched, parameter: Tensor) -> None:
        self._write_gradient(watched, parameter)
        self._write_value(watched, parameter)
        self._passing.append(watched)

    def _note_updates(self) -> None:
        """Which readings have been used by the optimizers that stepped since the last backward, and which would be told."""
        stepped = [optimizer for ref in self._row.stepped.values() if (optimizer := ref()) is not None]
        self._row.stepped.clear()
        if self._read_since == self._row.blanks:  # before the step's first backward there is nothing to use
            telling = [optimizer for ref in self._row.telling.values() if (optimizer := ref()) is not None]
            updated, told = _parameters_of(stepped), _parameters_of(telling)
            for watched in self._watched if told else ():
                name = id(watched.now())
                watched.used, watched.told = watched.used or name in updated, name in told
        self._read_since = self._row.blanks

    def _write_gradient(self, watched: _Watched, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        line = self._row.values[watched.line + 1]
        if watched.blanks != self._row.blanks:
            watched.floor = None
        elif watched.updated(parameter):
            watched.floor = line.clone()
            self._unsettled.append(watched)
        watched.blanks, watched.version, watched.used = self._row.blanks, _version(parameter), False
        measured = _measured(parameter.grad)
        if measured is not None:
            line.copy_(measured if watched.floor is None else torch.maximum(watched.floor, measured))

    def settle(self) -> None:
        """Take back the readings that came behind an update and led to none; before the row is sent."""
        if not self._unsettled:
            return
        self._note_updates()
        for watched in self._unsettled:
            parameter = watched.now()
            if parameter is None or watched.floor is None or watched.blanks != self._row.blanks:  # of a dropped step
                continue
            if not watched.updated(parameter):
                self._row.values[watched.line + 1].copy_(watched.floor)
        self._unsettled.clear()

    def _write_value(self, watched: _Watched, parameter: Tensor) -> None:
        if watched.valued != self._row.blanks:
            watched.valued = self._row.blanks
            measured = _measured(parameter, TRAINED if parameter.requires_grad else 1)
            if measured is not None:
                self._row.values[watched.line].copy_(measured)


def _parameters_of(optimizers: list[torch.optim.Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _measured(tensor: Tensor, first: int = 1) -> Tensor | None:
    if tensor.layout == torch.sparse_coo:  # Embedding(sparse=True): the rows that were looked up
        tensor = tensor.coalesce().values()
    return _stats.measure(tensor, first) if readable(tensor) and _stats.measurable(tensor) else None
