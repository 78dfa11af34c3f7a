"""What of a tensor lies on this rank: the local part of a DTensor (FSDP2, tensor parallel), and which part of the whole it is.

Reading it moves nothing between ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._table import WHOLE, Shard

_DTENSOR: tuple[type, ...] = ()
_PENDING: tuple[type, ...] = ()
if torch.distributed.is_available():
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

    _DTENSOR, _PENDING = (DTensor,), (AsyncCollectiveTensor,)


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: any tensor but a DTensor is its own.

    Of a sum that is not made yet (the output of a row-wise layer) that is this rank's addend.
    """
    # The attribute: `to_local` gives a parameter's part on as a parameter, and is for autograd.
    part: Any = x
    if is_placed(part):
        part = part._local_tensor
    # A collective that the user's code began: whoever reads first waits for it, on an accelerator on its stream.
    if isinstance(part, _PENDING):
        part = part.trigger_wait()  # type: ignore[attr-defined]
    lying_here: Tensor = part
    return lying_here


def is_placed(x: object) -> bool:
    """Whether it is a DTensor, of which this rank may hold a part only."""
    return isinstance(x, _DTENSOR)


def among_ranks() -> bool:
    """Whether there are other ranks, which may have a hand in gradients."""
    return bool(_DTENSOR) and torch.distributed.is_initialized()


def shard_of(x: Tensor) -> Shard:
    """Which part of the whole this rank holds.

    Parts are counted over those dimensions of the mesh that the tensor is sharded on; ranks that differ in others hold copies.
    """
    if not is_placed(x):
        return WHOLE
    placed: Any = x
    index, of = 0, 1
    for coordinate, size, placement in zip(
        placed.device_mesh.get_coordinate() or (), placed.device_mesh.shape, placed.placements, strict=False
    ):
        if not (placement.is_replicate() or placement.is_partial()):
            index, of = index * size + coordinate, of * size
    return Shard(index, of, any(placement.is_partial() for placement in placed.placements))
