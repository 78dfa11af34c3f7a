"""Which process writes a black box, and whether it still lives: asked by another one, maybe long after, maybe elsewhere."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, told from a later one of the same number: `started` in clock ticks since `boot`, in the namespace `space`."""

    pid: int
    host: str
    boot: str
    space: str
    started: str


def this_process() -> Process:
    """The one that runs this."""
    pid = os.getpid()
    return Process(pid, platform.node(), _boot(), _space(), _started(pid) or "")


def is_alive(process: Process) -> bool | None:
    """Whether a process still runs; None where nobody can tell from here."""
    here = this_process()
    if process.host == here.host and process.boot and here.boot and process.boot != here.boot:
        return False  # the machine has started anew since
    if (process.host, process.boot, process.space) != (here.host, here.boot, here.space):
        return None
    if process.started:
        return _started(process.pid) == process.started
    try:
        os.kill(process.pid, 0)
    except (ProcessLookupError, OverflowError):  # a number that no process can have
        return False
    except OSError:  # it is another user's
        return True
    return True


def _started(pid: int) -> str | None:
    """When it started, as Linux tells; None where it does not, or the process is gone or only waits to be buried."""
    try:
        behind_the_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if len(behind_the_name) < 20 or behind_the_name[0] in "ZX" else behind_the_name[19]


def _boot() -> str:
    """Since when the machine runs; a PID of before means nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _space() -> str:
    """Whose numbers the PIDs are: a container has its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
