"""One run of a case: a task, its optimizer and dtype, eager or compiled, with a fault or as its fault-free twin."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from fault_models import TASKS, Deep, Task, entropy, picked
from fault_plant import Moment, plant, reset
from fault_table import FAULTS, Fault
from torch import Tensor, nn

EARLIEST, LATEST = 40, 65
"""Between which steps a fault is planted: when something has been learned."""

SEQUENCES = ("vit", "gpt", "lstm")


@dataclass(frozen=True)
class Case:
    """A fault, where and when it is planted, and what it is planted into."""

    fault: str
    model: str
    layer: str | None
    at: int
    optimizer: str
    dtype: str
    compiled: bool
    seed: int

    @property
    def of(self) -> Fault:
        return FAULTS[self.fault]

    @property
    def name(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"{self.fault} | {self.model} {self.layer or ''} @{self.at} | {self.optimizer} {self.dtype} {how} #{self.seed}"

    @property
    def steps(self) -> int:
        return self.at + self.of.lasts


class Recording(Protocol):
    """What a run asks of who watches it."""

    def __call__(
        self, model: nn.Module, *, optimizer: torch.optim.Optimizer, scaler: Any
    ) -> AbstractContextManager[Callable[[Tensor], None]]: ...


OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "sgd": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr / 3, momentum=0.9),
    "adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=3e-3),
    "adamw": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05),
}


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """`count` of every fault, the models in turn; layer, step, optimizer and dtype are drawn, and one in three is compiled."""
    for name, fault in FAULTS.items():
        # Convolutions in float16 take seconds on a CPU.
        half = set(fault.dtypes) <= {"float16", "unscaled float16"}
        models = [model for model in fault.models if not half or model in SEQUENCES]
        for n in range(count):
            random_ = random.Random(f"{seed} {name} {n}")  # the first few cases are the same however many there are
            model = models[n % len(models)]
            task = _task(model, True, 0)
            layers = {"first": task.layers[:1], "none": (None,)}.get(fault.among) or getattr(task, fault.among)
            compiled = n % 3 == 1 and not fault.twisted and "float32" in fault.dtypes and model in TASKS
            dtypes = [d for d in fault.dtypes if model in SEQUENCES or d in ("float32", "bfloat16")]
            yield Case(
                name,
                model,
                random_.choice(layers),
                random_.randint(EARLIEST, LATEST) if model in TASKS else 0,
                random_.choice(fault.optimizers),
                "float32" if compiled else random_.choice(dtypes),
                compiled,
                random_.randrange(2),
            )


def _task(model: str, faulty: bool, seed: int) -> Task:
    torch.manual_seed(seed)
    if model == "deep":
        return Task(Deep(saturating=faulty), picked, entropy, ("layers.0",), 0.1)
    return TASKS[model]()


@cache
def _compiled(model: str) -> tuple[Task, nn.Module, dict[str, Tensor], list[nn.Module]]:
    """A model that is compiled once for all of its cases, every layer planted; its twins train with the same code."""
    import nobs

    task = _task(model, False, 0)
    planted = [task.model.get_submodule(name) for name in {*task.layers, *task.residual, *task.logits, *task.recurrent}]
    for layer in planted:
        plant(layer)
    nobs.instrument(task.model)
    return task, torch.compile(task.model), {k: v.clone() for k, v in task.model.state_dict().items()}, planted


def _set_up(case: Case, faulty: bool) -> tuple[Task, nn.Module]:
    if case.compiled:
        task, model, state, planted = _compiled(case.model)
        for layer in planted:
            reset(layer)
        task.model.load_state_dict(state)
        task.model.zero_grad()
        return task, model
    task = _task(case.model, faulty, case.seed)
    if case.layer:
        plant(task.model.get_submodule(case.layer))
    return task, task.model


def train(case: Case, recording: Recording, faulty: bool = True) -> list[float]:
    """Train a case, or its twin; the losses, as far as the recording let it go."""
    task, model = _set_up(case, faulty)
    optimizer = OPTIMIZERS[case.optimizer](task.model, task.rate)
    half = {"bfloat16": torch.bfloat16, "float32": None}.get(case.dtype, torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000) if case.dtype == "float16" else None
    generator = torch.Generator().manual_seed(1000 + case.seed)
    losses: list[float] = []
    layer = task.model.get_submodule(case.layer) if case.layer else task.model
    with recording(task.model, optimizer=optimizer, scaler=scaler) as tell:
        for step in range(case.steps):
            inputs, targets = task.batch(generator)
            moment = Moment(step - case.at, layer, optimizer, inputs, targets, generator)
            if not faulty:
                moment.since = min(moment.since, -1)
            act = case.of.act if moment.since >= 0 else case.of.before
            act(moment)
            with nullcontext() if half is None else torch.autocast("cpu", half):
                out = model(**moment.inputs)
            loss = moment.loss(task.loss(out, moment.targets))
            losses.append(loss.item())
            backward(loss * moment.weight_of_loss, optimizer, scaler)
            tell(loss)
    return losses


def backward(loss: Tensor, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
    """Backward and update, scaled where there is a scaler."""
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
