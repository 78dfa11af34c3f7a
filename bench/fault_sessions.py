"""Healthy training as users know it: a session, and those that vary what a task of `fault_models` does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fault_models import TASKS, Task
from fault_runs import OPTIMIZERS
from torch import Tensor, nn
from torch.nn import functional as F

MODELS = tuple(TASKS)


@dataclass
class Session:
    """What a healthy run trains: `loss(step)` is its forward, `update(loss, step)` the rest, by default the usual.

    `before(step)` is called first, and moves a rate or a batch size.
    """

    model: nn.Module
    optimizer: Any
    loss: Callable[[int], Tensor]
    before: Callable[[int], None] = lambda step: None
    update: Callable[[Tensor, int], None] | None = None
    scaler: Any = None
    steps: int = 140


class Usual(Session):
    """A task of `fault_models` with its optimizer, the models in turn; `change(inputs, targets, step)` alters a batch."""

    def __init__(
        self,
        seed: int,
        models: tuple[str, ...] = MODELS,
        optimizer: str | None = None,
        change: Callable[[dict[str, Tensor], Tensor, int], Any] = lambda inputs, targets, step: (inputs, targets),
        objective: Callable[[Any, Tensor], Tensor] | None = None,
        rate: float = 1.0,
        **more: Any,
    ) -> None:
        self.task: Task = TASKS[models[seed % len(models)]]()
        named = optimizer or ("sgd", "adam", "adamw")[seed // len(models) % 3]
        chosen = OPTIMIZERS[named](self.task.model, self.task.rate * rate)
        self.rates = [group["lr"] for group in chosen.param_groups]
        generator = torch.Generator().manual_seed(seed)

        def loss(step: int) -> Tensor:
            inputs, targets = change(*self.task.batch(generator), step)
            return (objective or self.task.loss)(self.task.model(**inputs), targets)

        super().__init__(self.task.model, chosen, loss, **more)

    def scheduled(self, share: Callable[[int], float]) -> Usual:
        """With a learning rate that is this share of the usual one at each step."""

        def before(step: int) -> None:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * share(step)

        self.before = before
        return self


def few(count: Callable[[int], int]) -> Callable[..., Any]:
    """Batches of so many samples."""

    def change(inputs: dict[str, Tensor], targets: Tensor, step: int) -> Any:
        n, each = count(step), len(targets) // len(next(iter(inputs.values())))
        return {name: x[:n] for name, x in inputs.items()}, targets[: n * each]

    return change


IMAGE_MODELS = ("convnet", "resnet", "vit", "lstm")


def contrast_jitter(inputs: dict[str, Tensor], targets: Tensor, step: int) -> Any:
    strength = 0.5 + torch.rand(len(targets), 1, 1, 1)
    return {**inputs, "image": inputs["image"] * strength + 0.3 * torch.randn(len(targets), 1, 1, 1)}, targets


def mixed(inputs: dict[str, Tensor], targets: Tensor, step: int) -> Any:
    """Mixup, with the two labels' share as targets."""
    share, other = 0.7, torch.randperm(len(targets))
    mix = share * F.one_hot(targets, 10) + (1 - share) * F.one_hot(targets[other], 10)
    return {"image": share * inputs["image"] + (1 - share) * inputs["image"][other]}, mix


def harder(inputs: dict[str, Tensor], targets: Tensor, step: int) -> Any:
    """A curriculum: noise and contrast of the images jump at step 70."""
    noise = 0.2 if step < 70 else 1.0
    return {"image": inputs["image"] + noise * torch.randn_like(inputs["image"])}, targets


def longer(inputs: dict[str, Tensor], targets: Tensor, step: int) -> Any:
    """Sentences of 4 words, then 8, then 16."""
    length = 4 if step < 50 else 8 if step < 100 else 16
    return {"words": inputs["words"][:, :length]}, targets.view(-1, 16)[:, :length].flatten()


def restarting(seed: int) -> Session:
    """Goes back to the checkpoint of 30 steps before, as after a preemption."""
    session = Usual(seed)
    saved: dict[str, Any] = {}

    def before(step: int) -> None:
        if step == 60:
            saved["model"] = copy.deepcopy(session.model.state_dict())
            saved["optimizer"] = copy.deepcopy(session.optimizer.state_dict())
        if step == 90:
            session.model.load_state_dict(saved["model"])
            session.optimizer.load_state_dict(saved["optimizer"])

    session.before = before
    return session


def scaled(seed: int) -> Session:
    """A GradScaler that tries a larger scale every five steps, and so overflows now and then."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_factor=4.0, growth_interval=5)
    session = Usual(seed, ("gpt", "lstm", "vit"), scaler=scaler)
    plain = session.loss

    def loss(step: int) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return plain(step)

    session.loss = loss
    return session


def accumulated(seed: int) -> Session:
    """One to four micro-batches a step."""
    session = Usual(seed)

    def update(loss: Tensor, step: int) -> None:
        count = 1 + step % 4
        (loss / count).backward()
        for _ in range(count - 1):
            (session.loss(step) / count).backward()
        session.optimizer.step()
        session.optimizer.zero_grad()

    session.update = update
    return session


def clipped(seed: int) -> Session:
    """Clipped at every step."""
    session = Usual(seed)

    def update(loss: Tensor, step: int) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(session.model.parameters(), 0.1)
        session.optimizer.step()
        session.optimizer.zero_grad()

    session.update = update
    return session


def frozen(seed: int) -> Session:
    """The first half of the layers is frozen at step 50, and learns again from step 100 on."""
    session = Usual(seed)
    parameters = list(session.model.parameters())

    def before(step: int) -> None:
        if step in (50, 100):
            for parameter in parameters[: len(parameters) // 2]:
                parameter.requires_grad_(step == 100)

    session.before = before
    return session


def plateau(seed: int) -> Session:
    """Random labels: the loss stays where it is."""
    return Usual(seed, IMAGE_MODELS, change=lambda x, y, _: (x, torch.randint(10, y.shape)))


def half_masked(inputs: dict[str, Tensor], targets: Tensor, step: int) -> Any:
    """Words that are left out of the loss, now a few and now nearly all."""
    share = torch.rand(())
    return inputs, torch.where(torch.rand(targets.shape) < 0.9 * share, -100, targets)
