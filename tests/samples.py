"""A made report, the same in every run, for everything that reads reports."""

import math

import numpy as np

from nobs._columns import KINDS
from nobs._history import History
from nobs._schema import Failure, Finding, Report
from nobs._table import Tap, TapTable


def story_report(layers=6, steps=50, guilty=3, name="blocks.{}.attention.up"):
    """Training in which one layer's gradient climbs and ends in NaN; smooth numbers, so that the text never changes.

    The layers are registered in the reverse of the order in which they run, which is the one to show.
    """
    sites = ("output", "output.grad", "weight", "weight.grad")
    table = TapTable(
        tuple(
            Tap(name.format(i), "Linear", site, kind)
            for i in reversed(range(layers))
            for site, kind in zip(sites, KINDS, strict=True)
        )
    )
    values = np.zeros((steps, len(table), 8), dtype=np.float32)
    t = np.arange(steps)
    for line, tap in enumerate(table.taps):
        layer = layers - 1 - line // 4
        norm = 10.0 * (layer + 1) * (1 + 0.2 * np.sin(t / 3 + layer))
        if layer == guilty and tap.kind.endswith("grad"):
            norm = norm * np.where(t > steps - 15, 10.0 ** ((t - steps + 15) / 3), 1)
        values[:, line] = np.stack(
            [norm, norm / 4, 0 * t, 0 * t, 0 * t, 0 * t, 0 * t + 4096, 0 * t + 1 + layer + 1 / 16], axis=-1
        )
    values[-1, (layers - 1 - guilty) * 4 + 3, [0, 1, 2]] = 0, 0, 17
    loss = np.r_[np.linspace(2.3, 0.5, steps - 1), math.nan]
    history = History(
        t + 300, table, values, {"loss": loss, "lr": np.geomspace(0.01, 0.5, steps)}, dict.fromkeys(("loss", "lr"), t >= 0)
    )
    failed = 300 + steps - 1
    bad = name.format(guilty)
    finding = Finding(
        "gradient_explosion",
        bad,
        "weight.grad",
        failed - 14,
        0.7,
        "the gradient left its band at 12.3 times its median",
        "clip gradients",
    )
    failure = Failure("NonFinite", failed, f"loss is NaN at step {failed}", value=math.nan, detected_at=failed + 1)
    run = {"torch": "2.13.0", "device": "cpu", "compiled": True}
    return Report(history, "trigger", "2026-11-23T00:00:00Z", "0.1.0", failure, (finding,), run=run)
