"""The kernel for tensors on the CPU: `_cpu.cpp`, compiled when the first model is instrumented.

torch has no operation that gives a tensor's norm, largest value and zeros in one read; with what it has it takes five. The
compiler is the one that torch.compile would call. Compiled anew in each process (half a second), so that nothing is left on
the disk that could be of another machine or another version. Where there is no compiler, `_stats` measures instead.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._log import log
from .._stats import code_of
from ._reading import Reading, in_memory_order

_SOURCE = Path(__file__).with_name("_cpu.cpp")
_COMPILERS = ("c++", "g++", "clang++")
_TUNED = ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)
_FLAGS = ((*_TUNED, "-fopenmp"), _TUNED, ())
"""In turn until one compiles: Apple's compiler knows no OpenMP."""

_KINDS = {
    dtype: (kind, code_of(dtype))
    for kind, dtypes in enumerate(
        (
            (torch.float32, torch.complex64),
            (torch.bfloat16,),
            (torch.float16, torch.complex32),
            (torch.float64, torch.complex128),
        )
    )
    for dtype in dtypes
}
"""dtype -> which loop of the kernel reads it, and its code."""


@functools.cache
def library() -> Any:
    """The compiled kernel, by ctypes; None where it could not be compiled, which the log says."""
    try:
        with tempfile.TemporaryDirectory(prefix="nobs-") as folder:
            return _typed(ctypes.CDLL(str(_compiled(_compiler(), Path(folder) / "kernel.so"))))
    except (OSError, ValueError, subprocess.SubprocessError, AttributeError) as error:
        log.info("no kernel: on the CPU nobs measures with torch's operations, which is slower", exc_info=error)
        return None


def _compiler() -> list[str]:
    """The command of the compiler; `CXX` may hold options too."""
    given = os.environ.get("CXX", "").strip()
    commands = [shlex.split(given)] if given else [[name] for name in _COMPILERS]
    for command in commands:
        if shutil.which(command[0]):
            return command
    raise FileNotFoundError(f"no C++ compiler ({', '.join(map(shlex.join, commands))})")


def _compiled(compiler: Sequence[str], target: Path) -> Path:
    for flags in _FLAGS:
        command = [*compiler, "-O3", "-std=c++17", "-shared", "-fPIC", *flags, str(_SOURCE), "-o", str(target)]
        last = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
        if last.returncode == 0:
            return target
    raise subprocess.SubprocessError(last.stderr[-500:])


def _typed(native: Any) -> Any:
    pointer, number = ctypes.c_void_p, ctypes.c_float
    native.nobs_fold.argtypes = (pointer, ctypes.c_int64, ctypes.c_int32, number, ctypes.c_int32, pointer, pointer, number)
    native.nobs_fold_all.argtypes = (ctypes.c_int32, pointer, ctypes.c_int32, pointer)
    native.nobs_fold.restype = native.nobs_fold_all.restype = None
    return native


def prepare(device: torch.device) -> None:
    """Compile the kernel now, and not in the first step."""
    library()


def reads(dtype: torch.dtype) -> bool:
    """Whether the kernel reads tensors of this dtype."""
    return dtype in _KINDS


def fold(x: Tensor, line: Tensor, clock: Tensor | None) -> bool:
    """Fold a CPU tensor into a line, and advance the clock by one, if there is one; whether that could be done.

    Waits for nothing but the read. Two threads may fold into one line.
    """
    native = library()
    if native is None or x.dtype not in _KINDS:
        return False
    kind, code = _KINDS[x.dtype]
    x = in_memory_order(x)
    at = x.data_ptr()
    if at == 0 and x.numel() > 0:  # values that are not there: all zeros by agreement, or freed
        return False
    native.nobs_fold(
        at, x.numel(), kind, code, torch.get_num_threads(), line.data_ptr(), None if clock is None else clock.data_ptr(), 1.0
    )
    return True


def fold_all(row: Tensor, readings: Sequence[Reading]) -> bool:
    """The same for many tensors, each into its line of the row, in one call."""
    native = library()
    if native is None:
        return False
    numbers, kept = array("q"), []  # the tensors are kept until the kernel has read them
    for given, line, first, fresh in readings:
        known = _KINDS.get(given.dtype)
        if known is None or not given.is_cpu:
            return False
        x = in_memory_order(given)
        at, count = x.data_ptr(), x.numel()
        if at == 0 and count > 0:
            return False
        kept.append(x)
        numbers.extend((at, count, line, first, known[0] + 8 * known[1], fresh))
    native.nobs_fold_all(len(kept), numbers.buffer_info()[0], torch.get_num_threads(), row.data_ptr())
    return True
