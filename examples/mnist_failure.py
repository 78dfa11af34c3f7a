"""A ConvNet on MNIST whose learning rate warms up until training blows up by itself. Nothing is injected.

    python examples/mnist_failure.py            # a minute on two cores, most of it torch.compile
    python examples/mnist_failure.py --eager --lr 3 --seed 4

Ends with the crash report of nobs in the terminal, and its JSON and PNG under ./crashes.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from pathlib import Path

import mnist_data
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import nobs

BATCH = 64
FIRST_LR = 0.01
AFTER_WARMUP = 100
"""Steps at the full learning rate before the program gives up waiting for a failure."""


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        self.fc1 = nn.Linear(32 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x).relu_(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu_(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu_())


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Geometric, from FIRST_LR to `--lr` over `--warmup` steps."""
    share = min(1.0, step / options.warmup) if options.warmup else 1.0
    return FIRST_LR ** (1 - share) * options.lr**share


def compile_or_not(model: nn.Module, options: argparse.Namespace, say) -> nn.Module:
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    if options.eager:
        return model
    if not any(shutil.which(compiler) for compiler in compilers):
        say("Inductor finds no C++ compiler here: training eagerly")
        return model
    say("torch.compile: compiling ...")
    return torch.compile(model, fullgraph=True)


def train(options: argparse.Namespace, console: Console) -> nobs.Report | None:
    """Train until nobs stops it; the report, or None when nothing failed."""
    torch.manual_seed(options.seed)
    images, labels = (part.to(options.device) for part in mnist_data.load(options.data, console.print))
    model = nobs.instrument(ConvNet().to(options.device), every=options.every)
    step_model = compile_or_not(model, options, console.print)
    optimizer = torch.optim.SGD(model.parameters(), lr=FIRST_LR)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, transient=True) as progress,
        nobs.Recorder(model, optimizer=optimizer, capacity=options.capacity, on_failure="stop") as recorder,
    ):
        steps = options.warmup + AFTER_WARMUP
        bar = progress.add_task("", total=steps)
        for step in range(steps):
            batch = torch.randint(len(images), (BATCH,))
            optimizer.param_groups[0]["lr"] = learning_rate(step, options)
            loss = nn.functional.cross_entropy(step_model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0:  # reading the loss waits for the device: not at every step
                progress.update(bar, completed=step, description=f"loss {loss.item():.3f}  lr {learning_rate(step, options):.3g}")
            recorder.step(loss, batch=batch.tolist()[:8])
    return recorder.report


def rate(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ValueError(text)
    return float(text)


def whole(lowest: int):
    def count(text: str) -> int:
        if int(text) < lowest:
            raise ValueError(text)
        return int(text)

    return count


def device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # no such device, or no driver for it here
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=rate, default=100.0, help="where the warm-up leads to (100)")
    parser.add_argument("--warmup", type=whole(0), default=400, help="steps of geometric warm-up (400); 0 starts at --lr")
    parser.add_argument("--data", type=Path, default=os.environ.get("NOBS_MNIST"), help="a folder with the IDX files of MNIST")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--capacity", type=whole(1), default=100, help="steps that the recorder remembers (100)")
    parser.add_argument("--every", type=whole(1), default=1, help="record layers at every k-th step (1)")
    parser.add_argument("--seed", type=whole(0), default=0)
    report = train(parser.parse_args(), Console(stderr=True))
    if report is None:
        print("nothing failed: try a larger --lr", file=sys.stderr)
        return 1
    return 0  # it failed, as this example is meant to


if __name__ == "__main__":
    sys.exit(main())
