"""What torchrun runs for test_parallel.py: each way of `parallel_ways` trained with nobs and without, and what differed.

    torchrun --nproc-per-node 2 tests/parallel_worker.py FOLDER [WAY...]

Each rank writes what it saw of a way to FOLDER/WAY-RANK.json. A way that fails on every rank does not end the others.
"""

import json
import math
import sys
import time
import traceback
import warnings
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_ways import SEQUENCE, WAYS, Net, loss_of, piped
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from twin import furthest, reference, worst

import nobs

STEPS = 3


# -- the slow reference -----------------------------------------------------------------------------------------------------


def lying_here(x):
    """The part of a tensor on this rank, without nobs."""
    x = x.to_local() if isinstance(x, DTensor) else x
    return (x.trigger_wait() if isinstance(x, AsyncCollectiveTensor) else x).detach()


class Witness:
    """Reads, in eager, the outputs of layers and their gradients: the rank's own, in float64."""

    def __init__(self, net):
        self.sites = defaultdict(list)
        for name, layer in net.named_modules():
            if any(parameter is not None for parameter in layer._parameters.values()):
                self._watch(layer, name or "(model)")

    def _watch(self, layer, name):
        def forward(*args, **kwargs):
            output = type(layer).forward(layer, *args, **kwargs)
            if layer.training or torch.is_grad_enabled():
                self._read(name, "output", output)
            if output.requires_grad:
                output.register_hook(lambda gradient: self._read(name, "output.grad", gradient))
            return output

        layer.forward = forward

    def _read(self, name, site, x):
        self.sites[name, site].append(reference(lying_here(x)))

    def take(self):
        """The lines of the step, which then begins anew."""
        lines = {key: worst(readings) for key, readings in self.sites.items()}
        self.sites.clear()
        return lines


def parameter_lines(net):
    """(layer, site) -> statistics of each parameter and of its gradient, as the optimizer finds them."""
    lines = {}
    for name, parameter in net.named_parameters():
        layer, _, own = name.rpartition(".")
        lines[layer or "(model)", own] = reference(lying_here(parameter))
        if parameter.grad is not None:
            lines[layer or "(model)", f"{own}.grad"] = reference(lying_here(parameter.grad))
    return lines


# -- training ---------------------------------------------------------------------------------------------------------------


def batch_of(way, stream, step, micro):
    generator = torch.Generator().manual_seed(1000 * step + 10 * stream + micro)
    size = 4 + (2 * stream if way.uneven else 0)
    x, y = (torch.randint(7, (size, SEQUENCE), generator=generator) for _ in range(2))
    taken = "branch" not in way.net or (step < 2 and (stream + step) % 2 == 0)
    return (x, taken), y


def batches_of(way, stream, step):
    return [batch_of(way, stream, step, micro) for micro in range(way.micros)]


def new_net(way, **options):
    torch.manual_seed(0)
    return Net(**way.net, **options)


def collectives():
    """How many there were on this rank, in all groups."""
    groups = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups if group.name() == "gloo")


