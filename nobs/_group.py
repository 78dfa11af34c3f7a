"""The process group that a run has, if it has one: rank, how many there are, and the store of the group."""

from __future__ import annotations

import itertools
from typing import Any

import torch.distributed as dist

from . import _launch
from ._board import Board
from ._log import log

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


def board_of(run: str) -> tuple[Board | None, str]:
    """The keys of the next recorder in the group's store, and the run's name, which is then the same on all ranks.

    Without a group of several ranks, and where its store cannot do what it should, there are none, and the name is the one given.
    Where torch can (2.8 and newer), they go over a connection of their own: a call of the training's that waits in the store
    holds nobody up.
    """
    if not _initialized() or dist.get_world_size() == 1:
        return None, run
    try:
        # Private, but there is no other way to the store that init_process_group has made, and libraries have used it for years.
        store: Any = dist.distributed_c10d._get_default_store()
        board = Board(store.clone() if hasattr(store, "clone") else store, f"nobs/{next(_NUMBERS)}")
        return board, board.run_name(run)
    except Exception as error:  # a fake group, say
        log.debug("nobs cannot reach other ranks over the store of this process group", exc_info=error)
        return None, run
