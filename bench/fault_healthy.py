"""Healthy runs that look odd: 33 kinds, each with seeds. A trigger that fires in one of them is a false alarm.

A kind makes a session from a seed: a model, its optimizers, and what a step does. Nothing in it is broken.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from fault_oddities import (
    adapted,
    adversarial,
    bootstrapped,
    density,
    dropout,
    experts,
    hinge,
    masked,
    memorised,
    rare,
    sparse,
    stochastic_depth,
)
from fault_runs import Recording, backward
from fault_sessions import (
    IMAGE_MODELS,
    Session,
    Usual,
    accumulated,
    clipped,
    contrast_jitter,
    few,
    frozen,
    half_masked,
    harder,
    longer,
    mixed,
    plateau,
    restarting,
    scaled,
)
from torch.nn import functional as F


def train(kind: str, seed: int, recording: Recording) -> list[float]:
    """Train a healthy run; its losses, as far as the recording let it go."""
    torch.manual_seed(seed)
    session = HEALTHY[kind](seed)
    losses: list[float] = []
    with recording(session.model, optimizer=session.optimizer, scaler=session.scaler) as tell:
        for step in range(session.steps):
            session.before(step)
            loss = session.loss(step)
            losses.append(loss.item())
            if session.update is None:
                backward(loss, session.optimizer, session.scaler)
            else:
                session.update(loss, step)
            tell(loss)
    return losses


HEALTHY: dict[str, Callable[[int], Session]] = {
    "warm-up and cosine": lambda seed: Usual(seed).scheduled(
        lambda t: t / 30 if t < 30 else 0.5 + 0.5 * math.cos(math.pi * (t - 30) / 110)
    ),
    "one cycle": lambda seed: Usual(seed).scheduled(lambda t: 0.1 + 1.4 * (t / 50 if t < 50 else max(0.0, (140 - t) / 90))),
    "warm restarts": lambda seed: Usual(seed).scheduled(lambda t: 0.01 + 0.5 + 0.5 * math.cos(math.pi * (t % 40) / 40)),
    "step decay": lambda seed: Usual(seed).scheduled(lambda t: 0.1 ** (t // 50)),
    "batches of 2": lambda seed: Usual(seed, ("convnet", "vit", "gpt", "lstm"), change=few(lambda _: 2), rate=0.3),
    "batches of 1 to 32": lambda seed: Usual(seed, change=few(lambda t: 2 + (t * 7) % 31)),
    "a last partial batch": lambda seed: Usual(seed, change=few(lambda t: 3 if t % 20 == 19 else 32)),
    "negative losses": density,
    "losses of zero": hinge,
    "memorised data": memorised,
    "dropout": dropout,
    "label smoothing": lambda seed: Usual(
        seed, IMAGE_MODELS, objective=lambda out, y: F.cross_entropy(out, y, label_smoothing=0.2)
    ),
    "mixup": lambda seed: Usual(seed, IMAGE_MODELS, change=mixed, objective=lambda out, y: F.cross_entropy(out, y)),
    "contrast jitter": lambda seed: Usual(seed, IMAGE_MODELS, change=contrast_jitter),
    "masked logits": masked,
    "words left out": lambda seed: Usual(seed, ("gpt",), change=half_masked),
    "a GAN": lambda seed: adversarial(seed, wasserstein=False),
    "a Wasserstein GAN": lambda seed: adversarial(seed, wasserstein=True),
    "curriculum of noise": lambda seed: Usual(seed, IMAGE_MODELS, change=harder),
    "curriculum of length": lambda seed: Usual(seed, ("gpt",), change=longer),
    "a plateau": plateau,
    "back to a checkpoint": restarting,
    "a scaler that overflows": scaled,
    "accumulation": accumulated,
    "clipping": clipped,
    "freezing": frozen,
    "rare large rewards": rare,
    "a target network": bootstrapped,
    "adapters from zero": adapted,
    "experts and two tasks": experts,
    "stochastic depth": stochastic_depth,
    "sparse embeddings": sparse,
    "a long run": lambda seed: Usual(seed, steps=500),
}  # fmt: skip
