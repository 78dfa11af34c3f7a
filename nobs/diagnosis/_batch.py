"""What came from outside: a batch that is not like the others, labels that do not belong to it."""

from __future__ import annotations

from .._case import Event
from .._columns import ABSMAX
from ._finding import Evidence, Told, finding, without_layer
from ._gradients import another_scale
from ._outputs import growing, grown, leaves_half


def bad_batch(seen: Evidence) -> Told | None:
    """The input changed: the first layer's output is out in one step, with the weights as they were."""
    broke, case = seen.broke, seen.case
    if broke is None or broke.parameters:
        return None
    if broke.rows_used is not None and not broke.outputs:
        return _few_words(seen, case.event(broke.row, broke.rows_used[0]), broke.rows_used[1])
    if broke.entry is None:
        return None
    event, peak = broke.entry, seen.breaks.entry_shift(broke.row)
    evidence = f"at step {case.step(event)} the output of {case.tap(event).layer}, the first layer, is at once"
    evidence += f" {seen.breaks.times(event)}" + (f", and its largest value {10**peak:.3g} times" if peak else "")
    later = case.values[event.row : case.end + 1, event.line, ABSMAX]
    if later[-1] > 2 * later[0] and leaves_half(seen, event):  # a batch is another one at once, and does not go on growing
        return grown(seen, event, evidence)
    batch = case.history.batches[event.row] if case.history.batches else None
    named = f"; the batch was {batch}" if batch else ""
    return finding(seen, "bad_batch", "bad_batch", event, f"{evidence}, while no weight had moved{named}")


def _few_words(seen: Evidence, event: Event, jump: float) -> Told:
    """An embedding is asked for a few of its rows only."""
    case = seen.case
    evidence = f"at step {case.step(event)} {10**jump:.2g} times as many rows of {case.tap(event).layer} as usual were looked up,"
    evidence += " while every output and weight was as usual: the batch repeats itself"
    return finding(seen, "few_words", "bad_batch", event, evidence)


def labels(seen: Evidence) -> Told | None:
    """The loss alone jumped: every output of that step was as usual, so the labels were not."""
    broke, case = seen.broke, seen.case
    if broke is None or not broke.loss or broke.parameters or broke.outputs or growing(seen, broke.row) or seen.went_silent:
        return None
    scaled = another_scale(seen, broke)
    if (scaled is not None and seen.second_moment_decay is not None) or not case.judges_norms:
        return None
    loss, row = case.history.scalars["loss"], broke.row
    step, read = int(case.history.steps[row]), int(case.history.steps[case.readings[case.readings <= row][-1]])
    when = "of that step" if read == step else f"until step {read}, the last that was recorded,"
    evidence = f"the loss went from {loss[max(0, row - 1)]:.4g} to {loss[row]:.4g} at step {step}, while every output {when}"
    why = "the labels were not" if scaled is None else f"loss and gradients were multiplied by about {scaled:.3g}"
    return without_layer("labels", "loss_spike", "loss", step, f"{evidence} was as usual: {why}")
