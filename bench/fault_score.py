"""What nobs says about a recorded run, and whether it was right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from fault_runs import Case
from torch import Tensor, nn

import nobs
from nobs._columns import FIRST, NAN, NORM, POSINF
from nobs._history import History
from nobs._row import rows_of
from nobs._schema import Failure
from nobs._settings import engine
from nobs.diagnosis import Told, told_by_rules

CAPACITY = 100
"""The steps that a Recorder keeps by default: what is older the diagnosis does not see."""
TIMES = 2.0
"""A run departs from its twin where a norm is so many times larger or smaller for five steps ..."""
ONCE = 10.0
"""... or so many times in one step, ..."""
LOSS = 0.2
"""... or where the loss is off by this share of the twin's for five steps, or anything is not finite."""


@dataclass(frozen=True)
class Recorded:
    """A whole run: its rows, its losses, the exception that ended it, and what the diagnosis knows of the optimizer."""

    history: History
    losses: list[float]
    exception: str | None
    second_moment_decay: float | None
    optimizers: int


def record(train: Callable[[Any], list[float]]) -> Recorded:
    """Train with a Recorder that judges nothing and forgets nothing."""
    kept: dict[str, Any] = {"exception": None}

    @contextmanager
    def recording(model: nn.Module, *, optimizer: Any, scaler: Any = None) -> Iterator[Callable[[Tensor], None]]:
        if not rows_of(model):
            nobs.instrument(model)
        recorder = nobs.Recorder(model, optimizer=optimizer, scaler=scaler, triggers=(), capacity=1000)
        kept["recorder"] = recorder
        with recorder:
            try:
                yield recorder.step
            except (IndexError, RuntimeError) as error:  # what the Recorder does, short of the dump: the half step counts
                kept["exception"] = f"{type(error).__name__}: {error}"
                recorder._ring.close_step(recorder._step, {})

    losses = train(recording)
    facts = kept["recorder"]._ring.facts
    decay = facts.get("second_moment_decay")
    return Recorded(kept["recorder"].history(), losses, kept["exception"], decay, kept["recorder"]._update.optimizers)


def judged(run: Recorded) -> tuple[Failure | None, tuple[Told, ...]]:
    """What the default triggers and the diagnosis say: as the Recorder does, row by row, with the last steps alone."""
    usual = engine(None, run.optimizers)
    for i, row in enumerate(run.history.rows()):
        if (failure := usual.check(row)) is not None:
            return failure, told_by_rules(_until(run.history, i), failure, None, run.second_moment_decay)
    if run.exception is None:
        return None, ()
    return None, told_by_rules(_until(run.history, len(run.history) - 1), None, run.exception, run.second_moment_decay)


def _until(history: History, last: int) -> History:
    """The last CAPACITY rows up to one."""
    part = slice(max(0, last + 1 - CAPACITY), last + 1)
    return History(
        history.steps[part],
        history.table,
        history.values[part],
        {name: values[part] for name, values in history.scalars.items()},
        {name: values[part] for name, values in history.given.items()},
        history.batches[part],
    )


@dataclass(frozen=True)
class Outcome:
    """One case, scored. None where the question does not arise: no layer is guilty, no site is, the loss never shows it."""

    case: Case
    trigger: str | None
    rule: str | None
    cause: str | None
    layer: str | None
    confidence: float | None
    detected: bool
    delay: int | None
    lead: int | None
    layer_first: bool | None
    layer_top3: bool | None
    site_right: bool | None
    cause_right: bool
    evidence: str

    @property
    def right(self) -> bool:
        """The cause, and the layer where one is guilty."""
        return self.cause_right and self.layer_first is not False


def departs(case: Case, faulty: Recorded, twin: Recorded) -> bool:
    """Whether a run left its twin from the step of the fault on: its loss, or, where a layer is guilty, any norm."""
    end = min(len(faulty.history), len(twin.history))
    a, b = (run.history.values[case.at : end].astype(np.float64) for run in (faulty, twin))
    if faulty.exception or end - case.at < 5 or (_bad(a) and not _bad(b)):
        return True
    off = np.abs(_median_of_five(np.subtract(faulty.losses[case.at : end], twin.losses[case.at : end])))
    if (off > LOSS * np.median(np.abs(twin.losses[case.at : end]))).any() or not np.isfinite(faulty.losses).all():
        return True
    if case.layer is None and case.of.site is None:
        return False
    ran = [np.where(np.isfinite(x[..., FIRST]), x[..., NORM], 0.0) for x in (a, b)]
    ratio = np.log10((ran[0] + 1e-30) / (ran[1] + 1e-30))
    return bool((np.abs(_median_of_five(ratio)) > np.log10(TIMES)).any() or (np.abs(ratio) > np.log10(ONCE)).any())


def _bad(values: np.ndarray) -> bool:
    return bool((values[..., [NAN, POSINF]] > 0).any())


def _median_of_five(x: np.ndarray) -> np.ndarray:
    return np.median(np.lib.stride_tricks.sliding_window_view(x, 5, axis=0), axis=-1)


def score(case: Case, faulty: Recorded, twin: Recorded) -> Outcome:
    """Compare what was said with what was planted."""
    failure, told = judged(faulty)
    detected = failure.step >= case.at if failure is not None else faulty.exception is not None
    first = told[0].finding if told else None
    named = list(dict.fromkeys(t.finding.layer for t in told if t.finding.layer is not None))
    shown = _shown_by_loss(case, faulty, twin)
    at = failure.step if failure is not None else case.at
    right = None if case.layer is None else first is not None and first.layer == case.layer
    return Outcome(
        case=case,
        trigger=failure.trigger if failure else "exception" if faulty.exception else None,
        rule=told[0].rule if told else None,
        cause=first.cause if first else None,
        layer=first.layer if first else None,
        confidence=first.confidence if first else None,
        detected=detected,
        delay=at - case.at if detected else None,
        lead=shown - at if detected and shown is not None else None,
        layer_first=right,
        layer_top3=None if case.layer is None else case.layer in named[:3],
        site_right=None if case.of.site is None else first is not None and _site(first.site) == case.of.site,
        cause_right=first is not None and first.cause in case.of.causes,
        evidence=first.evidence if first else "",
    )


def _site(site: str | None) -> str | None:
    """The kind of a site, as the table has it."""
    if site is None or site in ("loss", "output"):
        return site
    return "gradient" if site.endswith(".grad") else "parameter"


def _shown_by_loss(case: Case, faulty: Recorded, twin: Recorded) -> int | None:
    """The step at which a look at the loss would tell: not finite, or half as much again as the twin ever had since."""
    for step, loss in enumerate(faulty.losses[case.at :], case.at):
        if not np.isfinite(loss) or loss > 1.5 * max(twin.losses[max(0, case.at - 20) : step + 1]):
            return step
    return None
