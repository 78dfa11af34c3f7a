"""What an exception that ended the run says by itself: texts that torch uses."""

from __future__ import annotations

import re

import numpy as np

from .._case import Event
from .._columns import FIRST, OUTPUT
from ._finding import Evidence, Told, finding, without_layer

LABELS = re.compile(r"target.* (is )?out of (bounds|range)|class values must be|should be between 0 and 1", re.IGNORECASE)
INDICES = re.compile(r"index out of range in self|indexSelect|srcIndex < srcSelectDimSize", re.IGNORECASE)
NO_GRAPH = re.compile(r"does not require grad and does not have a grad_fn")


def no_graph(seen: Evidence) -> Told | None:
    """The loss hangs on no parameter: the last layer is cut off, and all before it."""
    if seen.exception is None or not NO_GRAPH.search(seen.exception):
        return None
    ran = [event for event in _outputs(seen) if np.isfinite(seen.case.values[event.row, event.line, FIRST])]
    evidence = "backward found no graph behind the loss: what the last layer gave was detached, or made without grad"
    if not ran:
        return without_layer("no_graph", "vanishing_gradient", None, _last_step(seen), evidence)
    return finding(seen, "no_graph", "vanishing_gradient", max(ran), evidence)


def wrong_labels(seen: Evidence) -> Told | None:
    """The loss refused its targets."""
    if seen.exception is None or not LABELS.search(seen.exception):
        return None
    evidence = f"the loss refused the labels of step {_last_step(seen)}: {seen.exception[:200]}"
    return without_layer("wrong_labels", "bad_batch", "loss", _last_step(seen), evidence)


def wrong_indices(seen: Evidence) -> Told | None:
    """An embedding was asked for a row that it does not have; it did not get to run."""
    if seen.exception is None or not INDICES.search(seen.exception):
        return None
    embeddings = [event for event in _outputs(seen) if seen.case.tap(event).layer_type.startswith("Embedding")]
    silent = [event for event in embeddings if not np.isfinite(seen.case.values[event.row, event.line, FIRST])]
    evidence = f"an index of step {_last_step(seen)} is outside of its table: {seen.exception[:200]}"
    if not embeddings:
        return without_layer("wrong_indices", "bad_batch", None, _last_step(seen), evidence)
    return finding(seen, "wrong_indices", "bad_batch", min(silent or embeddings), evidence)


def _outputs(seen: Evidence) -> list[Event]:
    """The outputs of all layers in the last step."""
    return [seen.case.event(seen.case.end, int(line)) for line in seen.case.history.table.of_kind[OUTPUT]]


def _last_step(seen: Evidence) -> int:
    return int(seen.case.history.steps[-1])
