"""An error of nobs itself is said once and ends the recording, never the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from .errors import NobsError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class GivesUp(Protocol):
    """What can stop recording for good."""

    _broken: bool

    def _give_up(self, error: Exception) -> None: ...


Own = TypeVar("Own", bound=GivesUp)


def never_fatal(
    method: Callable[Concatenate[Own, Arguments], Result],
) -> Callable[Concatenate[Own, Arguments], Result | None]:
    """A method that gives up at an error, and does nothing once it has. Wrong calls do raise."""

    @wraps(method)
    def guarded(self: Own, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result | None:
        if self._broken:
            return None
        try:
            return method(self, *args, **kwargs)
        except NobsError:
            raise
        except Exception as error:
            self._give_up(error)
            return None

    return guarded
