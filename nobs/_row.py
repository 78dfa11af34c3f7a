"""The row of the step that is running now: one device tensor, the slots that alias its lines, and the switch.

    line 0, 1    scalars that live on the device (the loss, the loss scale, the user's own): 16 places
    line 2       the clock: how many taps ran since the step began
    line 3 ...   one line a tap, in the order of the table

Compiled graphs write to fixed addresses, so the row never moves while a step runs; the ring copies it away afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from . import _kernels, _stats
from ._columns import COLUMNS
from ._layers import device_of, named_modules
from ._table import Shard, TapTable
from .errors import BadSetting, explain

SCALAR_LINES = 2
CLOCK_LINE = SCALAR_LINES
FIRST_TAP_LINE = SCALAR_LINES + 1
SCALARS = SCALAR_LINES * len(COLUMNS)

LOSS_SCALE = "loss_scale"
"""The scalar that divides the gradients of its step."""

_LOOK = 10
"""Where no backward reaches a watched parameter, every so many steps those are looked for that could be watched now."""


class Watch(Protocol):
    """What writes parameters and their gradients into a row: looks for new parameters, settles its readings, lets go."""

    @property
    def idle(self) -> bool: ...
    def layers(self) -> dict[str, nn.Module]: ...
    def hook(self) -> None: ...
    def settle(self) -> None: ...
    def remove(self) -> None: ...


class LiveRow:
    """Where the taps of one model write. Not copied and not pickled with a layer: there comes None.

    Attributes:
        table: what each line after the reserved ones means.
        every: the taps run on every `every`-th step.
        steps: the number of the running step, as `every` counts: from 0 where a ring took the row over.
        blanks: how often the row was blanked; readings of before are of another step, or of a dropped one.
        recording: the switch. Compiled code guards on it, so it has two values and a model two graphs at the most.
        before_update: a weak method, called at the end of each backward, before the optimizer: there the recorder notes the
            learning rate.
        watch: what writes the lines of parameters.
        stepped: the optimizers that have stepped since the last backward, by their id; `telling`: all that ever told so.
        broken: the error of nobs that ended the recording.
        owner: a weak reference to the ring that reads this row.
        shards: which part of a parameter, or of its gradient, this rank holds, by layer and site, where others hold the rest.
        written_scalars: the device scalars of the running step, and where they stand.
    """

    def __init__(self, table: TapTable, device: torch.device, every: int) -> None:
        self.table = table
        self.every = every
        self.steps = 0
        self.blanks = 0
        self.recording = True
        self.broken: Exception | None = None
        self.before_update: weakref.WeakMethod[Callable[[], None]] | None = None
        self.watch: Watch | None = None
        self.stepped: dict[int, weakref.ref[torch.optim.Optimizer]] = {}
        self.telling: dict[int, weakref.ref[torch.optim.Optimizer]] = {}
        self.owner: Callable[[], object] | None = None
        self.shards: dict[tuple[str, str], Shard] = {}
        self.written_scalars: dict[str, tuple[int, int]] = {}
        self._pauses = 0
        self._idle = 0
        self._scalar_names: dict[str, int] = {}
        self._allocate(device)

    @torch.inference_mode(False)  # wherever it is called: outside of it nobody could write to the row
    def _allocate(self, device: torch.device) -> None:
        if len(self.table):  # with NOBS_DISABLE=1 nothing will ever be measured
            _kernels.prepare(device)
        self.values = _stats.blank(FIRST_TAP_LINE + len(self.table), device)
        self.values[:FIRST_TAP_LINE] = 0
        self._blank = self.values.clone()
        self.clock = self._slot(CLOCK_LINE, 1)

    @torch.inference_mode(False)
    def _slot(self, line: int, size: int = len(COLUMNS)) -> Tensor:
        """A tensor over a line's memory, through DLPack: it has a version counter and a zero offset of its own.

        A plain view shares its counter with all other lines, and autograd then takes the write of one tap for the
        corruption of another. Lines are 32 bytes, so that each slot is aligned as CUDA graphs ask for.
        """
        view = self.values[line, :size]
        return view.clone() if view.is_meta else from_dlpack(view)

    def bind(self, layer: nn.Module, tap: int | None) -> None:
        """Give a layer the slots of its output (line `tap`; None: it has none) and of the output's gradient (the next line).

        Plain attributes, and not buffers: invisible to state_dict, DDP, FSDP and optimizers, and taken as static memory by
        CUDA graphs because they are reached through a module.
        """
        own = vars(layer)  # not by setattr, which may be the user's
        own["_nobs_row"], own["_nobs_tap"] = self, tap
        if tap is not None:
            own["_nobs_output"], own["_nobs_output_grad"] = (self._slot(FIRST_TAP_LINE + line) for line in (tap, tap + 1))

    def follow(self, model: nn.Module) -> None:
        """Go where the parameters of the model are by now: `load_state_dict(assign=True)` takes them from meta, unseen.

        Raises:
            BadSetting: they are on several devices.
        """
        layers = {name: layer for name, layer in named_modules(model).items() if vars(layer).get("_nobs_row") is self}
        device = device_of(layers, "recording a model")
        if device is not None and device != self.values.device:
            self.move(device)
            for layer in layers.values():
                self.bind(layer, vars(layer)["_nobs_tap"])

    def on_one_device(self) -> bool:
        """Whether the model moved as a whole; where a part of it moved alone recording stops, with the reason."""
        try:
            device_of({} if self.watch is None else self.watch.layers(), "recording a model")
        except BadSetting as error:
            self.give_up(RuntimeError(str(error)))  # as an error of nobs: the run goes on
            return False
        return True

    def write_scalar(self, name: str, value: Tensor) -> None:
        """Put a scalar tensor into the row without asking for its value; the first use of a name takes a free place."""
        place = self._scalar_names.setdefault(name, len(self._scalar_names))
        if place >= SCALARS:
            del self._scalar_names[name]
            raise BadSetting(
                explain(
                    f"recorder.step(..., {name}=...)",
                    f"a {place + 1}th scalar that lives on the device",
                    f"at most {SCALARS}: {', '.join(self._scalar_names)}",
                    f"{name}=float({name}), if waiting for the device is acceptable",
                )
            )
        line, column = self.written_scalars[name] = divmod(place, len(COLUMNS))
        self.values[line, column].copy_(value.detach().reshape(()))

    def owned_by(self, ring: object) -> None:
        """Begin to record for a ring, at step 0: what ran before it (a trial forward, another ring's steps) is forgotten."""
        self.owner = weakref.ref(ring)
        self.steps = 0
        self.blank()
        if self.watch is not None:  # a checkpoint loaded by assignment has replaced the parameters
            self.watch.hook()
        self._set_switch()

    def go_to(self, step: int) -> None:
        """A run goes on at this step, so `every=k` samples those that it would have sampled."""
        self.steps = step
        self._set_switch()

    def next_step(self) -> None:
        """Begin the next step: blank lines, clock at zero, and the switch for that step."""
        if self.recording and self.watch is not None:
            self._idle = self._idle + 1 if self.watch.idle else 0
            if self._idle % _LOOK == 1:  # parameters were replaced, or are frozen for now
                self.watch.hook()
        self.blank()
        self.steps += 1
        self._set_switch()

    def blank(self) -> None:
        """Forget what the running step has recorded so far.

        Writes through the row and not through the slots: their version counters stay, so a graph that saved a slot for a
        backward that is still to come (torch 2.7 to 2.10 checks) does not complain.
        """
        self.values.copy_(self._blank)
        self.written_scalars.clear()
        self.stepped.clear()
        self.blanks += 1

    def settle(self) -> None:
        """Nothing more runs in this step: make the readings final."""
        if self.watch is not None:
            self.watch.settle()

    def pause(self, paused: bool) -> None:
        """Stop the taps until further notice, or take one such word back; pauses nest."""
        self._pauses += 1 if paused else -1
        self._set_switch()

    @property
    def paused(self) -> bool:
        """Whether somebody has stopped the taps."""
        return self._pauses > 0

    def give_up(self, error: Exception) -> None:
        """Record nothing any more: nobs itself failed, and the training goes on."""
        self.broken = error
        self._set_switch()

    def _set_switch(self) -> None:
        self.recording = not self.paused and self.broken is None and self.steps % self.every == 0

    def move(self, device: torch.device) -> None:
        """Follow the model to another device. What the running step recorded so far is lost."""
        self._allocate(device)

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def rows_of(model: object) -> list[LiveRow]:
    """The rows that the layers of a model write to, through whatever wraps it: none without taps, one as a rule."""
    if not isinstance(model, nn.Module):
        return []
    found = {id(row): row for module in model.modules() if (row := vars(module).get("_nobs_row")) is not None}
    return list(found.values())
