"""The ways in which people train: how a model is called (eager, compiled, recomputed), and what a step of the loop does."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from twin import Twin
from zoo import Specimen, loss_of

import nobs
from nobs._history import Row

# -- how the model is called: (specimen, model, backend) -> what stands in for the model --------------------------------


def eager(specimen, model, backend):
    return model


def whole(specimen, model, backend):
    return torch.compile(model, fullgraph=specimen.fullgraph, backend=backend)


def any_size(specimen, model, backend):
    """Every size is a symbol; in a large model, where each costs minutes, the batch's alone."""
    if not specimen.large:
        return torch.compile(model, fullgraph=specimen.fullgraph, backend=backend, dynamic=True)
    compiled = whole(specimen, model, backend)

    def call(images):
        torch._dynamo.maybe_mark_dynamic(images, 0)
        return compiled(images)

    return call


def per_block(specimen, model, backend):
    for block in specimen.blocks(model):
        block.compile(fullgraph=specimen.fullgraph, backend=backend)
    return model


def recomputed(specimen, model, backend):
    return functools.partial(checkpoint, model, use_reentrant=False)


def recomputed_inside(specimen, model, backend):
    return torch.compile(recomputed(specimen, model, backend), fullgraph=specimen.fullgraph, backend=backend)


def selectively_inside(specimen, model, backend):
    def policy(context, operator, *args, **kwargs):
        saved = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    selective = functools.partial(checkpoint, model, use_reentrant=False, context_fn=contexts)
    return torch.compile(selective, fullgraph=specimen.fullgraph, backend=backend)


def recomputed_around(specimen, model, backend):
    return functools.partial(checkpoint, whole(specimen, model, backend), use_reentrant=False)


# -- what a step does ---------------------------------------------------------------------------------------------------


@dataclass
class Loop:
    """One training loop: what a step needs to know, and the places where the twin looks."""

    call: Callable
    model: nn.Module
    optimizers: list
    twin: Twin | None
    scaler: torch.amp.GradScaler | None = None

    def update(self, number=0, scale=1.0):
        """The twin reads what this optimizer is about to use; then it steps."""
        optimizer = self.optimizers[number]
        if self.twin:
            chosen = None if len(self.optimizers) == 1 else optimizer.param_groups[0]["params"]
            self.twin.update(chosen, scale)
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()


def plain(loop, first, second):
    loss = loss_of(loop.call, first)
    loss.backward()
    loop.update()
    return loss


def accumulated(loop, *micro_batches):
    for inputs in micro_batches:
        loss = loss_of(loop.call, inputs)
        loss.backward()
    loop.update()
    return loss


def forwards_first(loop, *micro_batches):
    losses = [loss_of(loop.call, inputs) for inputs in micro_batches]
    for loss in losses:
        loss.backward()
    loop.update()
    return loss


def autocast(dtype, loop, first, second):
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(loop.call, first)
    loss.backward()
    loop.update()
    return loss


def scaled(loop, first, second):
    """The third step overflows, and the scaler skips it."""
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(loop.call, first)
    overflows = loop.steps == 2
    loop.scaler.scale(loss * (float("inf") if overflows else 1)).backward()
    loop.update(scale=loop.scaler.get_scale())
    return loss


def two_losses(loop, first, second):
    """Two losses over one graph, each with a backward of its own, one update."""
    losses = []

    def call(*args, **kwargs):
        output = loop.call(*args, **kwargs)
        losses.append(loss_of(lambda: output, ()))
        return output

    losses.append(loss_of(call, first) * 0.5)
    for loss in losses:
        loss.backward(retain_graph=loss is losses[0])
    loop.update()
    return losses[0] + losses[1]


def two_optimizers(loop, first, second):
    """As a GAN trains: each half of the parameters has its loss, its backward and its update, and is zeroed before it."""
    for number, inputs in enumerate((first, second)):
        loop.optimizers[number].zero_grad()
        loss = loss_of(loop.call, inputs)
        loss.backward()
        loop.update(number)
    return loss


def evaluated(loop, first, second):
    """An evaluation before each step: it records nothing and poisons nothing."""
    loop.model.eval()
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            loop.call(**second) if isinstance(second, dict) else loop.call(*second)
    if loop.twin:
        loop.twin.clear()
    loop.model.train()
    return plain(loop, first, second)


