"""What a bench's figures were taken on: machine, versions and commit, as every JSON under bench/results states them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path

import torch

import nobs

PEERS = ("torchvision", "transformers", "lightning", "wandb", "trainscope", "pulsegrad")
"""The packages whose versions are stated where they are installed."""


def machine() -> dict:
    """Machine, versions, commit, and whether the tree differs from it."""
    return {
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "nobs": nobs.__version__,
        "peers": {name: version for name in PEERS if (version := installed(name)) is not None},
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def save(path: Path | None, about: dict, **figures: object) -> None:
    """Write figures as JSON, with what they were taken on; nothing where no file is asked for."""
    if path is not None:
        path.write_text(json.dumps({"machine": about, **figures}, indent=1) + "\n")


def installed(package: str) -> str | None:
    """The version of an installed package; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    """What git says about this repository; nothing where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip()


def _processor() -> str:
    """The processor's model, which `platform` knows on few systems."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(errors="replace").splitlines() if about.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
