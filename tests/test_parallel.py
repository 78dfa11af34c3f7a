"""Right numbers on every rank, however a training is spread over several, and nobody in its way: DDP, FSDP2, TP, pipelines.

All ways run in two launches (`parallel_worker`), as a launch takes seconds; here is read what the ranks saw.
"""

import contextlib
import fcntl
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from parallel_ways import WAYS
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce

import nobs
from nobs._local import local

HERE = Path(__file__).parent
RANKS = (2, 4)
CELLS = [(name, ranks) for ranks in RANKS for name, way in WAYS.items() if ranks in way.worlds]
SHIFTED = 1e-6
"""How far a compiled training may be from the same without nobs: in the last bits, as a tap makes Inductor round values."""


def launched(folder, ranks):
    worker = [str(HERE / "parallel_worker.py"), str(folder)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *worker]
    alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no further processes that compile, for each rank
    environ = {**os.environ, **alone, "PYTHONPATH": str(HERE.parent)}
    with (folder / "said.txt").open("w") as said:
        return subprocess.Popen(command, cwd=folder, env=environ, stdout=said, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """By way and number of ranks, what each rank saw. Of several test processes the first launches, and the others wait."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "parallel"
    folders = {ranks: base / str(ranks) for ranks in RANKS}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "done").exists():
            launches = {ranks: launched(folder, ranks) for ranks, folder in folders.items()}
            for launch in launches.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    launch.wait(timeout=240)
                launch.kill()
            (base / "done").touch()
    found = {}
    for name, ranks in CELLS:
        files = [folders[ranks] / f"{name}-{rank}.json" for rank in range(ranks)]
        found[name, ranks] = [json.loads(file.read_text()) for file in files if file.exists()]
    return found, {ranks: (folder / "said.txt").read_text() for ranks, folder in folders.items()}


@pytest.fixture
def words(seen, request):
    """What each rank saw of a way; where torch alone could not train so, the test is skipped."""
    name, ranks = request.node.callspec.params["name"], request.node.callspec.params["ranks"]
    found, said = seen
    assert len(found[name, ranks]) == ranks, said[ranks][-3000:]
    for word in found[name, ranks]:
        if not word["bare"] and torch.__version__ < "2.13":
            pytest.skip(f"torch {torch.__version__} itself: {word['exception'][:200]}")
        assert "exception" not in word, word["traceback"]
    return found[name, ranks]


each_way = pytest.mark.parametrize(("name", "ranks"), CELLS, ids=[f"{name}, {ranks} ranks" for name, ranks in CELLS])


@each_way
def test_each_rank_records_what_it_has(words, name, ranks, record_property):
    """Every statistic of every site is that of a slow float64 reference on the same rank: no site more, and none missing."""
    assert [word["broken"] for word in words] == ["None"] * ranks
    worst = max(words, key=lambda word: word["error"])
    assert worst["error"] <= 1e-5, worst["where"]
    record_property("parallel", f"{name}, {ranks} ranks")
    record_property("error", worst["error"])
    record_property("whole", max(furthest(words, words[0]["single"]), default=0.0) if words[0]["single"] else None)


def of_the_whole(parts, step, key="norms"):
    """The norm of a gradient over all ranks: the squares of each part once. None where none came, NaN where none can follow."""
    squares = {}
    for part in parts:
        index, of, addend = part["shard"] or (0, 1, False)
        if addend:
            return math.nan
        if math.isnan(part["elements"][step]):  # no gradient came on this rank
            continue
        norm = part[key][step] if part["elements"][step] else 0.0  # of nothing there is no norm
        assert squares.setdefault(index, norm**2) == pytest.approx(norm**2, rel=2e-6), "copies are the same"
    assert not squares or len(squares) == of, "every part is there"
    return math.sqrt(sum(squares.values())) if squares else None


def norms(words, single, key="norms"):
    """For each gradient and step, the norm of the whole and what it is in one process; not those that are sums to be made."""
    for step, expected in enumerate(single):
        for site in {site for word in words for site in word["recorded"]}:
            whole = of_the_whole([word["recorded"][site] for word in words if site in word["recorded"]], step, key)
            if whole is None or not math.isnan(whole):
                yield whole, expected.get(site), site


def furthest(words, single, key="norms"):
    found = [(whole, expected) for whole, expected, _ in norms(words, single, key) if whole is not None]
    return [abs(whole - expected) / max(expected, 1e-30) for whole, expected in found]


def skip_what_torch_gets_wrong(words):
    if torch.__version__ < "2.9" and max(furthest(words, words[0]["single"], "bare")) > 1e-5:
        pytest.skip(f"torch {torch.__version__} itself, as FSDP2 over gloo: it adds gradients up, for their mean")


@each_way
def test_the_parts_make_the_whole(words, name, ranks):
    """Put together, gradients have the norm that one process finds which trains on the data of all ranks."""
    if words[0]["single"] is None:
        assert not WAYS[name].exact, "in half precision one process rounds otherwise"
        return
    skip_what_torch_gets_wrong(words)
    compared = list(norms(words, words[0]["single"]))
    assert len(compared) > 20
    assert not [site for whole, expected, site in compared if (whole is None) != (expected is None)]
    assert max(furthest(words, words[0]["single"])) <= 1e-5


@pytest.mark.parametrize(("name", "ranks"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4), ("tp, fsdp", 4)])
def test_a_norm_off_by_the_number_of_ranks_would_be_found(words, name, ranks):
    """Neither the mean nor the sum over ranks passes, and no copy counts twice."""
    skip_what_torch_gets_wrong(words)
    single = words[0]["single"][0]
    for site, expected in single.items():
        parts = [word["recorded"][site] for word in words]
        whole = of_the_whole(parts, 0)
        for factor in (1 / ranks, 1 / math.sqrt(ranks), math.sqrt(ranks), ranks):
            assert whole * factor != pytest.approx(expected, rel=0.1)
        everybody = math.sqrt(sum(part["norms"][0] ** 2 for part in parts if part["elements"][0]))
        copies = ranks / (parts[0]["shard"] or (0, 1))[1]
        assert everybody == pytest.approx(expected * math.sqrt(copies), rel=1e-5)


def test_shards_are_uneven_and_some_are_empty(seen):
    """What these tests are to cover is there."""
    sizes = {tuple(int(word["recorded"]["blocks.0.up bias.grad"]["elements"][0]) for word in seen[0]["fsdp", 4])}
    assert sizes == {(2, 2, 1, 0)}
    addend = seen[0]["sequence parallel, blocks", 2][0]["recorded"]["blocks.0.norm weight.grad"]["shard"]
    assert addend == [0, 1, True], "a sum that nobody has made is called one"


class Sum(nn.Linear):
    """A layer that gives a sum over ranks on which nobody has waited yet."""

    def forward(self, x):
        return all_reduce(super().forward(x), "sum", torch.distributed.group.WORLD)


@pytest.fixture
def alone():
    """A group of one rank, in this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_sum_on_its_way_is_waited_for(alone):
    """Not skipped: an output that an unfinished collective is to fill; nor such a gradient."""
    layer = nobs.instrument(Sum(4, 3))
    ring = nobs.RingBuffer(layer)
    x = torch.randn(5, 4)
    with torch.no_grad():
        output = layer(x)
    assert isinstance(output, AsyncCollectiveTensor)
    layer.weight.grad = AsyncCollectiveTensor(torch.full((3, 4), 2.0))
    assert torch.equal(local(layer.weight.grad), torch.full((3, 4), 2.0))
    ring.add(0, 0.0)
    (row,) = ring.drain()
    expected = nn.functional.linear(x, layer.weight, layer.bias).detach()
    assert row["(model)", "output", "norm"] == pytest.approx(float(expected.norm()))


@each_way
def test_nobody_is_in_the_way(words, name, ranks):
    """Losses and parameters, collectives, graphs and breaks, names of the state, and what wrappers hold, are as without."""
    for word in words:
        assert word["apart"] <= (SHIFTED if WAYS[name].backend else 0.0)
        assert word["collectives"][0] == word["collectives"][1] > 0
        assert word["graphs"][0] == word["graphs"][1]
        assert bool(word["graphs"][0][0]) == bool(WAYS[name].backend)
        assert word["held"][0] == word["held"][1]
        assert word.get("checkpoint", {"names": True, "same": True}) == {"names": True, "same": True}
    assert ("checkpoint" in words[0]) == WAYS[name].saved
