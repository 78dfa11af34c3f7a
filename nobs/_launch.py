"""What the surroundings say: the version, whether nobs is off, this process's rank, how many there are, a name for the run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from ._names import file_name

_RANK = ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK")
_WORLD_SIZE = ("WORLD_SIZE", "SLURM_NTASKS", "JSM_NAMESPACE_SIZE", "OMPI_COMM_WORLD_SIZE")
_RUN_ID = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID")


def installed_version() -> str:
    """The version of nobs; a source tree that was never installed has none."""
    try:
        return version("neural-observer")
    except PackageNotFoundError:
        return "0+unknown"


def disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `NOBS_DISABLE=1` asks nobs to do nothing."""
    return environ.get("NOBS_DISABLE", "").lower() not in ("", "0", "false")


def rank(environ: Mapping[str, str] = os.environ) -> int:
    """This process's rank, 0 without a launcher; works before `init_process_group`."""
    return _first_number(environ, _RANK, 0)


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes the launcher started, 1 without one."""
    return max(1, _first_number(environ, _WORLD_SIZE, 1))


def run_name(environ: Mapping[str, str] = os.environ, now_s: float | None = None) -> str:
    """The run's folder: the launcher's run id, which all ranks share, else the time in UTC, without colons."""
    run_id = next((environ[name] for name in _RUN_ID if environ.get(name, "none") not in ("", "none")), None)
    return file_name(run_id or time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime(now_s)))


def _first_number(environ: Mapping[str, str], names: tuple[str, ...], otherwise: int) -> int:
    return next((int(environ[name]) for name in names if environ.get(name, "").isdigit()), otherwise)
