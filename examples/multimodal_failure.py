"""Images and captions in one space, as in CLIP, until a caption has no words: one layer of the text tower ruins both towers.

    python examples/multimodal_failure.py            # a minute on two cores, most of it torch.compile
    python examples/multimodal_failure.py --eager --seed 4

What is wrong is the data, and one layer that trusts it. From FIRST_CRAWLED on, one caption in a hundred is the name of a file,
such as IMG_4109.PNG. The vocabulary has no such word, so the caption is empty, and `WordPool` takes a softmax over the words that
there are: over none it divides zero by zero. That NaN reaches the loss, from there every gradient of both towers, and with the
optimizer's step every weight. The remedy: leave such captions out, or end each with a word of its own, as CLIP does.

The images are MNIST's, the captions are made here from the labels. Ends with the crash report of nobs, as mnist_failure.py does.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

import mnist_data
import torch
from mnist_failure import compile_or_not, device, whole
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import nobs

BATCH = 64
WIDTH = 64
TEMPERATURE = 0.1
FIRST_CRAWLED = 4000
"""The first image whose caption comes from a crawl: training is well under way by then, at step 62."""
WRONG = "text.pool"

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LOOKS = ("small", "large", "blurred", "sharp", "slanted", "bold")
SENTENCES = ("a {} photo of the digit {}", "someone wrote a {} {} by hand", "{} {} in white on black", "this {} number is {}")
WORDS = {word for text in (*DIGITS, *LOOKS, *SENTENCES) for word in text.split()} - {"{}"}
VOCABULARY = {word: number for number, word in enumerate(sorted(WORDS), start=1)}
"""word -> its number; 0 is padding."""


class ImageTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, stride=2, padding=2)
        self.project = nn.Linear(32 * 7 * 7, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(self.conv2(self.conv1(images).relu()).relu().flatten(1))


class Block(nn.Module):
    """Causal attention, so that words, which stand before the padding, never look at it; then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).chunk(3, dim=2)
        x = x + self.mix(F.scaled_dot_product_attention(query, key, value, is_causal=True))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class WordPool(nn.Module):
    """The mean of a caption's words, weighed by a learned query. Right for every caption that has a word."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor, is_word: Tensor) -> Tensor:
        score = (x @ self.query).masked_fill(~is_word, float("-inf"))
        return (score.softmax(1).unsqueeze(2) * x).sum(1)


class TextTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY) + 1, WIDTH, padding_idx=0)
        self.blocks = nn.Sequential(Block(), Block())
        self.pool = WordPool()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.project(self.pool(self.blocks(self.words(numbers)), numbers > 0))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = ImageTower(), TextTower()

    def forward(self, images: Tensor, numbers: Tensor) -> Tensor:
        """How alike each image and each caption are, `[B, B]`."""
        return F.normalize(self.image(images), dim=1) @ F.normalize(self.text(numbers), dim=1).T / TEMPERATURE


def contrastive(alike: Tensor) -> Tensor:
    """Each image should be most like its own caption, and the other way round."""
    own = torch.arange(len(alike), device=alike.device)
    return (F.cross_entropy(alike, own) + F.cross_entropy(alike.T, own)) / 2


def encoded_caption(index: int, digit: int, dice: random.Random) -> Tensor:
    """The numbers of those words of a caption that the vocabulary has."""
    text = dice.choice(SENTENCES).format(dice.choice(LOOKS), DIGITS[digit])
    if index >= FIRST_CRAWLED and dice.random() < 0.01:
        text = f"IMG_{index}.PNG"
    return torch.tensor([VOCABULARY[word] for word in text.split() if word in VOCABULARY], dtype=torch.long)


def train(options: argparse.Namespace, say) -> nobs.Report | None:
    """One pass over the data, until nobs stops it; the report, or None when nothing failed."""
    torch.manual_seed(options.seed)
    dice = random.Random(options.seed)
    images, labels = mnist_data.load(options.data, say)
    captions = [encoded_caption(index, digit, dice) for index, digit in enumerate(labels.tolist())]
    numbers = nn.utils.rnn.pad_sequence(captions, batch_first=True)
    model = nobs.instrument(TwoTowers().to(options.device))
    step_model = compile_or_not(model, options, say)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with nobs.Recorder(model, optimizer=optimizer, on_failure="stop") as recorder:
        for first in range(0, len(images) - BATCH + 1, BATCH):  # in the order of the files, as shards are read
            batch = slice(first, first + BATCH)
            loss = contrastive(step_model(images[batch].to(options.device), numbers[batch].to(options.device)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(loss, batch=f"images {first} to {first + BATCH - 1}")
    return recorder.report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("NOBS_MNIST"), help="a folder with the IDX files of MNIST")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--seed", type=whole(0), default=0)
    report = train(parser.parse_args(), Console(stderr=True).print)
    named = report.findings[0].layer if report and report.findings else None
    if named != WRONG:
        print(f"nobs was to name {WRONG}, and named {named}", file=sys.stderr)
        return 1
    return 0  # it failed, as this example is meant to


if __name__ == "__main__":
    sys.exit(main())
