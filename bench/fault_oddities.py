"""Healthy training with models of their own: losses below zero and at zero, adversaries, adapters, experts, sparse gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from fault_data import images
from fault_models import entropy
from fault_sessions import Session
from torch import Tensor, nn
from torch.nn import functional as F


def own(
    model: nn.Module, loss: Callable[[nn.Module, int], Tensor], lr: float = 3e-3, kind: Any = torch.optim.Adam, **more: Any
) -> Session:
    return Session(model, kind(model.parameters(), lr=lr), lambda step: loss(model, step), **more)


def mlp(*widths: int, between: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), between())]
    return nn.Sequential(*layers[:-1])


def pixels(count: int = 32) -> tuple[Tensor, Tensor]:
    x, y = images()
    chosen = torch.randint(len(x), (count,))
    return x[chosen].flatten(1), y[chosen]


def density(seed: int) -> Session:
    """The negative log-likelihood of pixels under a Gaussian that narrows: falls below zero and further."""

    def loss(model: nn.Module, step: int) -> Tensor:
        x = pixels()[0] / 4
        mean, log_scale = model(x[:, :98]).chunk(2, 1)
        return (log_scale + 0.5 * ((x[:, 98:] - mean) / log_scale.exp()).square()).mean()

    return own(mlp(98, 64, 196), loss, 1e-3)


def hinge(seed: int) -> Session:
    """A margin that is soon kept: the loss is exactly zero most of the time."""
    return own(mlp(196, 64, 1), lambda m, _: (1 - m((p := pixels())[0])[:, 0] * (2.0 * (p[1] < 5) - 1)).relu().mean(), steps=200)


def memorised(seed: int) -> Session:
    """Sixteen images, again and again, and at every tenth step others that are hard for a while."""
    known = pixels(16)
    return own(mlp(196, 128, 10), lambda m, s: entropy(m((p := pixels(16) if s % 10 == 9 else known)[0]), p[1]), 2e-3, steps=200)


def dropout(seed: int) -> Session:
    return own(mlp(196, 64, 64, 10, between=lambda: nn.Dropout(0.5)), lambda m, _: entropy(m((p := pixels(16))[0]), p[1]))


class Masked(nn.Module):
    """Scores over positions, some of them masked with -inf by the layer itself."""

    class Scores(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.ones(10).bernoulli(0.3).bool() & (torch.arange(10) > 4), -math.inf)

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scores, self.head = nn.Linear(196, 32), self.Scores(32, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scores(self.body(x).relu()).softmax(1))


def masked(seed: int) -> Session:
    return own(Masked(), lambda m, _: entropy(m((p := pixels())[0]), p[1]))


def adversarial(seed: int, wasserstein: bool) -> Session:
    """A generator and a critic of small images, in one step each, with two optimizers."""
    model = nn.ModuleDict({"critic": mlp(49, 64, 64, 1, between=lambda: nn.LeakyReLU(0.2)), "generator": mlp(8, 64, 49)})
    kind = torch.optim.RMSprop if wasserstein else torch.optim.Adam
    both = [kind(model["critic"].parameters(), lr=1e-3), kind(model["generator"].parameters(), lr=1e-3)]

    def judge(x: Tensor, real: bool) -> Tensor:
        score = model["critic"](x)
        return (-score if real else score).mean() if wasserstein else F.softplus(-score if real else score).mean()

    def loss(step: int) -> Tensor:
        real = F.avg_pool2d(pixels(32)[0].view(-1, 1, 14, 14), 2).flatten(1)
        return judge(real, True) + judge(model["generator"](torch.randn(32, 8)).detach(), False)

    def update(loss: Tensor, step: int) -> None:
        loss.backward()
        both[0].step()
        for weight in model["critic"].parameters() if wasserstein else ():
            weight.data.clamp_(-0.05, 0.05)
        both[0].zero_grad()
        if step % (5 if wasserstein else 1) == 0:
            judge(model["generator"](torch.randn(32, 8)), True).backward()
            both[1].step()
            both[1].zero_grad()
            both[0].zero_grad()

    return Session(model, both, loss, update=update, steps=200)


def rare(seed: int) -> Session:
    """Regression of a heavy-tailed reward: one sample in fifty is thirty times as large."""

    def loss(model: nn.Module, step: int) -> Tensor:
        x = pixels(8)[0]
        reward = x.mean(1) * torch.where(torch.rand(8) < 0.02, 30.0, 1.0) + torch.randn(8)
        return F.mse_loss(model(x)[:, 0], reward)

    return own(mlp(196, 32, 1), loss, 1e-3, steps=250)


def bootstrapped(seed: int) -> Session:
    """A value that is regressed on a copy of itself, which is renewed every 40 steps."""
    model = mlp(196, 64, 1)
    target = copy.deepcopy(model)

    def loss(model: nn.Module, step: int) -> Tensor:
        if step % 40 == 0:
            target.load_state_dict(model.state_dict())
        x, y = pixels()
        with torch.no_grad():
            goal = (y == 1).float()[:, None] + 0.9 * target(x.roll(1, 0))
        return F.smooth_l1_loss(model(x), goal)

    return own(model, loss, 1e-3, steps=250)


class Adapted(nn.Module):
    """A low-rank adapter that begins at zero beside a frozen layer, and a residual branch whose scale begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(196, 64), nn.Linear(196, 4, bias=False), nn.Linear(4, 64, bias=False)
        self.branch, self.scale, self.head = nn.Linear(64, 64), nn.Parameter(torch.zeros(1)), nn.Linear(64, 10)
        nn.init.zeros_(self.up.weight)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.base(x) + self.up(self.down(x))).relu()
        return self.head(x + self.scale * self.branch(x).relu())


