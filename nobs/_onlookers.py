"""Who looks on while a layer runs: a tracer, to whom a reading means nothing, or a mode that watches each operation.

Selective checkpointing, a counter of FLOPs and their like see each operation of torch that runs under them. Those of nobs are
not the user's, so they run unseen; and tensors that stand for others (a tracer's, vmap's) have no values to read.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes

_batched = torch._C._functorch.is_batchedtensor
_batched_once = torch._C._functorch.is_legacy_batchedtensor
"""Of torch.vmap, and of the older one behind `is_grads_batched=True`."""

_PLAIN = torch._C._disabled_torch_dispatch_impl


def no_training() -> bool:
    """Whether the tensors are no readings of anything: under vmap and func.grad, and where a model is exported or traced."""
    # By type: while Dynamo traces, the interpreter that is not there is not None. The flag, and not is_exporting(), which is
    # always true to the Dynamo of torch 2.7.
    transformed = isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return transformed or torch.compiler._is_exporting_flag or tracing


def no_training_eagerly() -> bool:
    """The same outside of graphs, where more can be asked: dual numbers are no readings either, and make_fx traces."""
    traced = torch._C._len_torch_dispatch_stack() > 0 and get_proxy_mode() is not None
    return traced or torch.autograd.forward_ad._current_level >= 0 or no_training()


def readable(x: Tensor) -> bool:
    """Whether an eager tensor has values of its own: not a fake one, a wrapper around others, or a whole batch of gradients."""
    if x.is_meta or type(x).__torch_dispatch__ is not _PLAIN:  # a fake tensor's is of its own
        return False
    return not (_batched(x) or _batched_once(x))


def unseen() -> AbstractContextManager[object]:
    """Run operations that no dispatch mode sees. Free where there is none, as almost always."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() > 0 else nullcontext()
