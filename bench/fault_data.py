"""What the models of the benchmark learn: MNIST at half its size, captions of it, and a made language."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import mnist_data

Batch = tuple[dict[str, Tensor], Tensor]
"""Inputs by name, and targets."""

WORDS, LENGTH = 24, 16
"""Of the language: how many words, and how many in a sentence."""


@cache
def images() -> tuple[Tensor, Tensor]:
    """MNIST of 14 x 14 pixels, normalised, and its labels."""
    folder = os.environ.get("NOBS_MNIST")
    pixels, labels = mnist_data.load(Path(folder) if folder else None, say=lambda _: None)
    return F.avg_pool2d(pixels, 2), labels


def picked(generator: torch.Generator, count: int = 32) -> Batch:
    """Some images, and what they show."""
    pixels, labels = images()
    chosen = torch.randint(len(pixels), (count,), generator=generator)
    return {"image": pixels[chosen]}, labels[chosen]


def sentences(generator: torch.Generator, count: int = 16) -> Batch:
    """A made language: the next word is the last one plus 3, with one word in five drawn at random."""
    words = torch.randint(WORDS, (count, LENGTH + 1), generator=generator)
    for t in range(1, LENGTH + 1):
        follow = torch.rand(count, generator=generator) < 0.8
        words[:, t] = torch.where(follow, (words[:, t - 1] + 3) % WORDS, words[:, t])
    return {"words": words[:, :-1]}, words[:, 1:].flatten()


def captioned(generator: torch.Generator, count: int = 32) -> Batch:
    """Images and captions: two words that tell the digit and three of noise. The target is each image's own caption."""
    inputs, digits = picked(generator, count)
    noise = torch.randint(12, WORDS, (count, 3), generator=generator)
    words = torch.cat([digits[:, None], (digits[:, None] * 7) % 10, noise], 1)
    return {**inputs, "words": words}, digits
