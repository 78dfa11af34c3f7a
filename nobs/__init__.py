"""nobs: a flight recorder for PyTorch training.

    model = nobs.instrument(model)          # before torch.compile
    with nobs.Recorder(model, optimizer=optimizer) as recorder:
        ...
        recorder.step(loss)

Nothing is imported until it is used: a dump opens on a laptop without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import triggers as triggers
    from ._history import History as History
    from ._history import Row as Row
    from ._instrument import instrument as instrument
    from ._instrument import uninstrument as uninstrument
    from ._load import load as load
    from ._ring import RingBuffer as RingBuffer
    from ._schema import Failure as Failure
    from ._schema import Finding as Finding
    from ._schema import Report as Report
    from .errors import NobsError as NobsError
    from .errors import NobsWarning as NobsWarning
    from .errors import TrainingFailure as TrainingFailure
    from .recorder import Recorder as Recorder
    from .triggers import TriggerEngine as TriggerEngine

_HOME = {
    "Failure": "_schema",
    "Finding": "_schema",
    "History": "_history",
    "NobsError": "errors",
    "NobsWarning": "errors",
    "Recorder": "recorder",
    "Report": "_schema",
    "RingBuffer": "_ring",
    "Row": "_history",
    "TrainingFailure": "errors",
    "TriggerEngine": "triggers",
    "instrument": "_instrument",
    "load": "_load",
    "triggers": "",
    "uninstrument": "_instrument",
}
"""Public name -> the module it lives in; "" for a module."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from ._launch import installed_version

        return installed_version()
    if name not in _HOME:
        raise AttributeError(f"module 'nobs' has no attribute {name!r}")
    home = importlib.import_module(f".{_HOME[name] or name}", __name__)
    thing = home if not _HOME[name] else getattr(home, name)
    globals()[name] = thing  # the next look-up does not come by here
    return thing


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
