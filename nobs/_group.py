"""The process group that a run has, if it has one: rank, how many there are, and the store of the group."""

from __future__ import annotations

import itertools
from typing import Any

import torch.distributed as dist

from . import _launch
from ._board import Board

_NUMBERS = itertools.count()
"""Recorders are made in the same order on every rank, and so find each other by their numbers."""


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank in the group; without one, what the launcher says."""
    return dist.get_rank() if _initialized() else _launch.rank()


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _initialized() else _launch.world_size()


def board() -> Board | None:
    """The keys of the next recorder in the group's store; None where there is no group of several ranks.

    Where torch can (2.8 and newer), over a connection of its own: a call of the training's that waits there holds nobody up.
    """
    if not _initialized() or dist.get_world_size() == 1:
        return None
    # Private, but there is no other way to the store that init_process_group has made, and libraries have used it for years.
    store: Any = dist.distributed_c10d._get_default_store()
    own = store.clone() if hasattr(store, "clone") else store
    return Board(own, f"nobs/{next(_NUMBERS)}")
