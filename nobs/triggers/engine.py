"""All triggers over each row, and the set that the Recorder uses."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .._history import Row
from .._schema import Failure
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
        self.states: list[Any] = [None] * len(self.triggers)

    def check(self, row: Row) -> Failure | None:
        """Show a row to every trigger; each learns from it. The first failure, in the order of the triggers, or None.

        Cost: a few NumPy calls over the row, no loop over layers.
        """
        first = None
        for i, trigger in enumerate(self.triggers):
            answer: Any = trigger.update(self.states[i], row)  # a user's: it may be anything
            if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], (Failure, type(None)))):
                name = type(trigger).__name__
                pair = "a pair (state, nobs.Failure or None)"
                raise BadSetting(explain(f"{name}.update(state, row)", repr(answer), pair, "return state, None"))
            self.states[i], failure = answer
            first = first or (failure and _of_python(failure, type(trigger).__name__))
        return first

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
        self.states = [state for _, state in saved]


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
