"""What nobs raises.

    NobsError
     ├─ AlreadyInstrumented   ValueError    the model has its taps already
     ├─ NotInstrumented       ValueError    a recorder for a model without taps
     ├─ NothingToRecord       ValueError    no layer to put a tap on
     ├─ UnknownLayer          LookupError   a pattern or a name that fits no layer
     ├─ BadSetting            ValueError    a capacity of 0, a threshold of NaN, ...
     ├─ BadLoss               TypeError     a loss that is no single number
     ├─ UnreadableDump        ValueError    a file that is truncated, foreign, newer or hostile
     └─ TrainingFailure       RuntimeError  the run itself failed; carries the report

    NobsWarning               UserWarning   the code works, but should change

Every message has the same four parts, which `explain` puts together: what was done, what was got, what was
expected, what to type.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._schema import Report


class NobsError(Exception):
    """The root of everything nobs raises."""


class AlreadyInstrumented(NobsError, ValueError):
    """The model, or a part of it, has its taps already."""


class NotInstrumented(NobsError, ValueError):
    """A recorder or a ring was asked for a model that has no taps."""


class NothingToRecord(NobsError, ValueError):
    """The model has no layer that a tap could be put on."""


class UnknownLayer(NobsError, LookupError):
    """A pattern or a name that fits no layer."""


class BadSetting(NobsError, ValueError):
    """A setting outside its range."""


class BadLoss(NobsError, TypeError):
    """A loss, or another scalar, that is not a single number."""


class UnreadableDump(NobsError, ValueError):
    """A file that is no dump of nobs, or not a whole one."""


class NobsWarning(UserWarning):
    """The code works, but should change."""


class TrainingFailure(NobsError, RuntimeError):
    """The training run failed; `report` says where, when and why.

    Attributes:
        report: the frozen `nobs.Report` that was also printed and saved.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(report.summary())

    def __reduce__(self) -> tuple[type[TrainingFailure], tuple[Report]]:
        return type(self), (self.report,)


def explain(did: str, got: str, expected: str, type_this: str) -> str:
    """Put the four parts of an error message together, one a line."""
    return f"{did}\n  got:      {got}\n  expected: {expected}\n  type:     {type_this}"


def reason(error: Exception) -> str:
    """What a failed reading or writing says of itself, without its number and path."""
    return str(getattr(error, "strerror", None) or error)


def whole_number(did: str, name: str, value: Any, default: int) -> int:
    """A setting that is a whole number of at least 1, of Python or NumPy, as an int.

    Raises:
        BadSetting: it is something else.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise BadSetting(explain(did, f"{name}={value!r}", "a whole number of at least 1", f"{name}={default}"))
    return number
