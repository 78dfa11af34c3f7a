"""Every way to train x every model: each number is the twin's, and graphs, losses and parameters are as without nobs.

A covering subset here; all of it with `pytest --matrix`, or `tox run -e matrix`.
"""

import itertools
import re

import numpy as np
import pytest
import torch
from modes import MODES, run
from twin import furthest
from zoo import OWN, ZOO

BOUND = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "": 1e-5}
"""The largest relative error. Inductor measures half-precision values before they are rounded to their 8 or 11 bits."""

KERNELS_CLOSE = {"": {"rtol": 1e-6, "atol": 1e-7}, "bfloat16": {"rtol": 2.0**-7, "atol": 2.0**-10}}
"""How far parameters may be off: beside a tap Inductor may round a half value to memory that it else keeps in a register."""

EAGER = [name for name, mode in MODES.items() if not mode.compiled]
COMPILED = [name for name, mode in MODES.items() if mode.compiled]
SMALL = [name for name, specimen in ZOO.items() if not specimen.large]
LARGE = [name for name, specimen in ZOO.items() if specimen.large]

KERNELS = ["compiled", "compiled blocks", "compiled, dynamic", "compiled, scaler"]
WITH_KERNELS = {*itertools.product(OWN, KERNELS), *itertools.product(SMALL, ["compiled"]), ("resnet18", "compiled")}
"""Compiled to the last, by Inductor, and not only up to its kernels. Those take a minute where all before takes seconds."""
WITH_KERNELS.remove(("complex", "compiled"))  # Inductor stops at the twin's operator there

DECOMPOSED = "aot_eager_decomp_partition"

_SIDE_EFFECT = "HOP: Unsafe side effect" if torch.__version__ >= "2.9" else "not in the current scope (SideEffects)"
ON_SELF = ("remembering", "old weight_norm", "spectral_norm", "pruned")
"""Models whose forward writes to an attribute of a layer."""

REFUSED = {
    ("lstm", "autocast fp16"): "could not create a primitive descriptor for the LSTM forward",
    ("lstm", "scaler"): "could not create a primitive descriptor for the LSTM forward",
    ("lstm", "compiled, scaler"): "could not create a primitive descriptor for the LSTM forward",
    ("bfloat16", "autocast fp16"): "mixed dtype (CPU): expect parameter to have scalar type of Float",
    ("bfloat16", "scaler"): "mixed dtype (CPU): expect parameter to have scalar type of Float",
    ("complex", "scaler"): "not implemented for 'ComplexFloat'",
    ("complex", "compiled, scaler"): "not implemented for 'ComplexFloat'",
    **{(name, mode): _SIDE_EFFECT for name in ON_SELF for mode in ("checkpoint inside", "selective inside")},
}
"""What torch itself refuses, without nobs as well, and its words."""


def covering():
    """Every model in eager, in one more eager mode and in one compiled mode; every mode with some model."""
    for i, name in enumerate(SMALL):
        yield name, "eager"
        yield name, EAGER[1 + i % (len(EAGER) - 1)]
        yield name, COMPILED[i % len(COMPILED)]
    yield from ((name, "eager") for name in LARGE)


def everything():
    yield from itertools.product(ZOO, MODES)


def pytest_generate_tests(metafunc):
    if metafunc.function is not test_a_cell:
        return
    cells = everything() if metafunc.config.getoption("--matrix") else covering()
    metafunc.parametrize(("name", "mode"), [cell for cell in dict.fromkeys(cells) if cell not in REFUSED])


@pytest.mark.parametrize(("name", "mode"), REFUSED)
def test_a_cell_that_torch_refuses(name, mode):
    """GIVEN a combination that is left out, THEN it fails without nobs: the table hides nothing of ours."""
    with pytest.raises(Exception, match=re.escape(REFUSED[name, mode])):
        run(ZOO[name], MODES[mode], observed=False, watched=False, backend=DECOMPOSED if MODES[mode].compiled else "")


def test_a_cell(name, mode, request, record_property, tmp_path):
    """GIVEN a model and a way to train it, THEN nobs reads what is there, and changes nothing."""
    specimen, way = ZOO[name], MODES[mode]
    if name == "dataclass" and way.compiled and torch.__version__ < "2.9":
        pytest.skip("Dynamo of torch 2.7 does not trace the twin's way through a dataclass")
    full = request.config.getoption("--matrix")
    kernels = (name, mode) in WITH_KERNELS and (full or (mode == "compiled" and name in OWN))
    backend = "inductor" if kernels else DECOMPOSED if way.compiled else ""

    # Where that is cheap, or kernels are made, nobs runs without the twin as well; elsewhere the twin watches both, or, where
    # it is slow, only the run with nobs.
    alone = kernels or (not specimen.large and (not way.compiled or mode == "compiled" or way.every > 1))
    plain = run(specimen, way, observed=False, watched=not alone and not specimen.large, backend=backend)
    watched = run(specimen, way, observed=True, watched=True, backend=backend, directory=tmp_path)
    ours = run(specimen, way, observed=True, backend=backend, directory=tmp_path) if alone else watched

    sampled = way.compiled and way.every > 1 and any(site == "output" for _, site in watched.lines[0])
    assert ours.graphs == (plain.graphs[0] * (1 + sampled), plain.graphs[1]), (plain.graphs, ours.graphs)
    close = None if not kernels else KERNELS_CLOSE["bfloat16" if name == "bfloat16" else ""]
    assert_same(ours, plain, close)
    if alone and not specimen.large:
        assert_same(watched, plain, close)
    half = "bfloat16" if "bf16" in mode or name == "bfloat16" else "float16" if "fp16" in mode or way.scaler else ""
    looked = len(watched.lines)
    error, where = max(furthest(row, lines) for row, lines in zip(watched.rows[:looked], watched.lines, strict=True))
    assert looked >= 2
    assert len(ours.rows) == len(way.sizes)
    assert error <= BOUND[half if kernels else ""], where
    assert not way.compiled or plain.graphs[0] > 0 or not specimen.fullgraph
    graphs = f"{plain.graphs} -> {ours.graphs}"
    for key, value in {"model": name, "mode": mode, "backend": backend[:9], "error": float(error), "graphs": graphs}.items():
        record_property(key, value)


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
def test_complex_numbers_with_kernels():
    """Compiled to the last, every line is that of eager, which is the twin's."""
    eager, compiled = (run(ZOO["complex"], MODES[mode], observed=True, backend="inductor") for mode in ("eager", "compiled"))
    for ours, theirs in zip(compiled.rows, eager.rows, strict=True):
        np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-5, atol=1e-8)


def assert_same(ours, plain, close):
    """Losses, parameters and buffers: bit for bit, or where kernels were made anew, with taps in them, but for rounding."""
    for key, theirs in plain.state.items():
        if close is None:
            assert torch.equal(ours.state[key], theirs), key
        else:
            torch.testing.assert_close(ours.state[key], theirs, **close)
    assert ours.losses == (plain.losses if close is None else pytest.approx(plain.losses, rel=close["rtol"]))
