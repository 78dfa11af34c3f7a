"""What the kernels are given: a tensor, and where its statistics go."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _stats
from .._local import local
from .._onlookers import readable

Reading = tuple[Tensor, int, int, bool]
"""A tensor to be measured, the line of the row where its statistics go, what stands for its place in the order of execution,
and whether the line forgets what it held; else the two fold. No class: there is one for each parameter at each step.
"""


def in_memory_order(x: Tensor) -> Tensor:
    """The same values without gaps. Their order is no matter: a dense tensor, however permuted, is not copied."""
    if x.is_contiguous() and not x.is_neg() and not x.is_complex():
        return x
    x = x.detach().resolve_conj().resolve_neg()  # in memory `z.conj()` is z, and `z.conj().imag` has the sign of z's
    x = torch.view_as_real(x) if x.is_complex() else x
    return x if x.is_contiguous() else x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).contiguous()


def measurable_part(tensor: Tensor) -> Tensor | None:
    """What there is to measure of a parameter or a gradient on this rank."""
    tensor = local(tensor)
    if tensor.layout == torch.sparse_coo:  # Embedding(sparse=True): the rows that were looked up
        tensor = tensor.coalesce().values()
    plain = type(tensor) in _PLAIN and not tensor.is_meta  # no wrapper; and a batch of gradients never accumulates
    return tensor if (plain or readable(tensor)) and _stats.measurable(tensor) else None


_PLAIN = (Tensor, nn.Parameter)
