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
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import _kernels
from ._callers import inside_another_backward
from ._columns import TRAINED
from ._kernels import Reading, measurable_part
from ._local import among_ranks, is_placed, shard_of
from ._onlookers import unseen
from ._pipelines import follow_stages, leave_stages
from ._row import FIRST_TAP_LINE, LiveRow
from ._table import WHOLE
from ._watched import Backward, Watched, forget_ended, mark_of, version_of, written_between


class GradientWatch:
    """Writes the lines of parameters and of their gradients into a row."""

    def __init__(self, row: LiveRow, parameters: list[tuple[nn.Module, str, int]]) -> None:
        """Watch parameters, given as layer, own name, and line in the table; the gradient's line is the next."""
        self._row = row
        self._watched = [Watched(layer, name, FIRST_TAP_LINE + tap) for layer, name, tap in parameters]
        self._running: dict[int, Backward] = {}
        self._inner = Backward(-1, {}, [])
        self._outside = False
        self._passing: list[Watched] = []
        self._unsettled: list[Watched] = []
        self._read_since = -1
        self._stages: list[Any] | None = None
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

    def _hook(self, watched: Watched, parameter: Tensor) -> bool:
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
        leave_stages(self._stages or [])

    # Inside a compiled training step backward runs under Dynamo's eyes, which has nothing to compile in these two.

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _arm(self, watched: Watched, parameter: Tensor) -> None:
        """One call per parameter and backward: note it, and ask for one callback per backward.

        The engine numbers its backwards, and nested ones (reentrant checkpointing) have numbers of their own.
        """
        task = torch._C._current_graph_task_id()
        if self._stages is None:  # now, as a pipeline's stage is made of the instrumented model
            self._stages = follow_stages(self.layers().values(), self._read_again)
        if task not in self._running and task >= 0:
            self._begin(task)
        if not self._row.recording or parameter.grad is None:  # compiled code may call for a gradient that it does not give
            return
        hooks = parameter._post_accumulate_grad_hooks
        if task < 0:  # a pipeline has FSDP2 reduce its gradients behind the last backward: no callback would come
            if self.idle:
                self._note_rates()
            self._outside, self._read_since = True, self._row.blanks
            self._guarded(partial(self._write_now, watched, parameter))
        # Maybe an optimizer in the backward: behind this hook the gradient is gone.
        elif watched.gone or (hooks is not None and len(hooks) > 1):
            self._guarded(partial(self._write_now, watched, parameter))
            self._passing.append(watched)
        else:
            self._running.setdefault(task, Backward(self._row.blanks, {}, [])).reached[id(watched)] = parameter

    def _begin(self, task: int) -> None:
        forget_ended(self._running, self._row.blanks)
        marks = [mark_of(watched.now()) for watched in self._watched] if among_ranks() else []
        self._running[task] = Backward(self._row.blanks, {}, marks)
        engine: Any = torch.autograd.Variable._execution_engine
        # Queued twice over, to run behind the callbacks of DDP and FSDP, which wait for the reduction.
        engine.queue_callback(lambda: engine.queue_callback(partial(self._read, task)))

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _read(self, task: int) -> None:
        """The callback at the end of a backward."""
        backward = self._running.pop(task, Backward(0, {}, []))
        if self._row.paused:  # this backward leads to no update of the recorded run
            return
        if self._inner.blanks == self._row.blanks:
            backward = backward._replace(reached=self._inner.reached | backward.reached)
        # Behind a backward inside of another DDP has not reduced yet: what was read is read again at the end of that.
        self._inner = backward._replace(blanks=self._row.blanks if inside_another_backward() else -1)
        self._note_rates()
        if self._row.recording:
            self._guarded(partial(self._write, backward))

    def _read_again(self) -> None:
        """A pipeline has divided what was read in this step."""
        read = {id(w): now for w in self._watched if w.blanks == self._row.blanks and (now := w.now()) is not None}
        if self._row.recording:
            self._guarded(partial(self._write, Backward(self._row.blanks, read, [])))

    def _note_rates(self) -> None:
        if self._row.before_update is not None and (note := self._row.before_update()) is not None:
            self._guarded(note)

    def _guarded(self, write: Callable[[], None]) -> None:
        """nobs must never end a run: on an error recording stops, and the recorder says so once."""
        try:
            with self._writing, unseen(), torch.no_grad():  # under create_graph the engine runs callbacks with grad mode on
                write()
        except Exception as error:
            self._row.give_up(error)

    def _write(self, backward: Backward) -> None:
        for watched in self._passing:  # a hook behind ours took the gradient away: it was an optimizer
            watched.used = getattr(watched.now(), "grad", None) is None
        self._passing.clear()
        self._note_updates()
        readings: list[Reading] = []
        for i, watched in enumerate(self._watched):  # those without a gradient in this backward too
            parameter = watched.now()
            if parameter is None:
                continue
            reached = backward.reached.get(id(watched))
            if reached is not None and is_placed(reached):  # what FSDP2 has left gathered stands in its place
                parameter = reached
            if reached is not None and reached is parameter:
                watched.gone = parameter.grad is None
                self._read_gradient(watched, parameter, readings)
            # Unfrozen since, or put in place of another; or DDP wrote what other ranks had, where this one had nothing.
            elif self._hook(watched, parameter) or (backward.before and written_between(backward.before[i], mark_of(parameter))):
                self._read_gradient(watched, parameter, readings)
            if not watched.gone and watched.valued != self._row.blanks:  # else it is updated by now
                self._read_value(watched, parameter, readings)
        _kernels.fold_all(self._row.values, readings)

    def _write_now(self, watched: Watched, parameter: Tensor) -> None:
        readings: list[Reading] = []
        self._read_gradient(watched, parameter, readings)
        if watched.valued != self._row.blanks:
            self._read_value(watched, parameter, readings)
        _kernels.fold_all(self._row.values, readings)

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

    def _read_gradient(self, watched: Watched, parameter: Tensor, readings: list[Reading]) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        line, blanks = watched.line + 1, self._row.blanks
        if watched.blanks != blanks:
            watched.floor = None
        elif watched.updated(parameter):
            watched.floor = self._row.values[line].clone()
            self._unsettled.append(watched)
        watched.blanks, watched.version, watched.used = blanks, version_of(parameter), False
        tensor = self._part(gradient, line)
        if tensor is not None:
            if watched.floor is not None:  # a later backward of the same update has overwritten it
                self._row.values[line].copy_(watched.floor)
            readings.append((tensor, line, 1, watched.floor is None))

    def _part(self, tensor: Tensor, line: int) -> Tensor | None:
        """What there is to measure of a tensor on this rank; which part of it that is goes into the row."""
        part = measurable_part(tensor)
        if is_placed(tensor) or self._row.shards:  # as a rule nothing is spread over ranks
            tap, shard = self._row.table.taps[line - FIRST_TAP_LINE], shard_of(tensor)
            if shard != WHOLE:
                self._row.shards[tap.layer, tap.site] = shard
            elif (tap.layer, tap.site) in self._row.shards:  # FSDP2 has left it gathered: no part, and no number of this rank
                return None
        return part

    def settle(self) -> None:
        """Take back the readings that came behind an update and led to none; before the row is sent."""
        if self._outside:  # no backward has read the parameters that have no gradient
            self._outside = False
            self._guarded(partial(self._write, Backward(self._row.blanks, {}, [])))
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

    def _read_value(self, watched: Watched, parameter: Tensor, readings: list[Reading]) -> None:
        watched.valued = self._row.blanks
        tensor = self._part(parameter, watched.line)
        if tensor is not None:
            readings.append((tensor, watched.line, TRAINED if parameter.requires_grad else 1, True))


def _parameters_of(optimizers: list[torch.optim.Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
