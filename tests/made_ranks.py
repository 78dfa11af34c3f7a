"""Black boxes of made ranks, each a few layers over some steps, healthy but for what a test does to them."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
from boxes import GONE

from nobs._blackbox import Header, Status
from nobs._blackbox._writer import BoxFile
from nobs._columns import COLUMNS, KINDS
from nobs._history import History
from nobs._schema import OTHER_RANK, Failure, Report
from nobs._table import Tap, TapTable

SITES = ("output", "output.grad", "weight", "weight.grad")
LAYERS = ("embed", "fc1", "fc2", "head")
FAILS = 112


@dataclass
class Rank:
    """A rank: `changes[layer, site, step]` gives columns of a line, `loss[step]` a loss; shards as a history has them."""

    rank: int
    of: int = 2
    steps: range = range(100, 115)
    layers: tuple = LAYERS
    changes: dict = field(default_factory=dict)
    loss: dict = field(default_factory=dict)
    has_loss: bool = True
    shards: dict = field(default_factory=dict)
    elements: dict = field(default_factory=dict)
    norms: dict = field(default_factory=dict)
    status: Status = field(default_factory=lambda: Status("ended"))
    process: object = GONE

    def history(self):
        table = TapTable(tuple(Tap(layer, "Linear", *pair) for layer in self.layers for pair in zip(SITES, KINDS, strict=True)))
        values = np.zeros((len(self.steps), len(table), len(COLUMNS)), dtype=np.float32)
        rng = np.random.default_rng(self.rank)
        for line, tap in enumerate(table.taps):
            noise = 1 + 0.05 * rng.standard_normal(len(self.steps)) if tap.kind.startswith("output") else 1
            elements = self.elements.get((tap.layer, tap.site), 4096)
            values[:, line, :2] = (self.norms.get((tap.layer, tap.site), 10.0 + line) * noise * np.ones((2, len(self.steps)))).T
            values[:, line, 6:] = elements, 1 + self.layers.index(tap.layer) + 1 / 16
        for (layer, site, step), columns in self.changes.items():
            for name, value in columns.items():
                values[self.steps.index(step), table.line(layer, site), COLUMNS.index(name)] = value
        loss = np.array([self.loss.get(step, 2.0 + 0.01 * rng.standard_normal()) for step in self.steps])
        given = {"loss": np.full(len(self.steps), True)} if self.has_loss else {}
        steps = np.array(self.steps)
        return History(steps, table, values, {"loss": loss} if self.has_loss else {}, given, (), 1.7e9 + steps, self.shards)

    def report(self):
        """The same as a dump has it."""
        failure = self.status.failures[-1] if self.status.failures else None
        known = {"exception": self.status.exception, "rank": self.rank, "world_size": self.of}
        return Report(self.history(), "trigger", "", "0.1.0", failure, **known)

    def write(self, folder):
        """The path of its black box."""
        history = self.history()
        known = "0.1.0", "2026-11-27T00:00:00Z", self.rank, self.of, {"torch": "2.13.0"}, len(history), history.table
        header = Header(*known, (), self.process, self.shards)
        file = BoxFile(folder, header, False)
        for row in history.rows():
            file.write(row)
        file.tell(self.status)
        file.close()
        return file.path


def failed(step=FAILS, trigger="NonFinite", message=None, **more):
    """The status of a rank whose own trigger saw something."""
    return Status("failed", (Failure(trigger, step, message or f"loss is NaN at step {step}", **more),))


def called(by, step=FAILS):
    """The status of a rank that another one told."""
    return Status("failed", (Failure(OTHER_RANK, step, f"rank {by} failed: loss is NaN at step {step}"),))


def dirty(layer, *sites, steps=(FAILS,)):
    """NaN in sites of a layer, and what is left of them has a norm."""
    return {(layer, site, step): {"nan": 7} for site in sites for step in steps}


def written(folder, *ranks):
    """The folder with a black box of each."""
    for rank in ranks:
        rank.write(folder)
    return folder


def several(count, **same):
    """So many ranks that are alike."""
    return [Rank(rank, count, **same) for rank in range(count)]


def but(ranks, number, **changes):
    """The same ranks, of which one is another."""
    return [replace(rank, **changes) if rank.rank == number else rank for rank in ranks]


REDUCED = {(layer, "weight.grad", FAILS): {"nan": 4096, "norm": math.nan} for layer in LAYERS}
"""A NaN as it comes out of a reduction, in every gradient."""
