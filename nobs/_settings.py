"""The arguments of a Recorder: checked at once, and what follows from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from . import _launch, triggers
from ._publish import folders_of
from .errors import BadSetting, explain

ON_FAILURE = ("raise", "warn", "stop")


def check(model: object, directory: object, blackbox: object, durable: object, on_failure: object) -> None:
    """Refuse what no Recorder can work with.

    Raises:
        BadSetting: says which argument, and what to type.
    """
    if on_failure not in ON_FAILURE:
        raise BadSetting(
            explain("Recorder(on_failure=...)", repr(on_failure), f"one of {', '.join(ON_FAILURE)}", 'on_failure="raise"')
        )
    if not isinstance(model, nn.Module):
        raise BadSetting(
            explain("Recorder(model)", f"a {type(model).__name__}", "an instrumented nn.Module", "nobs.Recorder(model)")
        )
    if not isinstance(directory, (str, os.PathLike)):
        raise BadSetting(explain("Recorder(directory=...)", repr(directory), "a path", 'directory="crashes"'))
    if not isinstance(blackbox, (bool, str, os.PathLike)):
        raise BadSetting(explain("Recorder(blackbox=...)", repr(blackbox), "True, False, or a path", "blackbox=True"))
    if not isinstance(durable, bool):
        raise BadSetting(explain("Recorder(durable=...)", repr(durable), "True or False", "durable=True"))


def engine(chosen: Sequence[triggers.Trigger] | None, optimizers: int) -> triggers.TriggerEngine:
    """What judges the rows: the triggers chosen, else those of the house."""
    usual = triggers.SEVERAL if optimizers > 1 else triggers.DEFAULT
    return triggers.TriggerEngine.only(usual if chosen is None else chosen)


def box_folders(blackbox: bool | str | os.PathLike[str], run: Path) -> list[Path]:
    """Where the black box of a run goes, the best folder first; none to keep none."""
    if blackbox is False or _launch.disabled():
        return []
    return folders_of(run if blackbox is True else Path(blackbox) / run.name)
