"""The ways to train on several ranks: how a model is wrapped, what a step does, which data a rank sees. Run by `parallel`."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

SEQUENCE = 8
CHUNKS = 4


class Block(nn.Module):
    """As in a GPT, without attention. With `hidden` at 5, four ranks hold 2, 2, 1 and none of its rows."""

    def __init__(self, d, hidden, reentrant):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.norm.bias.requires_grad_(False)
        self.reentrant = reentrant

    def inner(self, x):
        return self.down(torch.relu(self.up(self.norm(x))))

    def forward(self, x):
        return x + (self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant))


class Net(nn.Module):
    """`parts` names what of it there is, for a stage of a pipeline; `taken` whether the branch is."""

    def __init__(self, d=15, hidden=5, tied=True, reentrant=None, batch_norm=False, branch=False, parts=(0, 1, 2)):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.embed = nn.Embedding(7, d)
        self.blocks = nn.ModuleDict({str(i): Block(d, hidden, reentrant) for i in range(2)})
        self.branch = nn.Linear(d, d) if branch else None
        self.bn = nn.BatchNorm1d(d) if batch_norm else None
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 7)
        if tied:
            self.head.weight = self.embed.weight
        if 0 not in parts:
            self.embed = None
        if 2 not in parts:
            self.norm = self.head = self.gain = None
        for i in ({0, 1} - {*parts}) if len(parts) < 3 else ():
            del self.blocks[str(i)]

    def forward(self, x, taken=True):
        x = x if self.embed is None else self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        if self.branch is not None and taken:
            x = x + self.branch(x)
        if self.bn is not None:
            x = self.bn(x.flatten(0, 1)).view_as(x)
        return x if self.head is None else self.head(self.norm(x)) * self.gain


def loss_of(output, y):
    return nn.functional.cross_entropy(output.float().flatten(0, 1), y.flatten())


# -- what a step does: forward and backward over the micro-batches of this rank ---------------------------------------------


def always(run, last):
    """Nothing is put off to the last micro-batch."""
    return contextlib.nullcontext()


def ddp_last(run, last):
    return contextlib.nullcontext() if last else run.no_sync()


def fsdp_last(run, last, gathered=False):
    """Gradients are reduced in the last micro-batch; until then parameters may stay gathered behind a backward."""
    run.set_requires_gradient_sync(last)
    run.set_reshard_after_backward(last or not gathered)
    return contextlib.nullcontext()


def plain(run, batches, reduced=always):
    """One backward a micro-batch; gives the loss."""
    total = 0.0
    for i, (inputs, y) in enumerate(batches):
        with reduced(run, i == len(batches) - 1):
            loss = loss_of(run(*inputs), y) / len(batches)
            loss.backward()
        total += loss.item()
    return total


def in_bfloat16(run, batches):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(run(*batches[0][0]), batches[0][1])
    loss.backward()
    return loss.item()


def evaluated(run, batches):
    """A validation before each step: under FSDP2 the root's parameters stay gathered behind it."""
    with torch.no_grad():
        run(*batches[0][0])
    return plain(run, batches)


def piped(run, batches):
    """A pipeline cuts the batch into chunks; only the last stage has a loss."""
    (x, _), y = batches[0]
    losses = []
    run.step(*([x] if run._stage.is_first else []), target=y, losses=losses)
    return sum(loss.item() for loss in losses) if run._stage.is_last else None


# -- how a model is wrapped -------------------------------------------------------------------------------------------------


def ddp(net, **options):
    return DistributedDataParallel(net, **options)


def sharded(net, mesh=None, late=False, **options):
    """FSDP2: each block, and the root with the rest."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks.values():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def hybrid(net):
    """Sharded over two ranks, copied over two such pairs."""
    return sharded(net, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


def tensor_parallel(net, mesh=None):
    """Layers cut over ranks that see the same data; what lies between two halves stays a DTensor, cut unevenly."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks.values():
        parallelize_module(block, mesh, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()})
    return net


