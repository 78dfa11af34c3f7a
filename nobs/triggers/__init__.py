"""What makes a run fail: `NonFinite`, `GradientNorm`, `LossSpike`, or a trigger of your own, shown each row in order.

A trigger is frozen settings with one pure method, `update(state, row) -> (state, failure or None)`. The first state is
None; a state is made of numbers, strings, lists, tuples, dicts and NumPy arrays, so that it goes into a checkpoint. Judging
step 10 million costs what judging step 10 cost. A trigger of your own is any object of that shape:

    class Stuck:
        def update(self, state, row):
            same = row.scalars["loss"] == (state or {}).get("loss")
            failure = nobs.Failure("Stuck", row.step, "the loss does not move") if same else None
            return {"loss": row.scalars["loss"]}, failure

Those of the house have two more methods, by which most rows are judged by one look and learned by the block; see `sieve`.

A spike or a NaN never enters the average that it was compared with, and so cannot hide the next one.
"""

from __future__ import annotations

from .activation_growth import ActivationGrowth as ActivationGrowth
from .dead_layer import DeadLayer as DeadLayer
from .engine import DEFAULT as DEFAULT
from .engine import SEVERAL as SEVERAL
from .engine import TriggerEngine as TriggerEngine
from .engine import settings_of as settings_of
from .engine import with_settings as with_settings
from .gradient_norm import GradientNorm as GradientNorm
from .gradient_zscore import GradientZScore as GradientZScore
from .input_shift import InputShift as InputShift
from .loss_cusum import LossCusum as LossCusum
from .loss_spike import LossSpike as LossSpike
from .nonfinite import NonFinite as NonFinite
from .overflow_headroom import OverflowHeadroom as OverflowHeadroom
from .shape import Trigger as Trigger
from .weight_jump import WeightJump as WeightJump

__all__ = [
    "DEFAULT",
    "SEVERAL",
    "ActivationGrowth",
    "DeadLayer",
    "GradientNorm",
    "GradientZScore",
    "InputShift",
    "LossCusum",
    "LossSpike",
    "NonFinite",
    "OverflowHeadroom",
    "Trigger",
    "TriggerEngine",
    "WeightJump",
]
