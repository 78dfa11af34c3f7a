"""What a report says besides its history, as JSON can hold it."""

from __future__ import annotations

from typing import Any

from .._codec import plain_failure
from .._schema import Report


def facts(report: Report) -> dict[str, Any]:
    """The failure, the findings, and the facts of the run, with the keys of a dump."""
    return {
        "nobs_version": report.nobs_version,
        "created": report.created,
        "reason": report.reason,
        "exception": report.exception,
        "rank": report.rank,
        "world_size": report.world_size,
        "run": dict(report.run),
        "failure": report.failure and plain_failure(report.failure),
        "findings": [vars(finding) for finding in report.findings],
    }