def sequence_parallel(net):
    """The sequence is cut where layers are not: norms see a part of it, and their gradients are addends."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    if net.branch is not None:
        plan["branch"] = SequenceParallel(use_local_output=True)
    for i in net.blocks:
        plan |= {
            f"blocks.{i}.norm": SequenceParallel(use_local_output=True),
            f"blocks.{i}.up": ColwiseParallel(input_layouts=Shard(1)),
            f"blocks.{i}.down": RowwiseParallel(output_layouts=Shard(1)),
        }
    parallelize_module(net, mesh, plan)
    return frozen_again(net)


def sequence_parallel_blocks(net):
    """The same for the blocks alone: the sequence is cut before the first, and put together behind the last."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks.values():
        plan = {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}
        parallelize_module(block, mesh, {"norm": SequenceParallel(), **plan})

    def moved(x, here, there):
        return DTensor.from_local(x, mesh, [here]).redistribute(placements=[there]).to_local()

    net.embed.register_forward_hook(lambda layer, given, x: moved(x, Replicate(), Shard(1)))
    net.norm.register_forward_pre_hook(lambda layer, given: moved(given[0], Shard(1), Replicate()))
    return frozen_again(net)


def frozen_again(net):
    """torch thaws the parameters that it distributes over a sequence."""
    for block in net.blocks.values():
        block.norm.bias.requires_grad_(False)
    return net


def tensor_parallel_and_sharded(net):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return sharded(tensor_parallel(net, mesh["tensor"]), mesh["data"])


def stage_of(net, schedule, known=False, **options):
    """This rank's stage of two, of a net that has no more than that. What is not `known` to it torch finds out by a trial."""
    from torch.distributed import pipelining

    chunk, between = torch.zeros(1, SEQUENCE, dtype=torch.long), torch.zeros(1, SEQUENCE, 16, requires_grad=True)
    shapes = [(chunk, between), (between, torch.zeros(1, SEQUENCE, 7, requires_grad=True))][dist.get_rank()]
    example = {"input_args": (shapes[0],), "output_args": (shapes[1],)} if known else {}
    stage = pipelining.PipelineStage(net, dist.get_rank(), dist.get_world_size(), torch.device("cpu"), **example)
    parts = CHUNKS if options else 1  # what nobody divides by later
    return getattr(pipelining, schedule)(stage, CHUNKS, loss_fn=lambda output, y: loss_of(output, y) / parts, **options)


def sharded_stage(net, **options):
    """A pipeline of stages that are FSDP2's, over a mesh of one rank each: who reduces gradients is the schedule."""
    return stage_of(sharded(net, init_device_mesh("cpu", (2, 1), mesh_dim_names=("stages", "data"))["data"]), **options)


