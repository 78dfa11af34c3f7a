"""The same cases through three other tools, each as its own documentation uses it.

- `torch.autograd.detect_anomaly`: stops at a NaN in a backward and shows the forward call of the operation. The layer counts as
  named if its last name stands in that traceback, wherever else it may stand too.
- transformers' `DebugUnderflowOverflow`: forward hooks; stops at the first NaN or Inf and prints the last modules.
- Lightning's `SpikeDetection`: sees the loss alone, so it is shown the losses that were recorded; it names no layer.

None of them states a cause. Compiled cases run eagerly for the first two, which do not work under `fullgraph`.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from torchvision_anyway import torchvision

Train = Callable[[Any], Any]


@dataclass(frozen=True)
class Alarm:
    """When a tool stopped, counted in steps of the run, and all that it said: in it a layer may be named."""

    step: int
    said: str

    def names(self, layer: str) -> bool:
        """Whether a layer is named, or at least the last part of its name."""
        return layer in self.said or f"self.{layer.rsplit('.', 1)[-1]}" in self.said


def anomaly(train: Train) -> Alarm | None:
    """Train under `detect_anomaly`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autograd.set_detect_anomaly(True):
            step, said = _until_it_stops(train, lambda model: None)
    return None if step is None else Alarm(step, said + "".join(str(w.message) for w in caught))


def underflow_overflow(train: Train) -> Alarm | None:
    """Train with the hooks of transformers. The module it stopped in is the last that it printed."""
    torchvision()  # transformers imports it where it is installed
    from transformers.debug_utils import DebugUnderflowOverflow

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        step, said = _until_it_stops(train, lambda model: DebugUnderflowOverflow(model))
    if step is None:
        return None
    frames = [line.split() for line in printed.getvalue().splitlines() if line.startswith(" " * 17)]
    named = [words[0] for words in frames if len(words) == 2]
    return Alarm(step, said + (named[-1] if named else ""))


def _until_it_stops(train: Train, attach: Callable[[nn.Module], object]) -> tuple[int | None, str]:
    """Train until a tool raises: the step and the message; None where it does not."""
    steps = [0]

    @contextmanager
    def recording(model: nn.Module, *, optimizer: Any, scaler: Any = None) -> Iterator[Callable[[Tensor], None]]:
        attach(model)

        def tell(loss: Tensor) -> None:
            steps[0] += 1

        yield tell

    try:
        train(recording)
    except IndexError:  # labels out of range: torch's own, tool or no tool
        return None, ""
    except (RuntimeError, ValueError) as error:
        mine = "returned nan values" in str(error) or "DebugUnderflowOverflow" in str(error)
        return (steps[0], str(error)) if mine else (None, "")
    return None, ""


def spike_detection(losses: list[float]) -> Alarm | None:
    """Show the losses to `SpikeDetection`, with its defaults."""
    torchvision()  # torchmetrics imports it where it is installed
    from lightning.fabric import Fabric
    from lightning.fabric.utilities.spike import SpikeDetection, TrainingSpikeException

    with tempfile.TemporaryDirectory() as scratch:
        fabric, detector = Fabric(accelerator="cpu", devices=1), SpikeDetection(exclude_batches_path=scratch)
        for step, loss in enumerate(losses):
            try:
                detector.on_train_batch_end(fabric, torch.tensor(loss), None, step)
            except TrainingSpikeException as spike:
                return Alarm(step, str(spike))
    return None


PEERS = ("detect_anomaly", "DebugUnderflowOverflow", "SpikeDetection")


def all_peers(train: Train, losses: list[float]) -> dict[str, Alarm | None]:
    """Each peer's alarm about one run."""
    return dict(zip(PEERS, (anomaly(train), underflow_overflow(train), spike_detection(losses)), strict=True))
