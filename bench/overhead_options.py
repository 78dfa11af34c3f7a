"""The command line that the benches of cost share, and the folder and the silence that they run in."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from overhead_loop import MODES
from overhead_tools import TOOLS
from overhead_workloads import KINDS


def cells_parser(about: str, modes: Sequence[str]) -> argparse.ArgumentParser:
    """A parser for the cells of a table: workloads, modes, dtypes and tools, as lists with commas."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    lists = {"workloads": list(KINDS), "modes": list(modes), "dtypes": ["float32", "bfloat16"], "tools": list(TOOLS)}
    for name, allowed in lists.items():
        parser.add_argument(f"--{name}", type=_some_of(allowed), default=allowed, help=f"of {','.join(allowed)}")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="toys instead of models, and few steps: does everything run?")
    return parser


def modes_of(device: str) -> list[str]:
    """The ways to run a model on a device: CUDA graphs on CUDA alone."""
    return [mode for mode in MODES if mode != "graphs" or device == "cuda"]


def _some_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        wrong = [name for name in text.split(",") if name not in allowed]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(allowed)}")
        return text.split(",")

    return chosen


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for all that the tools and compilers of this process, and of its children, write; it is gone afterwards."""
    before = tempfile.tempdir, os.environ.get("TMPDIR"), os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="nobs-bench-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = before[2] or f"{folder}/inductor"
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before[0]
            for name, value in (("TMPDIR", before[1]), ("TORCHINDUCTOR_CACHE_DIR", before[2])):
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


@contextmanager
def silence() -> Iterator[None]:
    """What tools, compilers and profilers print meanwhile, from C++ too, goes nowhere."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for stream, old in zip((1, 2), kept, strict=True):
            os.dup2(old, stream)
            os.close(old)
        os.close(nowhere)