# -- the table --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way to train on several ranks.

    Attributes:
        wrap: gives what is called in place of the net, which has its taps by then or (`late`) gets them behind it.
        step: forward and backward over the micro-batches.
        net: options of the net.
        worlds: with how many ranks.
        same: how many ranks in a row see the same data.
        backend: which compiler the blocks are compiled with.
        uneven: the batches of ranks differ in size.
        exact: its gradients, put together, are those of one process with the data of all, to float32.
        saved: its state is saved and loaded too.
        tried: it is called once before anything is recorded; under FSDP2 the root's parameters stay gathered behind that.
        reference: how the model is wrapped where the slow reference looks on, if in another way.
    """

    wrap: Callable
    step: Callable = plain
    net: dict = field(default_factory=dict)
    worlds: tuple[int, ...] = (2, 4)
    micros: int = 1
    same: int = 1
    backend: str | None = None
    late: bool = False
    uneven: bool = False
    exact: bool = True
    saved: bool = False
    tried: bool = False
    reference: Callable | None = None


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
TP = {"tied": False, "d": 16}
SP = TP | {"hidden": 8}
ALL = 1_000_000
COMPILER = "inductor" if os.environ.get("NOBS_KERNELS") else "aot_eager"
"""Kernels take minutes to build, on each rank: `tox run -e matrix` does it."""

WAYS = {
    "ddp": Way(ddp, saved=True),
    "ddp, bucket views": Way(partial(ddp, gradient_as_bucket_view=True)),
    "ddp, static graph": Way(partial(ddp, static_graph=True), worlds=(2,)),
    "ddp, branch": Way(partial(ddp, find_unused_parameters=True), net={"branch": True}),
    "ddp, branch, bucket views": Way(
        partial(ddp, find_unused_parameters=True, gradient_as_bucket_view=True), net={"branch": True}, worlds=(2,)
    ),
    "ddp, no_sync": Way(ddp, partial(plain, reduced=ddp_last), micros=3, worlds=(2,)),
    "ddp, micro-batches": Way(ddp, micros=3, worlds=(2,)),
    "ddp, checkpoint": Way(ddp, net={"reentrant": False}, worlds=(2,)),
    "ddp, reentrant": Way(ddp, net={"reentrant": True}, worlds=(2,)),
    "ddp, reentrant, static": Way(partial(ddp, static_graph=True), net={"reentrant": True}, worlds=(2,)),
    "ddp, batch norm": Way(ddp, net={"batch_norm": True}, worlds=(2,)),
    "ddp, autocast": Way(ddp, in_bfloat16, exact=False, worlds=(2,)),
    "ddp, blocks": Way(ddp, backend=COMPILER, worlds=(2,)),
    "ddp, blocks, no_sync": Way(ddp, partial(plain, reduced=ddp_last), micros=2, backend="aot_eager", worlds=(2,)),
    "fsdp": Way(sharded, saved=True),
    "fsdp, late": Way(sharded, late=True),
    "fsdp, bf16": Way(partial(sharded, mp_policy=BF16), exact=False, worlds=(2,)),
    "fsdp, gathered": Way(partial(sharded, reshard_after_forward=False), worlds=(2,)),
    "fsdp, last": Way(sharded, partial(plain, reduced=fsdp_last), micros=3),
    "fsdp, last, gathered": Way(sharded, partial(plain, reduced=partial(fsdp_last, gathered=True)), micros=3, worlds=(2,)),
    "fsdp, micro-batches": Way(sharded, micros=3, worlds=(2,)),
    "fsdp, evaluated": Way(sharded, evaluated, worlds=(2,)),
    "fsdp, tried": Way(sharded, partial(plain, reduced=fsdp_last), micros=2, worlds=(2,), tried=True),
    "fsdp, checkpoint": Way(sharded, net={"reentrant": False}, worlds=(2,)),
    "fsdp, reentrant": Way(sharded, net={"reentrant": True}, worlds=(2,)),
    "fsdp, uneven batches": Way(sharded, uneven=True),
    "fsdp, blocks": Way(sharded, backend=COMPILER, worlds=(2,)),
    "fsdp, blocks, checkpoint": Way(sharded, net={"reentrant": False}, backend=COMPILER, worlds=(2,)),
    "hsdp": Way(hybrid, worlds=(4,), saved=True),
    "tp": Way(tensor_parallel, net=TP, same=ALL, saved=True),
    "tp, blocks": Way(tensor_parallel, net=TP, same=ALL, backend="aot_eager", worlds=(2,)),
    "sequence parallel": Way(sequence_parallel, net=SP, same=ALL),
    "sequence parallel, branch": Way(sequence_parallel, net=SP | {"branch": True}, same=ALL, worlds=(2,)),
    "sequence parallel, blocks": Way(sequence_parallel_blocks, net=SP, same=ALL, backend="aot_eager", worlds=(2,)),
    "tp, fsdp": Way(tensor_parallel_and_sharded, net=SP, same=2, worlds=(4,), saved=True),
    **{
        name: Way(
            partial(wrap, schedule=schedule, **options),
            piped,
            TP,
            (2,),
            same=ALL,
            reference=partial(wrap, schedule=schedule, known=True, **options),
        )
        for name, wrap, schedule, options in (
            ("gpipe", stage_of, "ScheduleGPipe", {}),
            ("gpipe, sums", stage_of, "ScheduleGPipe", {"scale_grads": False}),
            ("1f1b", stage_of, "Schedule1F1B", {}),
            ("1f1b, fsdp", sharded_stage, "Schedule1F1B", {}),
        )
    },
}

if torch.__version__ < "2.9":
    del WAYS["1f1b, fsdp"]  # torch 2.7 hangs in it, with nobs or without
    del WAYS["fsdp, blocks, checkpoint"]  # and checks versions of what a graph that recomputes keeps: the clock of nobs too