def adapted(seed: int) -> Session:
    return own(Adapted(), lambda m, _: entropy(m((p := pixels())[0]), p[1]), 5e-3)


class Experts(nn.Module):
    """Four experts, one for each sample; and two heads, one for each task, that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(196, 4), nn.ModuleList(mlp(196, 32, 32) for _ in range(4))
        self.heads = nn.ModuleList([nn.Linear(32, 10), nn.Linear(32, 2)])

    def forward(self, x: Tensor, task: int) -> Tensor:
        gates = self.gate(x).softmax(1)
        best = gates.argmax(1)
        out = x.new_zeros(len(x), 32)
        for i, expert in enumerate(self.experts):
            if (best == i).any():
                out[best == i] = expert(x[best == i]) * gates[best == i, i, None]
        return self.heads[task](out.relu())


def experts(seed: int) -> Session:
    def loss(model: nn.Module, step: int) -> Tensor:
        x, y = pixels(8)
        return entropy(model(x, 0), y) if step % 2 else entropy(model(x, 1), y % 2)

    return own(Experts(), loss, 2e-3, steps=200)


class DropPath(nn.Module):
    """Residual blocks that are left out at random."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Linear(196, 48),
            nn.ModuleList(mlp(48, 48, 48) for _ in range(4)),
            nn.Linear(48, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x.relu()) if torch.rand(()) < 0.7 else x + 0 * block(x.relu())
        return self.head(x)


def stochastic_depth(seed: int) -> Session:
    return own(DropPath(), lambda m, _: entropy(m((p := pixels())[0]), p[1]), 2e-3)


def sparse(seed: int) -> Session:
    """Factors of users and items; each step meets a few of them."""
    model = nn.ModuleDict({"user": nn.Embedding(200, 8, sparse=True), "item": nn.Embedding(50, 8, sparse=True)})
    taste, kind = torch.randn(200, 50).sign(), torch.optim.SparseAdam if seed % 2 else torch.optim.SGD

    def loss(model: Any, step: int) -> Tensor:
        u, i = torch.randint(200, (16,)), torch.randint(50, (16,))
        return F.binary_cross_entropy_with_logits((model["user"](u) * model["item"](i)).sum(1), (taste[u, i] + 1) / 2)

    return own(model, loss, 0.02 if seed % 2 else 0.5, kind, steps=200)
