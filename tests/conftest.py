"""What all tests share: a clean Dynamo, a path to the examples, and no colours from the developer's terminal."""

import gc
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parent.parent

EXAMPLES = ("torchvision_anyway", "mnist_data")
TESTS = (
    "twin", "nets", "odd", "zoo", "modes", "runs", "samples", "strategies", "made_rows", "boxes", "made_ranks", "disks", "deaths",
)  # fmt: skip
BENCH = ("data", "models", "plant", "table", "runs", "score", "sessions", "oddities", "healthy")
NAMED = (
    *(f"examples/{name}" for name in EXAMPLES),
    *(f"tests/{name}" for name in TESTS),
    *(["tests/parallel_ways"] if torch.distributed.is_available() else []),
    *(f"bench/fault_{name}" for name in BENCH),
)
for name in NAMED:  # each imports those before it
    module = (ROOT / name).with_suffix(".py")  # imported by name; import-mode importlib leaves sys.path alone
    spec = importlib.util.spec_from_file_location(module.stem, module)
    sys.modules[module.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module.stem])

# What decides whether a change lands draws the same examples every time; `--hypothesis-profile=hunt` looks for new ones.
settings.register_profile("nobs", deadline=None, derandomize=True)
settings.register_profile("hunt", deadline=None, max_examples=2000)
settings.load_profile("nobs")


def pytest_addoption(parser):
    parser.addoption("--matrix", action="store_true", help="every mode with every model, some 30 minutes; else a subset of them")
    parser.addoption("--endure", action="store_true", help="every way to die and to damage a file, 10 minutes; else a sample")


def pytest_collection_finish(session):
    """A million objects that stay, and tracers that make as many more: looking through them all is a fifth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_terminal_summary(terminalreporter):
    """The table of mode x model, of whatever ran of it."""
    cells = [dict(report.user_properties) for report in terminalreporter.getreports("passed") if report.user_properties]
    cells = [cell for cell in cells if "mode" in cell]
    if cells:
        terminalreporter.section("mode x model: largest relative error of a statistic, graphs and breaks (without nobs -> with)")
        for cell in sorted(cells, key=lambda cell: (cell["model"], cell["mode"])):
            line = "refused: {refused}" if "refused" in cell else "{backend:10} {error:7.1e}  {graphs}"
            terminalreporter.write_line(("{model:18} {mode:30} " + line).format(**cell))
    survived = [dict(report.user_properties) for report in terminalreporter.getreports("passed") if report.user_properties]
    survived = [line for line in survived if "survived" in line]
    if survived:
        terminalreporter.section("survived: how often, and what was compared bit for bit")
        for line in sorted(survived, key=lambda line: line["survived"]):
            terminalreporter.write_line("{survived:44} {counts}".format(**line))
    spread = [dict(report.user_properties) for report in terminalreporter.getreports("passed") if report.user_properties]
    spread = [line for line in spread if "parallel" in line]
    if spread:
        terminalreporter.section("parallel: largest relative error of a statistic on any rank, and of a norm of the whole")
        for line in sorted(spread, key=lambda line: line["parallel"]):
            whole = "" if line["whole"] is None else f"{line['whole']:7.1e}"
            terminalreporter.write_line(f"{line['parallel']:44} {line['error']:7.1e}  {whole}")


@pytest.fixture(autouse=True)
def _quiet_surroundings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a recorder that is told nothing else writes to ./crashes
    for name in (
        "NO_COLOR",
        "FORCE_COLOR",
        "COLUMNS",
        "NOBS_DISABLE",
        "RANK",
        "WORLD_SIZE",
        "TORCHELASTIC_RUN_ID",
        "SLURM_JOB_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    """No compiled code of another test, and the counters at zero; gives the counters."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.fixture
def model():
    """A small ConvNet with its taps in."""
    from nets import Images

    import nobs

    return nobs.instrument(Images())


@pytest.fixture
def often(request):
    """How often: one number for `--endure`, and another."""
    return lambda endure, sample: endure if request.config.getoption("endure") else sample


@pytest.fixture
def counted(record_property):
    """A line of the table at the end."""

    def note(survived, **counts):
        record_property("survived", survived)
        record_property("counts", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))

    return note