class Training:
    """Three steps of one way on this rank, and what is to be compared of them."""

    def __init__(self, way, *, observed=False, backend=None, witness=False):
        torch._dynamo.reset()
        counters.clear()
        self.way = way
        begun = collectives()
        stages = {"parts": (0,) if dist.get_rank() == 0 else (1, 2)} if way.step is piped else {}
        self.net = new_net(way, **stages)
        if observed and not way.late:
            nobs.instrument(self.net)
        self.witness = Witness(self.net) if witness else None
        for block in self.net.blocks.values() if backend else ():
            block.compile(backend=backend)
        self.run = (way.reference if witness and way.reference else way.wrap)(self.net)
        if observed and way.late:
            nobs.instrument(self.net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, foreach=False)
        if way.tried:
            with torch.no_grad():
                self.run(torch.zeros(1, SEQUENCE, dtype=torch.long))
        self.ring = nobs.RingBuffer(self.net if way.step is piped else self.run) if observed else None
        if self.witness:
            self.witness.take()
        self.losses, self.seen, self.lines, self.rows = [], [], [], []
        for step in range(STEPS):
            self._step(step)
        self.collectives = collectives() - begun
        self.graphs = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    def _step(self, step):
        self.losses.append(self.way.step(self.run, batches_of(self.way, dist.get_rank() // self.way.same, step)))
        self.lines.append(parameter_lines(self.net))
        if self.witness:
            self.seen.append(self.witness.take())
        if self.way.same == 1:  # torch clips no mixture of tensors and DTensors
            nn.utils.clip_grad_norm_(self.net.parameters(), 0.01, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ring is not None:
            self.ring.add(step, self.losses[-1])
            self.rows += self.ring.drain()

    def state(self):
        return {name: lying_here(x) for name, x in (*self.net.named_parameters(), *self.net.named_buffers())}


def single(way):
    """One process with the data of all ranks: the norm of each parameter's gradient, by step."""
    net = new_net(way)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=False)
    streams = range(-(-dist.get_world_size() // way.same))
    norms = []
    for step in range(STEPS):
        for stream in streams:
            for inputs, y in batches_of(way, stream, step):
                (loss_of(net(*inputs), y) / way.micros / len(streams)).backward()
        lines = parameter_lines(net)
        norms.append({f"{layer} {site}": line["norm"] for (layer, site), line in lines.items() if site.endswith(".grad")})
        if way.same == 1:
            nn.utils.clip_grad_norm_(net.parameters(), 0.01, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
    return norms


# -- what is compared -------------------------------------------------------------------------------------------------------


def numbers(observed, witness):
    """The largest relative error of a statistic on this rank, and where."""
    steps = zip(observed.rows, witness.seen, observed.lines, strict=True)
    return max(furthest(row, seen | own) for row, seen, own in steps)


def recorded(observed, bare):
    """The gradients of parameters in the ring, by step, and without nobs; and which part of the whole they are."""
    history = observed.ring.history()
    return {
        f"{tap.layer} {tap.site}": {
            "norms": history[tap.layer, tap.site, "norm"].tolist(),
            "bare": [lines.get((tap.layer, tap.site), {"norm": math.nan})["norm"] for lines in bare.lines],
            "elements": history[tap.layer, tap.site, "elements"].tolist(),
            "shard": [shard.index, shard.of, shard.addend] if (shard := history.shards.get((tap.layer, tap.site))) else None,
        }
        for tap in history.table.taps
        if tap.kind == "parameter.grad"
    }


def apart(observed, bare):
    """How far two trainings are from each other: 0.0 where every bit is the same."""
    ours, theirs = observed.state(), bare.state()
    assert list(ours) == list(theirs)
    pairs = [(ours[name].double(), theirs[name].double()) for name in ours]
    pairs += [(torch.tensor(a or 0.0), torch.tensor(b or 0.0)) for a, b in zip(observed.losses, bare.losses, strict=True)]
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs)


def held(training):
    """What torch's wrappers and the optimizer hold of a model, by number and by name."""
    run, net = training.run, training.net
    model, optimizer = get_state_dict(net, training.optimizer)
    facts = {
        "state": list(model),
        "optimizer": sorted(optimizer["state"]),
        "parameters": [name for name, _ in net.named_parameters()],
        "buffers": [name for name, _ in net.named_buffers()],
        "groups": [len(group["params"]) for group in training.optimizer.param_groups],
    }
    if isinstance(run, nn.parallel.DistributedDataParallel):
        facts["ddp"] = [len(run._module_parameters), len(run.modules_buffers), list(run.state_dict())]
    states = [module._get_fsdp_state() for module in net.modules() if hasattr(module, "_get_fsdp_state")]
    return facts | {"fsdp": [len(state._fsdp_param_group.fsdp_params) for state in states]}


def saved_and_loaded(observed, folder):
    """A checkpoint of an instrumented model has the plain model's tensors, and gives them back."""
    state = get_model_state_dict(observed.net)
    before = {name: lying_here(x).clone() for name, x in state.items()}
    dcp.save(state, checkpoint_id=folder)
    names = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    with torch.no_grad():
        for parameter in observed.net.parameters():
            lying_here(parameter).zero_()
    fresh = get_model_state_dict(observed.net)
    dcp.load(fresh, checkpoint_id=folder)
    set_model_state_dict(observed.net, fresh)
    same = all(torch.equal(lying_here(x), before[name]) for name, x in get_model_state_dict(observed.net).items())
    return {"names": sorted(names) == sorted(before), "same": same}


def compare(way, folder, outcome):
    """All that test_parallel.py asks of a way."""
    witness = Training(way, witness=True)  # first: what torch refuses by itself is refused here
    bare = Training(way, backend=way.backend) if way.backend or way.reference else witness
    outcome |= {"single": single(way) if way.exact else None, "bare": True}
    observed = Training(way, observed=True, backend=way.backend)
    outcome["broken"] = repr(observed.ring.row.broken)
    error, where = numbers(observed, witness)
    outcome |= {
        "error": error,
        "where": where,
        "recorded": recorded(observed, bare),
        "apart": apart(observed, bare),
        "collectives": [bare.collectives, observed.collectives],
        "graphs": [bare.graphs, observed.graphs],
        "held": [held(bare), held(observed)],
    }
    if way.saved:
        outcome["checkpoint"] = saved_and_loaded(observed, folder)


def attempt(name, folder):
    begun, outcome = time.monotonic(), {"bare": False}
    try:
        compare(WAYS[name], folder / f"{name}-checkpoint", outcome)
    except Exception as error:
        outcome |= {"exception": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    outcome["time_s"] = time.monotonic() - begun
    (folder / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(outcome))


def main(folder, names):
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    for name, way in WAYS.items():
        if dist.get_world_size() in way.worlds and (not names or name in names):
            attempt(name, folder)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2:])
