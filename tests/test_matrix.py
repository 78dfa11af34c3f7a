"""Every way to train x every model: each number is the twin's, and graphs, losses and parameters are as without nobs.

A covering subset here; all of it with `pytest --matrix`, or `tox run -e matrix`.
"""

import functools
import itertools
import re

import numpy as np
import pytest
import torch
from modes import MODES, run
from twin import furthest
from zoo import TORCHVISION, TRANSFORMERS, ZOO

BOUND = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "": 1e-5}
"""The largest relative error. Inductor measures half-precision values before they are rounded to their 8 or 11 bits."""

LAST_BIT = {"rtol": 1e-6, "atol": 1e-7}
ROUNDS = {
    ("bfloat16", "compiled"): {"rtol": 2.0**-7, "atol": 2.0**-10},
    ("outputs", "compiled, scaler"): LAST_BIT,
    ("root parameter", "compiled"): LAST_BIT,
    ("t5", "compiled"): LAST_BIT,
}
"""The only cells where kernels with taps give other numbers than kernels without, and how far off those may be.

Beside a tap Inductor may round a half value to memory that it else keeps in a register, in full; and where it draws the line
between two kernels otherwise, a product and a sum are no longer rounded once.
"""

EAGER = [name for name, mode in MODES.items() if not mode.compiled]
COMPILED = [name for name, mode in MODES.items() if mode.compiled]
SMALL = [name for name, specimen in ZOO.items() if not specimen.large]
LARGE = [name for name, specimen in ZOO.items() if specimen.large]

KERNELS = ["compiled", "compiled blocks", "compiled, dynamic", "compiled, scaler"]
SAMPLE = [("tokens", mode) for mode in ("compiled", "compiled blocks", "compiled, dynamic", "checkpoint around")]
"""With kernels in the subset as well."""
WITH_KERNELS = {
    *((name, "compiled") for name in [*SMALL, "resnet18"]),
    *itertools.product(["tokens"], COMPILED),
    *itertools.product(["images", "outputs"], KERNELS),
}
"""Compiled to the last, by Inductor, and not only up to its kernels. Those take a minute where all before takes seconds."""
WITH_KERNELS.remove(("complex", "compiled"))  # Inductor stops at the twin's operator there

LEFT_OUT = {*itertools.product(LARGE, ("compiled, two losses", "compiled, two optimizers"))}
"""For time: minutes of compiling for what the small models show, and the large ones in eager."""

UNCOMPILED = {*itertools.product(("lstm", "gru"), ("checkpoint inside", "selective inside"))}
"""Here Dynamo compiles nothing: it does not look into recurrent layers, and a checkpointed part must be one graph."""

DECOMPOSED = "aot_eager_decomp_partition"

_SIDE_EFFECT = "HOP: Unsafe side effect" if torch.__version__ >= "2.9" else "not in the current scope (SideEffects)"
ON_SELF = ("remembering", "old weight_norm", "spectral_norm", "pruned")
"""Models whose forward writes to an attribute of a layer."""

REFUSED = {
    ("bfloat16", "autocast fp16"): "mixed dtype (CPU): expect parameter to have scalar type of Float",
    ("bfloat16", "scaler"): "mixed dtype (CPU): expect parameter to have scalar type of Float",
    ("complex", "scaler"): "not implemented for 'ComplexFloat'",
    ("complex", "compiled, scaler"): "not implemented for 'ComplexFloat'",
    **{(name, mode): _SIDE_EFFECT for name in ON_SELF for mode in ("checkpoint inside", "selective inside")},
}
"""What torch itself refuses, without nobs as well, and its words."""


def covering():
    """Every model in eager, in one more eager mode and in one compiled mode; every mode with some model."""
    yield from SAMPLE  # first, as they take longest
    for i, name in enumerate(SMALL):
        yield name, "eager"
        yield name, EAGER[1 + i % (len(EAGER) - 1)]
        yield name, COMPILED[i % len(COMPILED)]
    yield from ((name, "eager") for name in LARGE)


def everything():
    yield from (cell for cell in itertools.product(ZOO, MODES) if cell not in LEFT_OUT)


def pytest_generate_tests(metafunc):
    if metafunc.function is not test_a_cell:
        return
    cells = everything() if metafunc.config.getoption("--matrix") else covering()
    metafunc.parametrize(("name", "mode"), [cell for cell in dict.fromkeys(cells) if cell not in REFUSED])


@pytest.mark.parametrize(("name", "mode"), REFUSED)
def test_a_cell_that_torch_refuses(name, mode, record_property):
    """GIVEN a combination that is left out, THEN it fails without nobs: the table hides nothing of ours."""
    with pytest.raises(Exception, match=re.escape(REFUSED[name, mode])):
        run(ZOO[name], MODES[mode], observed=False, watched=False, backend=DECOMPOSED if MODES[mode].compiled else "")
    for key, value in {"model": name, "mode": mode, "refused": REFUSED[name, mode]}.items():
        record_property(key, value)


