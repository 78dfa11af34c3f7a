"""From the last steps to findings: what failed first, where, why, how sure, and what to do.

Pure functions. Each rule looks at the evidence (a case, see `_case` and `_break`) and returns a finding or None. The rules
stand in the order in which they speak: what is certain by itself first, what jumped in one step next, and what took several
steps last. How sure each is was measured (see `calibration`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from .._case import Case
from .._history import History
from .._log import complain
from .._schema import Failure, Finding, Report
from ._batch import bad_batch, labels
from ._exception import no_graph, wrong_indices, wrong_labels
from ._finding import Evidence, Told, without_layer
from ._gradients import gradient_grew, gradient_jump, optimizer_state
from ._nonfinite import nonfinite_born, nonfinite_loss
from ._outputs import headroom, output_grew, output_jump
from ._rate import rate_constant, rate_jumped, rate_rose
from ._silence import dead_output, fed_with_zeros, silent_gradient
from ._weights import all_weights, weight_corruption, weight_crept

Rule = Callable[[Evidence], Told | None]

RULES: tuple[Rule, ...] = (
    no_graph,
    wrong_labels,
    wrong_indices,
    rate_jumped,
    rate_rose,
    weight_corruption,
    all_weights,
    nonfinite_loss,
    nonfinite_born,
    dead_output,
    bad_batch,
    fed_with_zeros,
    output_jump,
    labels,
    optimizer_state,
    gradient_jump,
    silent_gradient,
    weight_crept,
    headroom,
    output_grew,
    rate_constant,
    gradient_grew,
)


def diagnose(
    history: History,
    failure: Failure | None = None,
    *,
    exception: str | None = None,
    second_moment_decay: float | None = None,
    ranks: int = 1,
) -> tuple[Finding, ...]:
    """Findings about a history, the one to believe first. Without a failure only NaN and Inf are: growth may be healthy.

    Args:
        history: the last steps; what came after the failing step is not looked at.
        failure: what a trigger saw, if one did.
        exception: the text of what ended the run, if it was no trigger.
        second_moment_decay: beta2 of the optimizer, if it is of Adam's family.
        ranks: how many there are, whose gradients may have been reduced with these.
    """
    return tuple(told.finding for told in told_by_rules(history, failure, exception, second_moment_decay, ranks))


def diagnosed(report: Report) -> Report:
    """The report with its findings. A history without a diagnosis is still the history: this never raises."""
    decay = report.run.get("second_moment_decay")
    known = decay if isinstance(decay, float) else None
    try:
        findings = diagnose(
            report.history,
            report.failure,
            exception=report.exception,
            second_moment_decay=known,
            ranks=report.world_size,
        )
    except Exception as error:
        complain("could not diagnose the failure", error)
        return report
    return replace(report, findings=findings)


def told_by_rules(
    history: History, failure: Failure | None, exception: str | None, second_moment_decay: float | None, ranks: int = 1
) -> tuple[Told, ...]:
    """The same with the names of the rules, which the benchmark counts."""
    if not len(history):
        return ()
    seen = Evidence(Case(history, failure), exception, second_moment_decay, ranks)
    told = [said for rule in RULES if (said := rule(seen)) is not None]
    if not told and failure is not None:
        told = [_undecided(seen, failure)]
    known: dict[tuple[str, str | None], Told] = {}
    for said in told:  # two rules may find the same: the first to speak stays, in its place
        known.setdefault((said.finding.cause, said.finding.layer), said)
    return tuple(_shared_out(list(known.values())))


def _shared_out(told: list[Told]) -> Iterator[Told]:
    """Each with the confidence that those before it leave over: a rule was counted where it spoke first."""
    left = 1.0
    for said in told:
        confidence = left * said.finding.confidence
        left -= confidence
        yield replace(said, finding=replace(said.finding, confidence=confidence))


def _undecided(seen: Evidence, failure: Failure) -> Told:
    """`unknown`, and what the numbers exclude."""
    case = seen.case
    clean = "no NaN or Inf before the end" if case.first_bad is None else "the NaN came late"
    usual = "every norm as usual" if case.judges_norms else f"{len(case.readings)} recorded steps, too few to know a usual range"
    out = f"{len(case.leavers)} sites out of their usual range" if case.leavers else usual
    evidence = f"the numbers do not decide: {clean}, {out}"
    told = without_layer("undecided", "unknown", failure.site, failure.step, evidence)
    return replace(told, finding=replace(told.finding, layer=failure.layer))
