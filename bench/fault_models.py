"""Six models, tiny enough for two cores, and a seventh for what depth does; each learns something in thirty steps.

A task is a model, a batch for every step (the same for the same seed), and a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fault_data import LENGTH, WORDS, Batch, captioned, picked, sentences
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Task:
    """A model, `batch(generator) -> Batch`, `loss(output, targets)`, and which layers a fault may be planted in.

    `residual` are layers that end a residual branch, `logits` those that make attention logits, `recurrent` cells.
    """

    model: nn.Module
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[[Any, Tensor], Tensor]
    layers: tuple[str, ...]
    rate: float
    residual: tuple[str, ...] = ()
    logits: tuple[str, ...] = ()
    recurrent: tuple[str, ...] = ()


class ConvNet(nn.Module):
    """Two convolutions and two linear layers, without a norm: nothing hides a wrong scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(16 * 9, 32), nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(image).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class ResNet(nn.Module):
    """Three residual blocks with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.blocks = nn.Sequential(*(Residual(12) for _ in range(3)))
        self.head = nn.Linear(12, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(self.bn(self.stem(image)).relu()).mean((2, 3)))


class Attention(nn.Module):
    """Heads over separate layers for queries, keys and values, as their logits are what may grow."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(width), Attention(width, causal)
        self.ln2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class ViT(nn.Module):
    """Patches of 7 x 7, one more token than patches, a learned position of the root's own."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 7, stride=7)
        self.position = nn.Parameter(0.02 * torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(depth)))
        self.ln, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.position
        return self.head(self.ln(self.blocks(x))[:, 0])


class GPT(nn.Module):
    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, causal=True) for _ in range(depth)))
        self.ln, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words) + self.position(torch.arange(words.shape[1]))
        return self.head(self.ln(self.blocks(x))).flatten(0, 1)


class LSTM(nn.Module):
    """A cell in a loop over the rows of the image, so that a fault can be planted in every step of time, and a stack of LSTM."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.cell = nn.Linear(14, width), nn.LSTMCell(width, width)
        self.lstm, self.head = nn.LSTM(width, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        rows = self.embed(image[:, 0])
        state, seen = None, []
        for t in range(rows.shape[1]):
            state = self.cell(rows[:, t], state)
            seen.append(state[0])
        out, _ = self.lstm(torch.stack(seen, 1))
        return self.head(out[:, -1])


class TwoTower(nn.Module):
    """Images and their captions, into one space."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.image = nn.ModuleDict(
            {"conv1": nn.Conv2d(1, 8, 3, padding=1), "conv2": nn.Conv2d(8, 16, 3, padding=1), "proj": nn.Linear(16 * 9, width)}
        )
        self.text = nn.ModuleDict(
            {
                "embed": nn.Embedding(WORDS, width),
                "block": Block(width, causal=False),
                "ln": nn.LayerNorm(width),
                "proj": nn.Linear(width, width),
            }
        )

    def forward(self, image: Tensor, words: Tensor) -> Tensor:
        x = F.max_pool2d(self.image["conv1"](image).relu(), 2)
        x = F.max_pool2d(self.image["conv2"](x).relu(), 2)
        pictures = self.image["proj"](x.flatten(1))
        captions = self.text["proj"](self.text["ln"](self.text["block"](self.text["embed"](words))).mean(1))
        return 5 * F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T


def contrast(similarity: Tensor, digits: Tensor) -> Tensor:
    """Cross-entropy over the captions of the batch; all of the right digit count as right."""
    same = (digits[:, None] == digits[None]).float()
    return F.cross_entropy(similarity.float(), same / same.sum(1, keepdim=True))


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


def _attention(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


_BLOCKS = tuple(name for i in range(2) for name in _attention(f"blocks.{i}", "attn.value", "attn.proj", "ln2", "up", "down"))
_RESIDUALS = tuple(f"blocks.{i}.{name}" for i in range(2) for name in ("attn.proj", "down"))
_LOGITS = tuple(f"blocks.{i}.attn.{name}" for i in range(2) for name in ("query", "key"))

TASKS: dict[str, Callable[[], Task]] = {
    "convnet": lambda: Task(ConvNet(), picked, entropy, ("conv1", "conv2", "fc1", "fc2"), 0.1),
    "resnet": lambda: Task(
        ResNet(),
        picked,
        entropy,
        ("stem", *(f"blocks.{i}.{part}" for i in range(3) for part in ("conv1", "bn1", "conv2", "bn2")), "head"),
        0.1,
        residual=tuple(f"blocks.{i}.bn2" for i in range(3)),
    ),
    "vit": lambda: Task(ViT(), picked, entropy, ("patch", *_BLOCKS, "head"), 0.05, _RESIDUALS, _LOGITS),
    "gpt": lambda: Task(GPT(), sentences, entropy, ("embed", *_BLOCKS, "ln", "head"), 0.1, _RESIDUALS, _LOGITS),
    "lstm": lambda: Task(LSTM(), picked, entropy, ("embed", "cell", "lstm", "head"), 0.3, recurrent=("cell",)),
    "towers": lambda: Task(
        TwoTower(),
        captioned,
        contrast,
        ("image.conv1", "image.conv2", "image.proj", "text.embed", "text.block.up", "text.block.down", "text.proj"),
        0.1,
        ("text.block.attn.proj", "text.block.down"),
        ("text.block.attn.query", "text.block.attn.key"),
    ),
}
"""Makes a task, fresh from the random state; `rate` is what SGD with momentum 0.9 takes well, by hand."""


class Deep(nn.Module):
    """Twelve layers whose activation either keeps the gradient or quarters it; only for the fault of that name."""

    def __init__(self, saturating: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(196, 32), *(nn.Linear(32, 32) for _ in range(11))])
        self.head, self.saturating = nn.Linear(32, 10), saturating
        for layer in () if saturating else self.layers:
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(1)
        for layer in self.layers:
            x = layer(x).sigmoid() if self.saturating else layer(x).relu()
        return self.head(x)