def test_the_subset_makes_kernels():
    """Some cells of the default run are compiled to the last."""
    assert {*SAMPLE} <= {*covering()} & WITH_KERNELS
    assert len({mode for _, mode in SAMPLE}) == 4


def test_per_block_is_per_block():
    """Where a model has blocks, "compiled blocks" compiles more than one, each a part of it."""
    for name in (*TORCHVISION, *TRANSFORMERS, "tokens", "recomputed tokens", "remembering", "lora"):
        with torch.device("meta"):
            model = (ZOO[name].deeper or ZOO[name].make)()
        blocks = [*ZOO[name].blocks(model)]
        assert len(blocks) > 1, name
        assert model not in blocks, name


def test_a_cell(name, mode, request, record_property, tmp_path):
    """GIVEN a model and a way to train it, THEN nobs reads what is there, and changes nothing."""
    specimen, way = ZOO[name], MODES[mode]
    if name == "dataclass" and way.compiled and torch.__version__ < "2.9":
        pytest.skip("Dynamo of torch 2.7 does not trace the twin's way through a dataclass")
    full = request.config.getoption("--matrix")
    kernels = (name, mode) in (WITH_KERNELS if full else SAMPLE)
    backend = "inductor" if kernels else DECOMPOSED if way.compiled else ""

    # Where that is cheap, nobs runs without the twin as well; elsewhere the twin watches both, or, where it is slow, or kernels
    # are made, only the run with nobs. In a recurrent layer it breaks the graph, which is to be compared as it is.
    cheap = not way.compiled or mode == "compiled" or way.every > 1 or not specimen.fullgraph
    alone = (kernels and full) or (cheap and not specimen.large) or (name, mode) == ("resnet18", "compiled")
    both = not (alone or kernels or specimen.large)
    plain = run(specimen, way, observed=False, watched=both, backend=backend)
    watched = run(specimen, way, observed=True, watched=True, backend=backend, directory=tmp_path)
    ours = run(specimen, way, observed=True, backend=backend, directory=tmp_path) if alone else watched

    sampled = way.compiled and way.every > 1 and any(site == "output" for _, site in watched.lines[0])
    assert ours.graphs == (plain.graphs[0] * (1 + sampled), plain.graphs[1]), (plain.graphs, ours.graphs)
    remake = functools.partial(run, specimen, way, observed=False, backend=backend) if kernels else lambda: plain
    for observed in (ours, watched) if alone and not specimen.large else (ours,):
        if kernels and (name, mode) in ROUNDS:
            assert_close(observed, plain, **ROUNDS[name, mode])
        else:
            assert_no_further(observed, plain, remake)
    half = "bfloat16" if "bf16" in mode or name == "bfloat16" else "float16" if "fp16" in mode or way.scaler else ""
    looked = len(watched.lines)
    error, where = max(furthest(row, lines) for row, lines in zip(watched.rows[:looked], watched.lines, strict=True))
    assert looked >= 2
    assert len(ours.rows) == len(way.sizes)
    assert error <= BOUND[half if kernels else ""], where
    assert not way.compiled or plain.graphs[0] > 0 or (name, mode) in UNCOMPILED
    graphs = f"{plain.graphs} -> {ours.graphs}"
    for key, value in {"model": name, "mode": mode, "backend": backend[:9], "error": float(error), "graphs": graphs}.items():
        record_property(key, value)


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
def test_complex_numbers_with_kernels():
    """Compiled to the last, every line is that of eager, which is the twin's."""
    eager, compiled = (run(ZOO["complex"], MODES[mode], observed=True, backend="inductor") for mode in ("eager", "compiled"))
    for ours, theirs in zip(compiled.rows, eager.rows, strict=True):
        np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-5, atol=1e-8)


def everything_of(outcome):
    """Parameters and buffers, and the losses."""
    return outcome.state | {"(losses)": torch.tensor(outcome.losses, dtype=torch.float64)}


def assert_no_further(ours, plain, remake):
    """Where kernels are made anew, nobs moves no number further than making them once more does; elsewhere not one bit."""
    ours, plain = everything_of(ours), everything_of(plain)
    moved = [key for key, theirs in plain.items() if not torch.equal(ours[key], theirs)]
    again = everything_of(remake()) if moved else {}
    for key in moved:
        assert (ours[key] - plain[key]).abs().max() <= (again[key] - plain[key]).abs().max(), key


def assert_close(ours, plain, rtol, atol):
    ours = everything_of(ours)
    for key, theirs in everything_of(plain).items():
        torch.testing.assert_close(ours[key], theirs, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
