"""How a `with` block ended, from the exception that left it."""

from __future__ import annotations

from ._blackbox import described
from ._schema import Report
from .errors import TrainingFailure


def how_it_ended(error: BaseException | None, report: Report | None) -> dict[str, str]:
    """What the black box says of a run that an error, or none, has ended."""
    if error is None or is_clean_exit(error):
        return {"state": "ended"}
    if isinstance(error, TrainingFailure) and error.report is report:
        return {"state": "failed"}
    return {"state": "exception", "exception": described(error)}  # another recorder's failure too


def is_clean_exit(error: BaseException) -> bool:
    """Whether the program wanted to end."""
    return isinstance(error, GeneratorExit) or (isinstance(error, SystemExit) and error.code in (None, 0))
