"""All triggers over each row, and the set that the Recorder uses."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._history import Row
from .._readings import Pattern, pattern_of
from .._schema import Failure
from .._table import TapTable
from ..errors import BadSetting, explain
from .activation_growth import ActivationGrowth
from .dead_layer import DeadLayer
from .gradient_norm import GradientNorm
from .gradient_zscore import GradientZScore
from .input_shift import InputShift
from .loss_cusum import LossCusum
from .loss_spike import LossSpike
from .nonfinite import NonFinite
from .overflow_headroom import OverflowHeadroom
from .shape import Trigger
from .sieve import BLOCK, SETTLED, WORTH, Block, Bounds, Sieve, Waiting
from .weight_jump import WeightJump


class TriggerEngine:
    """The brain on its own: shows each row to each trigger.

    Args:
        grad_threshold: of GradientNorm.
        spike_factor: of LossSpike.
        triggers: more triggers, asked after the three of the house.

    Raises:
        BadSetting: a threshold that is NaN or not positive.
    """

    def __init__(self, grad_threshold: float = 100.0, spike_factor: float = 3.0, *, triggers: Iterable[Trigger] = ()) -> None:
        self._setup(triggers, (NonFinite(), GradientNorm(grad_threshold), LossSpike(spike_factor)))

    @classmethod
    def only(cls, triggers: Iterable[Trigger]) -> TriggerEngine:
        """An engine with these triggers and no others."""
        engine = cls.__new__(cls)
        engine._setup(triggers)
        return engine

    def _setup(self, triggers: Iterable[Trigger], house: Sequence[Trigger] = ()) -> None:
        if not isinstance(triggers, Iterable):
            raise BadSetting(
                explain("triggers=...", f"{triggers!r}", "a list of triggers", "triggers=[nobs.triggers.LossSpike()]")
            )
        triggers = (*house, *triggers)
        for trigger in triggers:
            if isinstance(trigger, type):
                what, instead = f"the class {trigger.__name__}", f"triggers=[{trigger.__name__}()]"
                raise BadSetting(explain("triggers=[...]", what, "an instance of it", instead))
            if not callable(getattr(trigger, "update", None)):
                raise BadSetting(
                    explain("triggers=[...]", f"{trigger!r}", "an object with update(state, row)", "nobs.triggers.LossSpike()")
                )
        self.triggers = triggers
        self._can_wait = [trigger if isinstance(trigger, Waiting) else None for trigger in triggers]
        self._states: list[Any] = [None] * len(self.triggers)
        self._waiting: list[tuple[NDArray[np.float32], Pattern]] = []
        self._sieves: list[Sieve] = []
        self._table: TapTable | None = None
        self._shown, self._next, self._gap = 0, SETTLED, 0

    @property
    def states(self) -> list[Any]:
        """What each trigger has learned, of all rows so far."""
        self._catch_up()
        return self._states

    def check(self, row: Row) -> Failure | None:
        """Show a row to every trigger; each learns from it. The first failure, in the order of the triggers, or None.

        Cost: two comparisons of the row as a rule, and some hundred NumPy calls over its sites for its first hundred rows, a row
        that stands out, and every so many rows (see `sieve`). No loop over layers. The values of those so many rows are kept.
        """
        sieve = self._sieve_that_holds(row)
        if sieve is None:
            self._catch_up()
            self._shown += 1
        else:
            self._waiting.append((row.values, sieve.pattern))
        first = None
        for i, trigger in enumerate(self.triggers):
            if sieve is not None and sieve.waits[i]:
                continue
            answer: Any = trigger.update(self._states[i], row)  # a user's: it may be anything
            if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], (Failure, type(None)))):
                name = type(trigger).__name__
                pair = "a pair (state, nobs.Failure or None)"
                raise BadSetting(explain(f"{name}.update(state, row)", repr(answer), pair, "return state, None"))
            self._states[i], failure = answer
            first = first or (failure and _of_python(failure, type(trigger).__name__))
        if len(self._waiting) >= BLOCK:
            self._catch_up()
        return first

    def _sieve_that_holds(self, row: Row) -> Sieve | None:
        """The sieve of rows that run like this one, if nothing in the row is beyond it."""
        if row.table is not self._table:  # another model's: what the triggers know is not of its sites
            self._table, self._shown, self._next = row.table, 0, SETTLED
        if self._shown < self._next or not any(self._can_wait):
            return None
        if self._sieves and self._sieves[0].holds(row):
            return self._sieves[0]
        pattern = pattern_of(row.table, row.values)
        sieve = next((sieve for sieve in self._sieves if sieve.pattern is pattern), None) or self._new_sieve(row, pattern)
        self._sieves = [sieve, *(other for other in self._sieves if other is not sieve)]
        if sieve.holds(row):
            return sieve
        # Where sieves hold next to nothing they are not worth what they cost: then there are some rows without.
        self._gap = min(2 * self._gap + 1, BLOCK) if len(self._waiting) < WORTH else 0
        self._next = self._shown + 1 + self._gap
        return None

    def _new_sieve(self, row: Row, pattern: Pattern) -> Sieve:
        """For the states as they are, and rows that run like this one."""
        for sieve in self._sieves:
            if sieve.pattern.is_like(pattern):
                return sieve.resized(pattern)
        bounds = Bounds(row)
        waits = tuple(
            trigger is not None and trigger.bounds(state, row, bounds)
            for trigger, state in zip(self._can_wait, self._states, strict=True)
        )
        if self._waiting and waits != self._sieves[0].waits:  # who has waited must know of it first
            self._catch_up()
            return self._new_sieve(row, pattern)
        return Sieve.of(row, bounds, waits)

    def _catch_up(self) -> None:
        """Let the triggers learn of the rows that wait."""
        if self._waiting:
            block = Block(self._sieves[0].table, *zip(*self._waiting, strict=True))
            learned = [
                trigger.learned(state, block) if trigger is not None and waits else state
                for trigger, state, waits in zip(self._can_wait, self._states, self._sieves[0].waits, strict=True)
            ]
            self._states, self._waiting = learned, []
        self._sieves = []

    def state(self) -> list[tuple[str, Any]]:
        """What the triggers have learned, each under the name of its class."""
        return [(type(trigger).__name__, state) for trigger, state in zip(self.triggers, self.states, strict=True)]

    def load_state(self, saved: Sequence[tuple[str, Any]]) -> None:
        """Go on with what `state` gave.

        Raises:
            BadSetting: it is of other triggers, or of something else.
        """
        pairs = all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in saved)
        names, there = [name for name, _ in saved] if pairs else saved, [name for name, _ in self.state()]
        if names != there:
            what, expected = f"a state of the triggers {names}", f"one of {there}"
            raise BadSetting(explain("loading the state of triggers", what, expected, "triggers=[...] as in the saved run"))
        self._states, self._waiting, self._sieves = [state for _, state in saved], [], []
        self._shown, self._next = 0, SETTLED


DEFAULT = (
    NonFinite(),
    WeightJump(),
    OverflowHeadroom(),
    ActivationGrowth(),
    GradientNorm(100.0, factor=10.0),
    GradientZScore(),
    InputShift(),
    DeadLayer(),
    LossSpike(),
    LossCusum(),
)
"""What the Recorder uses."""

SEVERAL = tuple(trigger for trigger in DEFAULT if not isinstance(trigger, LossCusum))
"""What it uses with several optimizers: the loss of one of several players goes where the others let it."""


def _of_python(failure: Failure, name: str) -> Failure:
    """The failure with numbers of Python, where a trigger of a user's has measured with NumPy or torch.

    Raises:
        BadSetting: a field is no number, or no text.
    """
    try:
        value, threshold = (None if number is None else float(number) for number in (failure.value, failure.threshold))
        known = replace(failure, step=operator.index(failure.step), value=value, threshold=threshold)
    except (TypeError, ValueError, RuntimeError) as error:
        got, expected = f"{failure!r:.200} ({error})", "a whole step, and numbers or None for value and threshold"
        raise BadSetting(explain(f"{name}.update(state, row)", got, expected, "nobs.Failure(name, row.step, message)")) from None
    texts = (failure.trigger, failure.message, failure.layer or "", failure.site or "")
    if not all(isinstance(text, str) for text in texts):
        got = f"{failure!r:.200}"
        raise BadSetting(explain(f"{name}.update(state, row)", got, "texts, or None for layer and site", "layer=tap.layer"))
    return known


def settings_of(trigger: object) -> tuple[str, dict[str, Any]]:
    """The name of a trigger and its settings, plain values; of one that is no dataclass its name only."""
    names = [field.name for field in dataclasses.fields(trigger)] if dataclasses.is_dataclass(trigger) else []
    values = {name: getattr(trigger, name) for name in names}
    return type(trigger).__name__, {name: v for name, v in values.items() if isinstance(v, (bool, int, float, type(None)))}


def with_settings(saved: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[Trigger, ...]:
    """The triggers of the house among those that `settings_of` described; one whose settings do not fit has its usual ones."""
    usual = {type(trigger).__name__: trigger for trigger in DEFAULT}
    return tuple(_with(usual[name], settings) for name, settings in saved if name in usual)


def _with(usual: Any, settings: Mapping[str, Any]) -> Trigger:
    try:
        return type(usual)(**settings)  # type: ignore[no-any-return]
    except (TypeError, ValueError):
        return usual  # type: ignore[no-any-return]