@dataclass(frozen=True)
class Mode:
    """A way to train. `extra_graphs`: how many graphs nobs may add."""

    prepare: Callable = eager
    step: Callable = plain
    every: int = 1
    sizes: tuple[int, ...] = (4,) * 5
    optimizers: int = 1
    frozen: bool = False
    scaler: bool = False
    compiled: bool = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "compiled", self.prepare not in (eager, recomputed))


bf16, fp16 = (functools.partial(autocast, dtype) for dtype in (torch.bfloat16, torch.float16))
growing = (2, 3, 4, 5, 6, 7)

MODES = {
    "eager": Mode(),
    "accumulated": Mode(step=accumulated),
    "forwards first": Mode(step=forwards_first),
    "autocast bf16": Mode(step=bf16),
    "autocast fp16": Mode(step=fp16),
    "scaler": Mode(step=scaled, scaler=True),
    "checkpoint": Mode(recomputed),
    "two losses": Mode(step=two_losses),
    "two optimizers": Mode(step=two_optimizers, optimizers=2),
    "evaluation": Mode(step=evaluated),
    "frozen": Mode(frozen=True),
    "every 2": Mode(every=2),
    "compiled": Mode(whole),
    "compiled blocks": Mode(per_block),
    "compiled, sizes": Mode(whole, sizes=growing),
    "compiled, dynamic": Mode(any_size, sizes=growing),
    "compiled, forwards first": Mode(whole, forwards_first),
    "compiled blocks, accumulated": Mode(per_block, accumulated),
    "compiled, autocast bf16": Mode(whole, bf16),
    "compiled, scaler": Mode(whole, scaled, scaler=True),
    "compiled, evaluation": Mode(whole, evaluated),
    "compiled, frozen": Mode(whole, frozen=True),
    "compiled, every 2": Mode(whole, every=2),
    "checkpoint inside": Mode(recomputed_inside),
    "selective inside": Mode(selectively_inside),
    "checkpoint around": Mode(recomputed_around),
}


if torch.__version__ < "2.9":
    # Its backends without kernels check the version of every tensor that a graph keeps, that of a slot too, and of the twin's.
    del MODES["compiled, forwards first"]

# -- a run --------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run left: losses, parameters and buffers, graphs and breaks; rows of nobs and lines of the twin, by step."""

    losses: list = field(default_factory=list)
    state: dict = field(default_factory=dict)
    graphs: tuple[int, int] = (0, 0)
    rows: list = field(default_factory=list)
    lines: list = field(default_factory=list)


def run(
    specimen: Specimen, mode: Mode, *, observed: bool, watched: bool = False, backend="inductor", directory="crashes"
) -> Outcome:
    """Train a new model, with its taps or without, with the twin or without."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(1)
    model = specimen.make().train()
    parameters = list(model.parameters())
    if mode.frozen:
        for parameter in parameters[: len(parameters) // 2]:
            parameter.requires_grad_(False)
    sizes = [max(2, size // 2) if specimen.large else size for size in mode.sizes]
    batches = [(specimen.inputs(size), specimen.inputs(size)) for size in sizes]
    if observed:
        nobs.instrument(model, every=mode.every)
    twin = Twin(model) if watched else None
    optimizers = [torch.optim.SGD(parameters[i :: mode.optimizers], lr=0.01) for i in range(mode.optimizers)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) if mode.scaler else None
    outcome = Outcome()
    loop = Loop(mode.prepare(specimen, model, backend), model, optimizers, twin, scaler)
    only_nonfinite = [nobs.triggers.NonFinite()]  # must not fire: all is finite, but for what the scaler skips
    recorder = nobs.Recorder(model, scaler=scaler, triggers=only_nonfinite, directory=directory) if observed else None
    torch.manual_seed(2)
    for loop.steps, micro_batches in enumerate(batches):
        scale = scaler.get_scale() if scaler else 1.0
        loss = mode.step(loop, *micro_batches)
        if recorder:
            recorder.step(loss)
        if twin and not twin.asleep:
            outcome.lines.append(twin.lines(scale) if loop.steps % mode.every == 0 else {})
            twin.clear()
            if specimen.large and loop.steps == 1:
                twin.sleep()  # it reads a hundred million numbers a step
        for optimizer in optimizers:
            optimizer.zero_grad()
        outcome.losses.append(loss.item())
    outcome.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    outcome.graphs = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    if recorder:
        if recorder._ring.row.broken:
            raise recorder._ring.row.broken
        history = recorder.history()
        outcome.rows = [
            Row(int(step), 0.0, {}, history.table, values) for step, values in zip(history.steps, history.values, strict=True)
        ]
    return outcome
