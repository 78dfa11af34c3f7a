"""Made rows of three layers, for triggers to judge."""

import numpy as np

from nobs._columns import COLUMNS, KINDS
from nobs._history import Row
from nobs._table import Tap, TapTable

SITES = ("output", "output.grad", "weight", "weight.grad")
TABLE = TapTable(
    tuple(Tap(f"layer{i}", "Linear", site, kind) for i in (2, 0, 1) for site, kind in zip(SITES, KINDS, strict=True))
)


def row(step=0, loss=1.0, scalars=(), **changes):
    """A healthy row of three layers that run in the order 0, 1, 2; `layer0_weight_grad=dict(norm=5)` changes a line."""
    values = np.zeros((len(TABLE), len(COLUMNS)), dtype=np.float32)
    for line, tap in enumerate(TABLE.taps):
        values[line] = (1.0, 0.5, 0, 0, 0, 0, 10, 1 + int(tap.layer[-1]))
    for key, columns in changes.items():
        layer, _, site = key.partition("_")
        for name, value in columns.items():
            values[TABLE.line(layer, site.replace("_", ".")), COLUMNS.index(name)] = value
    return Row(step, 0.0, {"loss": loss, **dict(scalars)}, TABLE, values)


def judge(trigger, losses):
    """The steps at which a trigger fires on a series of losses."""
    state, fired = None, []
    for step, loss in enumerate(losses):
        state, failure = trigger.update(state, row(step, loss))
        if failure:
            fired.append(step)
    return fired
