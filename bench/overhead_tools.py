"""What watches a model, by name: nobs in three settings, what people write by hand, and (from `overhead_peers`) other tools.

Each is a function that puts a tool into a model and says how to call it (`overhead_loop.Attached`). Hand-written ones keep
what they read of the last 100 steps, as nobs does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import overhead_peers as peers
import torch
from overhead_loop import KINDS, Attached, Job, owners
from torch import Tensor, nn

import nobs

KEPT = 100
"""Steps that a hand-written tool remembers."""


@dataclass(frozen=True)
class Tool:
    """A tool of the table.

    Attributes:
        attach: puts it in; None for the bare loop, as a control.
        about: its setting, in a line.
        period: after how many steps what it does repeats.
        package: what has to be installed for it.
    """

    attach: Callable[[Job], Attached] | None
    about: str
    period: int = 1
    package: str | None = None


# -- nobs --------------------------------------------------------------------------------------------------------------


def record(
    job: Job,
    every: int = 1,
    layers: Callable[[str, nn.Module], bool] | None = None,
    kinds: Sequence[str] = KINDS,
    capacity: int = KEPT,
) -> Attached:
    """nobs, with its triggers, a hundred steps of memory and its black box. `held_bytes` is the README's formula."""
    nobs.instrument(job.model, layers=layers, every=every)
    stack = ExitStack()
    recorder = stack.enter_context(nobs.Recorder(job.model, optimizer=job.optimizer, capacity=capacity, directory=job.folder))

    def read() -> int:
        history = recorder.history()
        ran = [np.isfinite(history.kind(kind, "norm")).sum(1) for kind in kinds]
        return int(np.sum(ran, 0).max()) if len(history) else 0  # not the last step, which every=10 may have left out

    taps = sum(recorder.history().kind(kind, "norm").shape[1] for kind in KINDS)
    return Attached(after=recorder.step, read=read, kinds=kinds, held_bytes=capacity * (3 + taps) * 32, close=stack.close)


class Alone(nn.Module):
    """Stands in a layer's place and calls it. It owns no parameters: of it nobs records the output alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.layer(*args, **kwargs)


def _record_outputs(job: Job) -> Attached:
    """nobs without the sites of parameters: what is recorded is a module around each layer, which owns none."""
    for parent in list(job.model.modules()):
        if not isinstance(parent, nn.MultiheadAttention):  # which takes its layer's weight, and never calls the layer
            for name, layer in parent.named_children():
                if any(True for _ in layer.parameters(recurse=False)):
                    setattr(parent, name, Alone(layer))
    return record(job, layers=lambda name, module: isinstance(module, Alone), kinds=KINDS[:2])


# -- by hand -----------------------------------------------------------------------------------------------------------


def _hooks_with_item(job: Job) -> Attached:
    """As in the usual blog post: `.norm().item()` in a forward hook on each layer and in a hook on each parameter's gradient."""
    norms: dict[str, float] = {}
    kept: deque[dict[str, float]] = deque(maxlen=KEPT)

    def of_output(name: str, module: nn.Module, args: object, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        norms[name] = tensor.detach().norm().item()

    def of_gradient(name: str, gradient: Tensor) -> None:
        norms[name] = gradient.norm().item()

    for name, module in owners(job.model):
        module.register_forward_hook(partial(of_output, name))
    for name, parameter in job.model.named_parameters():
        parameter.register_hook(partial(of_gradient, f"{name}.grad"))

    def after(loss: Tensor) -> None:
        norms["loss"] = loss.item()
        kept.append(dict(norms))
        norms.clear()

    return Attached(after=after, read=lambda: len(kept[-1]) - 1, kinds=("output", "parameter.grad"))


def _foreach_norm(job: Job) -> Attached:
    """The norms of all gradients in one call, stacked, and left on the device: nobody asks for a value."""
    kept: deque[Tensor] = deque(maxlen=KEPT)
    parameters: Sequence[nn.Parameter] = list(job.model.parameters())

    @torch.no_grad()
    def before_update(loss: Tensor) -> None:
        kept.append(torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None])))

    return Attached(before_update=before_update, read=lambda: len(kept[-1]), kinds=("parameter.grad",))


class _Identity(torch.autograd.Function):
    """Does nothing, forward and backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def _identity(job: Job) -> Attached:
    """An autograd.Function that does nothing behind each layer: the least that a tap which is one would cost."""
    hook = lambda module, args, output: _Identity.apply(output) if isinstance(output, Tensor) else output  # noqa: E731
    for _, module in owners(job.model):
        module.register_forward_hook(hook)
    return Attached(kinds=KINDS[:2])


TOOLS: dict[str, Tool] = {
    "none": Tool(None, "a second bare loop: what the noise is"),
    "nobs": Tool(record, "all sites, every step, all triggers, black box"),
    "nobs every=10": Tool(partial(record, every=10), "the same, at every tenth step", period=10),
    "nobs outputs": Tool(_record_outputs, "without the sites of parameters"),
    "hooks .item()": Tool(_hooks_with_item, "forward and parameter hooks, .norm().item() in each"),
    "_foreach_norm": Tool(_foreach_norm, "gradients alone, in one call, left on the device"),
    "wandb.watch": Tool(peers.wandb_watch, "log=all, log_freq=1, offline", package="wandb"),
    "DebugUnderflowOverflow": Tool(peers.underflow_overflow, "of transformers, as it comes", package="transformers"),
    "SpikeDetection+grad_norm": Tool(peers.spike_detection, "of Lightning, both at each step", package="lightning"),
    "detect_anomaly": Tool(peers.detect_anomaly, "of torch.autograd, with its check for NaN"),
    "trainscope": Tool(peers.train_scope, "outputs at each step, no histograms", package="trainscope"),
    "pulsegrad": Tool(peers.pulse_grad, "k=1", package="pulsegrad"),
    "identity": Tool(_identity, "an autograd.Function that does nothing behind each layer: records nothing"),
}
