"""The brain: judges rows one by one, in order, on the host.

A trigger is frozen settings with one pure method, `update(state, row) -> (state, failure or None)`. The first state is
None; a state is made of numbers, strings, lists, tuples, dicts and NumPy arrays, so that it goes into a checkpoint. Judging
step 10 million costs what judging step 10 cost. A trigger of your own is any object of that shape:

    class Stuck:
        def update(self, state, row):
            same = row.scalars["loss"] == (state or {}).get("loss")
            failure = nobs.Failure("Stuck", row.step, "the loss does not move") if same else None
            return {"loss": row.scalars["loss"]}, failure

What judges is never judged by itself: a spike or a NaN does not enter the average that it was compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ._columns import KINDS, OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD
from ._schema import Failure, Row, Tap
from .errors import BadSetting, explain


class Trigger(Protocol):
    """What the engine asks of a trigger."""

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]: ...


def _positive(trigger: object, *names: str) -> None:
    """Refuse settings that are NaN, infinite or not positive."""
    for name in names:
        value = getattr(trigger, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            default = next(f.default for f in fields(trigger) if f.name == name)  # type: ignore[arg-type]
            shown = 10.0 if default is None else default
            raise BadSetting(
                explain(
                    f"{type(trigger).__name__}({name}=...)", f"{name}={value!r}", "a positive finite number", f"{name}={shown}"
                )
            )


class LossBaseline(NamedTuple):
    """State of LossSpike: losses seen, their moving average and spread, both as they were at the lowest average, and the
    largest average."""

    seen: int
    mean: float
    spread: float
    low: float
    low_spread: float
    high: float


@dataclass(frozen=True)
class LossSpike:
    """The loss rose far above its moving average, in one step or in a slow climb.

    A loss is a spike when it is above `factor` times its average and more than `spreads` mean absolute deviations above it.
    At an average near zero or below, where a factor says nothing, the spread alone decides. A climb too slow for that
    is caught by the average itself, against the lowest that it had over about `memory` steps. Non-finite losses are
    NonFinite's. After Lightning's SpikeDetection and llm-foundry's KillLossSpike, without what disarms them: here neither a
    spike nor a NaN enters the average.

    Args:
        factor: how many times the average.
        spreads: how many mean absolute deviations above it.
        warmup: steps that only build the average.
        window: the average's length in steps.
        memory: how long the lowest average is remembered, in steps.
    """

    factor: float = 3.0
    spreads: float = 10.0
    warmup: int = 10
    window: int = 20
    memory: int = 10_000

    def __post_init__(self) -> None:
        _positive(self, "factor", "spreads", "warmup", "window", "memory")

    def update(self, state: LossBaseline | None, row: Row) -> tuple[LossBaseline | None, Failure | None]:
        loss = row.scalars.get("loss", math.nan)
        if not math.isfinite(loss):
            return state, None
        if state is None:
            return LossBaseline(1, loss, 0.0, math.inf, 0.0, abs(loss)), None
        state = LossBaseline(*state)  # a checkpoint may have made a plain list of it
        failure = self._judge(state, loss, row.step) if state.seen >= self.warmup else None
        return (state if failure else self._learn(state, loss)), failure

    def _limit(self, state: LossBaseline, base: float, spread: float) -> float:
        """Above this a loss is too far from `base`; infinite while a loss of zero throughout gives no scale."""
        spread = max(spread, 0.003 * state.high)
        return max(base + self.spreads * spread, self.factor * base) if spread else math.inf

    def _judge(self, state: LossBaseline, loss: float, step: int) -> Failure | None:
        limit = self._limit(state, state.mean, state.spread)
        if loss > limit:
            message = f"loss {loss:.4g} at step {step}, {_against(loss, state.mean)}"
            return Failure("LossSpike", step, message, value=loss, threshold=limit)
        limit = self._limit(state, state.low, state.low_spread)
        if state.mean > limit and loss > state.low:
            message = f"loss climbed to {loss:.4g} by step {step}, {_against(state.mean, state.low, 'its lowest average')}"
            return Failure("LossSpike", step, message, value=state.mean, threshold=limit)
        return None

    def _learn(self, state: LossBaseline, loss: float) -> LossBaseline:
        seen = state.seen + 1
        weight = max(1 / seen, 1 / self.window)  # a plain mean at first, so that the first loss is not remembered
        mean = state.mean + weight * (loss - state.mean)
        spread = state.spread + weight * (abs(loss - state.mean) - state.spread)
        high = max(abs(mean), state.high * (1 - 1 / self.memory))
        if seen < self.warmup:
            return LossBaseline(seen, mean, spread, math.inf, spread, high)
        if mean <= state.low:
            return LossBaseline(seen, mean, spread, mean, spread, high)
        forget = 1 / self.memory  # the lowest average rises slowly, so that a run may settle on a higher loss
        low = state.low + forget * (mean - state.low)
        low_spread = state.low_spread + forget * (spread - state.low_spread)
        return LossBaseline(seen, mean, spread, low, low_spread, high)


def _against(value: float, base: float, what: str = "its moving average") -> str:
    if base > 0:
        return f"{value / base:.3g} times {what} of {base:.4g}"
    return f"{value - base:.3g} above {what} of {base:.4g}"


@dataclass(frozen=True)
class GradientNorm:
    """A parameter's gradient norm (L2, unscaled, unclipped) is above a threshold; names the layer.

    Args:
        threshold: the norm.
        factor: if given, the norm must also be this many times the site's own baseline, so that a healthy run whose
            gradients are large sums lives. The baseline is a moving average of the logarithm that a failing norm does
            not enter.
        warmup: with a factor, steps that only build the baseline.
        window: the baseline's length in steps.
    """

    threshold: float = 100.0
    factor: float | None = None
    warmup: int = 2
    window: int = 20

    def __post_init__(self) -> None:
        _positive(self, "threshold", "warmup", "window", *(["factor"] if self.factor is not None else []))

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]:
        lines = row.table.of_kind[PARAMETER_GRAD]
        norms = np.abs(row.kind(PARAMETER_GRAD, "norm"))
        if state is None or len(state["count"]) != len(lines):
            state = {"count": np.zeros(len(lines)), "log": np.zeros(len(lines))}
        high = norms > self.threshold  # NaN compares false: where nothing was finite, NonFinite speaks
        ratio = np.full(len(lines), np.inf)
        if self.factor is not None:
            known = state["count"] >= self.warmup
            ratio = np.where(known, norms / np.exp(state["log"]), 0)
            high &= ratio > self.factor
        state = self._learn(state, norms, ~high)
        return state, self._failure(row, lines, norms, ratio, high) if high.any() else None

    def _learn(self, state: Any, norms: NDArray[np.floating[Any]], healthy: NDArray[np.bool_]) -> Any:
        learns = healthy & np.isfinite(norms) & (norms > 0)
        count = state["count"] + learns
        weight = np.maximum(1 / np.maximum(count, 1), 1 / self.window)
        step = np.log(np.where(learns, norms, 1)) - state["log"]
        return {"count": count, "log": np.where(learns, state["log"] + weight * step, state["log"])}

    def _failure(self, row: Row, lines: Any, norms: Any, ratio: Any, high: Any) -> Failure:
        """Of the sites above, the one furthest above its own baseline; without baselines, the largest."""
        worst = int(np.argmax(np.where(high, norms if self.factor is None else ratio, -np.inf)))
        tap = row.table.taps[lines[worst]]
        norm = float(norms[worst])
        more = f", {ratio[worst]:.3g} times its baseline" if self.factor is not None else ""
        others = f" ({int(high.sum()) - 1} more above)" if high.sum() > 1 else ""
        message = f"gradient norm {norm:.4g} of {tap.layer}.{tap.site.removesuffix('.grad')} at step {row.step}{more}{others}"
        return Failure("GradientNorm", row.step, message, tap.layer, tap.site, norm, self.threshold)


@dataclass(frozen=True)
class NonFinite:
    """The loss is NaN or infinite, or a NaN or Inf is at any site.

    -Inf in an output is legal, attention masks are made of it. Under a GradScaler non-finite gradients are how it finds its
    scale: they count only when they last longer than `patience` steps.

    Args:
        patience: with a loss scale in the row, steps in a row that gradients may be non-finite.
    """

    patience: int = 20

    def __post_init__(self) -> None:
        _positive(self, "patience")

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]:
        counts = self._bad_counts(row)
        skipped = 0
        if "loss_scale" in row.scalars and (counts[PARAMETER_GRAD].any() or counts[OUTPUT_GRAD].any()):
            skipped = int(state or 0) + 1
            if skipped <= self.patience:
                counts = {kind: c if kind in (OUTPUT, PARAMETER) else np.zeros_like(c) for kind, c in counts.items()}
        return skipped, self._loss_failure(row) or self._site_failure(row, counts)

    def _bad_counts(self, row: Row) -> dict[str, NDArray[np.floating[Any]]]:
        counts = {kind: np.nan_to_num(row.kind(kind, "nonfinite")) for kind in KINDS}
        counts[OUTPUT] -= np.nan_to_num(row.kind(OUTPUT, "neginf"))
        return counts

    def _loss_failure(self, row: Row) -> Failure | None:
        loss = row.scalars.get("loss", 0.0)
        if math.isfinite(loss):
            return None
        return Failure("NonFinite", row.step, f"loss is {_word(loss)} at step {row.step}", value=loss)

    def _site_failure(self, row: Row, counts: dict[str, NDArray[np.floating[Any]]]) -> Failure | None:
        """The first site in the order of a step: parameters, outputs forward, gradients backward."""
        for kind, key in ((PARAMETER, 1), (OUTPUT, 1), (OUTPUT_GRAD, -1), (PARAMETER_GRAD, -1)):
            bad = np.flatnonzero(counts[kind])
            if not bad.size:
                continue
            lines = row.table.of_kind[kind][bad]
            order = execution_order(row)
            place = min(range(len(bad)), key=lambda i: key * order[row.table.taps[lines[i]].layer])
            tap, count = row.table.taps[lines[place]], float(counts[kind][bad[place]])
            return Failure("NonFinite", row.step, self._message(row, tap, count), tap.layer, tap.site, count, 0.0)
        return None

    def _message(self, row: Row, tap: Tap, count: float) -> str:
        nan, elements = row[tap.layer, tap.site, "nan"], row[tap.layer, tap.site, "elements"]
        what = "NaN" if nan == count else "Inf" if nan == 0 else "NaN or Inf"
        return f"{count:.0f} of {elements:.0f} values {what} in {tap.layer} ({tap.site}) at step {row.step}"


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"


def execution_order(row: Row) -> dict[str, float]:
    """layer -> the clock at its first run in this step, infinite where it did not run."""
    lines = row.table.of_kind[OUTPUT]
    order = {tap.layer: math.inf for tap in row.table.taps}
    order.update({row.table.taps[line].layer: float(row.values[line, -1]) for line in lines})
    return order


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
        self._setup((NonFinite(), GradientNorm(grad_threshold), LossSpike(spike_factor), *triggers))

    @classmethod
    def only(cls, triggers: Iterable[Trigger]) -> TriggerEngine:
        """An engine with these triggers and no others."""
        engine = cls.__new__(cls)
        engine._setup(tuple(triggers))
        return engine

    def _setup(self, triggers: Sequence[Trigger]) -> None:
        for trigger in triggers:
            if not callable(getattr(trigger, "update", None)):
                raise BadSetting(
                    explain("triggers=[...]", f"{trigger!r}", "an object with update(state, row)", "nobs.triggers.LossSpike()")
                )
        self.triggers = tuple(triggers)
        self.states: list[Any] = [None] * len(self.triggers)

    def check(self, row: Row) -> Failure | None:
        """Show a row to every trigger; each learns from it. The first failure, in the order of the triggers, or None.

        Cost: a few NumPy calls over the row, no loop over layers.
        """
        first = None
        for i, trigger in enumerate(self.triggers):
            self.states[i], failure = trigger.update(self.states[i], row)
            first = first or failure
        return first


DEFAULT = (NonFinite(), GradientNorm(100.0, factor=10.0), LossSpike())
"""What the Recorder uses."""
