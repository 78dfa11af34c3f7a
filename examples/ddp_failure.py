"""One bad image on one of several ranks: by the next step every rank is full of NaN, and the report says where it was born.

    torchrun --nproc-per-node 2 examples/ddp_failure.py
    torchrun --nproc-per-node 4 examples/ddp_failure.py --compile

Each rank trains on its own part of MNIST, with DistributedDataParallel over gloo, on CPUs. What is wrong is the data, and one
line that trusts it: a scan in the part of the last rank is blank, and `contrast` divides each image by its own spread, which is
zero there. The NaN reaches that rank's outputs, and its gradients; the reduction takes them to all ranks, and the optimizer to
every weight. From then on all ranks look alike. Ends with what rank 0 prints: one report of all ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import mnist_data
import torch
import torch.distributed as dist
from mnist_failure import ConvNet
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nobs

BATCH = 32
STEPS = 100
BLANK_AT = 40
"""The step at which the blank scan comes."""


def contrast(images: Tensor) -> Tensor:
    """Each image with mean 0 and spread 1; nobody thought of an image without any."""
    flat = images.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view_as(images)


def part_of(rank: int, ranks: int, folder: Path | None) -> tuple[Tensor, Tensor]:
    """The images and labels that a rank trains on; among those of the last one there is a blank scan."""
    images, labels = mnist_data.load(folder, say=print if rank == 0 else lambda _: None)
    images, labels = images[rank::ranks].clone(), labels[rank::ranks]
    if rank == ranks - 1:
        images[BLANK_AT * BATCH + 7] = 0
    return images, labels


def train(options: argparse.Namespace) -> nobs.Report | None:
    """Train until nobs stops all ranks; this rank's report, or None when nothing failed."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(options.seed)
    images, labels = part_of(rank, ranks, options.data)
    model = nobs.instrument(ConvNet())
    if options.compile:
        model.compile()
    train_model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with nobs.Recorder(train_model, optimizer=optimizer, on_failure="stop") as recorder:
        for step in range(STEPS):
            batch = torch.arange(step * BATCH, (step + 1) * BATCH) % len(images)
            loss = nn.functional.cross_entropy(train_model(contrast(images[batch])), labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(loss, batch=batch.tolist()[:8])
    return recorder.report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("NOBS_MNIST"), help="a folder with the IDX files of MNIST")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, inside of DistributedDataParallel")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("this wants several processes: torchrun --nproc-per-node 2 examples/ddp_failure.py")
    dist.init_process_group("gloo")
    try:
        report = train(options)
    finally:
        dist.destroy_process_group()
    return 0 if report else 1  # it failed, as this example is meant to


if __name__ == "__main__":
    sys.exit(main())
