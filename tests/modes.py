"""The ways in which people train: what a step does, and the loop. How a model is called is in `zoo`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import zoo
from torch import nn
from torch._dynamo.utils import counters
from twin import Twin
from zoo import Specimen, loss_of

import nobs
from nobs._history import Row

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


# Else Inductor reuses the memory of what a second backward reads; its caches would give a backward that was made to do so.
@torch._functorch.config.patch(donated_buffer=False, enable_autograd_cache=False)
@torch._inductor.config.patch(fx_graph_cache=False)
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
    """A way to train: how the model is called, what a step does, on which sizes of batches."""

    prepare: Callable = zoo.eager
    step: Callable = plain
    every: int = 1
    sizes: tuple[int, ...] = (4,) * 5
    optimizers: int = 1
    frozen: bool = False
    scaler: bool = False
    compiled: bool = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "compiled", self.prepare not in (zoo.eager, zoo.recomputed))


bf16, fp16 = (functools.partial(autocast, dtype) for dtype in (torch.bfloat16, torch.float16))
growing = (2, 3, 4, 5, 6, 7)

MODES = {
    "eager": Mode(),
    "accumulated": Mode(step=accumulated),
    "forwards first": Mode(step=forwards_first),
    "autocast bf16": Mode(step=bf16),
    "autocast fp16": Mode(step=fp16),
    "scaler": Mode(step=scaled, scaler=True),
    "checkpoint": Mode(zoo.recomputed),
    "two losses": Mode(step=two_losses),
    "two optimizers": Mode(step=two_optimizers, optimizers=2),
    "evaluation": Mode(step=evaluated),
    "frozen": Mode(frozen=True),
    "every 2": Mode(every=2),
    "compiled": Mode(zoo.whole),
    "compiled blocks": Mode(zoo.per_block),
    "compiled, sizes": Mode(zoo.whole, sizes=growing),
    "compiled, dynamic": Mode(zoo.any_size, sizes=growing),
    "compiled, forwards first": Mode(zoo.whole, forwards_first),
    "compiled blocks, accumulated": Mode(zoo.per_block, accumulated),
    "compiled, two losses": Mode(zoo.whole, two_losses),
    "compiled, two optimizers": Mode(zoo.whole, two_optimizers, optimizers=2),
    "compiled, autocast bf16": Mode(zoo.whole, bf16),
    "compiled, scaler": Mode(zoo.whole, scaled, scaler=True),
    "compiled, evaluation": Mode(zoo.whole, evaluated),
    "compiled, frozen": Mode(zoo.whole, frozen=True),
    "compiled, every 2": Mode(zoo.whole, every=2),
    "checkpoint inside": Mode(zoo.recomputed_inside),
    "selective inside": Mode(zoo.selectively_inside),
    "checkpoint around": Mode(zoo.recomputed_around),
}


if torch.__version__ < "2.9":
    # Its backends without kernels check the version of every tensor that a graph keeps, that of a slot too, and of the twin's.
    del MODES["compiled, forwards first"], MODES["compiled, two losses"]

# -- a run --------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run left: losses, parameters and buffers, graphs and breaks; rows of nobs and lines of the twin, by step."""

    losses: list = field(default_factory=list)
    state: dict = field(default_factory=dict)
    graphs: tuple[int, int] = (0, 0)
    rows: list = field(default_factory=list)
    lines: list = field(default_factory=list)


def looks_of(specimen, sizes, parameters):
    """How many steps the twin looks at: it reads some ten million parameters, and as many gradients, a second."""
    if not specimen.large:
        return len(sizes)
    return max(2, 80_000_000 // sum(p.numel() for p in parameters)) if sizes is growing else 2


def run(
    specimen: Specimen, mode: Mode, *, observed: bool, watched: bool = False, backend="inductor", directory="crashes"
) -> Outcome:
    """Train a new model, with its taps or without, with the twin or without."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(1)
    model = ((mode.prepare is zoo.per_block and specimen.deeper) or specimen.make)().train()
    parameters = list(model.parameters())
    if mode.frozen:
        for parameter in parameters[: len(parameters) // 2]:
            parameter.requires_grad = False  # as a method, a lazy one has it not yet
    sizes = mode.sizes if mode.sizes is growing or not specimen.large else [size // 2 for size in mode.sizes]
    batches = [(specimen.inputs(size), specimen.inputs(size)) for size in sizes]
    if observed:
        nobs.instrument(model, every=mode.every)
    specimen.ready(model)
    parameters = list(model.parameters())
    looks = looks_of(specimen, sizes, parameters)
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
            if len(outcome.lines) == looks:
                twin.sleep()
        for optimizer in optimizers:
            optimizer.zero_grad()
        outcome.losses.append(loss.item())
    outcome.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    outcome.graphs = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    if recorder:
        if recorder._ring.row.broken:
            raise recorder._ring.row.broken
        history = recorder.history()
        steps = zip(history.steps, history.values, strict=True)
        outcome.rows = [Row(int(step), 0.0, {}, history.table, values) for step, values in steps]
    return outcome
