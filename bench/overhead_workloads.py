"""The models that the cost is measured on, each with its own batches, loss, optimizer and blocks.

    workload = make("gpt", "cpu")
    loss = workload.loss(workload.model, workload.batch(0))

On a CPU they are cut small, so that a step takes some 50 to 300 ms; on CUDA they have the sizes of practice; `quick=True`
makes toys of them, to try a bench. Batches are drawn once, and come round: the data loader is no part of the figures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from torchvision_anyway import torchvision

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, on the device."""

Sizes = dict[str, int]

BATCHES = 4
"""How many are drawn."""

TINY_LAYERS = {"layers": 300, "chunk": 30}
"""How many there are, and how many of them are compiled at a time where that is done by parts."""


class Attention(nn.Module):
    """Causal self-attention by `scaled_dot_product_attention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One block of a GPT, norm first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Embeddings, blocks, and a head of its own."""

    def __init__(self, words: int, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Tiny(nn.Module):
    """A layer so small that what is done to it besides costs the most. Residual, so that a gradient comes through 300."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(self.linear(x))


@dataclass(frozen=True)
class Kind:
    """A workload without its sizes: how to build it, what it eats, what trains it, and where its blocks are."""

    sizes: Callable[[str], Sizes]
    """Of "quick", "cpu" or "cuda"."""
    build: Callable[[Sizes], nn.Module]
    draw: Callable[[Sizes], Batch]
    optimizer: Callable[..., torch.optim.Optimizer]
    blocks: Callable[[nn.Module], Sequence[nn.Module]]


@dataclass(frozen=True)
class Workload:
    """One model that is about to be trained."""

    name: str
    model: nn.Module
    batches: Sequence[Batch]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    """The parts to be compiled one by one."""
    device: torch.device
    dtype: torch.dtype

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        return self.batches[step % len(self.batches)]

    def loss(self, model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """The loss of a batch; in bfloat16 under autocast."""
        inputs, targets = batch
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def make(name: str, device: str | torch.device, dtype: str = "float32", quick: bool = False) -> Workload:
    """A workload with a fresh model, always with the same weights and batches.

    Raises:
        KeyError: no such workload.
        ImportError: it needs torchvision, which is not installed.
    """
    device, kind = torch.device(device), KINDS[name]
    sizes = kind.sizes("quick" if quick else device.type)
    torch.manual_seed(0)
    batches = tuple((x.to(device), y.to(device)) for x, y in (kind.draw(sizes) for _ in range(BATCHES)))
    model = kind.build(sizes).to(device)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return kind.optimizer(model.parameters(), fused=True if device.type == "cuda" else None)

    return Workload(name, model, batches, optimizer, kind.blocks, device, getattr(torch, dtype))


# -- the four ----------------------------------------------------------------------------------------------------------


def _gpt_sizes(where: str) -> Sizes:
    return {
        "quick": {"batch": 2, "words": 32, "length": 16, "width": 32, "heads": 2, "blocks": 2},
        "cpu": {"batch": 8, "words": 256, "length": 128, "width": 256, "heads": 4, "blocks": 4},
        "cuda": {"batch": 8, "words": 50304, "length": 1024, "width": 768, "heads": 12, "blocks": 12},
    }[where]


def _image_sizes(where: str, batch_cpu: int, batch_cuda: int) -> Sizes:
    return {
        "quick": {"batch": 4, "pixels": 32, "classes": 10},
        "cpu": {"batch": batch_cpu, "pixels": 64, "classes": 100},
        "cuda": {"batch": batch_cuda, "pixels": 224, "classes": 1000},
    }[where]


def _sentences(sizes: Sizes) -> Batch:
    words = torch.randint(sizes["words"], (sizes["batch"], sizes["length"] + 1))
    return words[:, :-1], words[:, 1:].contiguous()


def _images(sizes: Sizes) -> Batch:
    return torch.randn(sizes["batch"], 3, sizes["pixels"], sizes["pixels"]), torch.randint(sizes["classes"], (sizes["batch"],))


def _vectors(sizes: Sizes) -> Batch:
    return torch.randn(sizes["batch"], sizes["width"]), torch.randint(sizes["width"], (sizes["batch"],))


def _vit(sizes: Sizes) -> nn.Module:
    """ViT-B/16 at full size; of the same class, but four layers of a quarter of the width, or a toy."""
    models, pixels = torchvision().models, sizes["pixels"]
    if pixels == 224:
        return models.vit_b_16(num_classes=sizes["classes"])
    width, layers = (192, 4) if pixels == 64 else (32, 2)
    return models.VisionTransformer(pixels, pixels // 8, layers, width // 16, width, 4 * width, num_classes=sizes["classes"])


def _mlp(sizes: Sizes) -> nn.Module:
    """Chunks of tiny layers: as many as are compiled at a time where that is done by parts."""
    chunks = range(sizes["layers"] // sizes["chunk"])
    return nn.Sequential(*(nn.Sequential(*(Tiny(sizes["width"]) for _ in range(sizes["chunk"]))) for _ in chunks))


def _adamw(parameters: Iterator[nn.Parameter], fused: bool | None) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-4, fused=fused)


def _sgd(parameters: Iterator[nn.Parameter], fused: bool | None) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=fused)


KINDS: dict[str, Kind] = {
    "gpt": Kind(
        sizes=_gpt_sizes,
        build=lambda s: GPT(s["words"], s["length"], s["width"], s["heads"], s["blocks"]),
        draw=_sentences,
        optimizer=_adamw,
        blocks=lambda model: list(model.blocks),
    ),
    "resnet18": Kind(
        sizes=lambda where: _image_sizes(where, batch_cpu=16, batch_cuda=128),
        build=lambda s: torchvision().models.resnet18(num_classes=s["classes"]),
        draw=_images,
        optimizer=_sgd,
        blocks=lambda model: [b for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for b in layer],
    ),
    "vit": Kind(
        sizes=lambda where: _image_sizes(where, batch_cpu=8, batch_cuda=64),
        build=_vit,
        draw=_images,
        optimizer=_adamw,
        blocks=lambda model: list(model.encoder.layers),
    ),
    "mlp300": Kind(
        sizes=lambda where: {"batch": 32, "width": 16, **({"layers": 20, "chunk": 5} if where == "quick" else TINY_LAYERS)},
        build=_mlp,
        draw=_vectors,
        optimizer=_sgd,
        blocks=lambda model: list(model),
    ),
}
