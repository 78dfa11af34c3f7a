"""One tensor in, one line out: against NumPy in float64, on all paths, for every dtype, shape and value."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twin import reference

from nobs import _stats
from nobs._columns import COLUMNS, DTYPES, read
from nobs._kernels import _cpu

NAMES = ("norm", "absmax", "nan", "posinf", "neginf", "zeros", "elements")


def in_graph(x):
    """The line by the path that compiled graphs and accelerators take."""
    tail = torch.tensor([x.numel() * (2 if x.is_complex() else 1), -1.0])
    x = x.detach()
    return torch.cat([_stats._in_graph(_stats._real(x.resolve_conj())), tail])


def kernel(x):
    """The line by the CPU's kernel, which folds it into a blank one."""
    line = _stats.blank(1, "cpu")[0]
    assert _cpu.fold(x, line, None)
    return line


PATHS = (_stats.measure, in_graph, kernel)


def decoded(line):
    values = _stats.decode(line.numpy())
    return {name: float(read(values, name)) for name in NAMES}


def assert_right(x, rtol=1e-6):
    expected = reference(x)
    for path in PATHS:
        got = decoded(path(x))
        for name in NAMES:
            np.testing.assert_allclose(got[name], expected[name], rtol=rtol, atol=1e-44, err_msg=f"{path.__name__} {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 3, 4, 5), (2, 2, 3, 2, 2), (0,), (3, 0)])
def test_every_dtype_and_shape(dtype, shape):
    """Scalars, empty tensors, images, volumes: the statistics are those of NumPy."""
    assert_right(torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.t(),
        lambda x: x[::2, 1::3],
        lambda x: x.expand(4, *x.shape),
        lambda x: x.reshape(1, 3, 8, 5).contiguous(memory_format=torch.channels_last),
        lambda x: x.relu(),
        lambda x: torch.full_like(x, math.nan),
        lambda x: torch.full_like(x, -math.inf),
        lambda x: torch.zeros_like(x),
        lambda x: x * 1e15,
        lambda x: x * 1e-18,
        lambda x: x * 1e-22,
        lambda x: x * 1e-37,
        lambda x: (x * 1e-37).flatten(),
        lambda x: torch.complex(x, x).conj(),
        lambda x: torch.complex(x, x).conj().imag,
        lambda x: torch.nn.Parameter(x),
    ],
)
def test_layouts_and_extremes(make):
    """Strides, broadcast memory and values from 1e-18 to 1e15 change nothing."""
    assert_right(make(torch.randn(12, 10)))


@given(st.lists(st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0]), min_size=1, max_size=40))
def test_counts_and_absmax_hold_for_any_floats(values):
    """Outside the range of the norm, absmax and the counts stay exact."""
    x = torch.tensor(values, dtype=torch.float32)
    expected = reference(x)
    for path in PATHS:
        got = decoded(path(x))
        for name in ("absmax", "nan", "posinf", "neginf", "elements"):
            assert got[name] == pytest.approx(expected[name], rel=1e-6), (path.__name__, name)
        assert got["zeros"] == pytest.approx(expected["zeros"], rel=1e-5)


@pytest.mark.parametrize("n", [1 << 16, 1_000_003, 10_000_000])
@pytest.mark.parametrize("make", [torch.ones, torch.rand, torch.randn])
def test_long_sums_do_not_drift(n, make):
    """A plain float32 norm is 2e-3 off at ten million equal elements; these stay within 1e-6."""
    assert_right(make(n) * 1.1)
    assert_right(make(8, n // 8) * 1.1)


def test_hundred_million_elements():
    """The promise goes up to 1e8 elements."""
    x = torch.full((100_000_000,), 1.1)
    expected = 1.1 * math.sqrt(1e8)
    assert decoded(_stats.measure(x))["norm"] == pytest.approx(expected, rel=1e-5)
    assert decoded(kernel(x))["norm"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.float8_e4m3fn]
)
def test_the_dtype_travels_with_the_clock(dtype):
    """`first` holds the clock and the dtype's code in sixteenths, on all paths."""
    x = torch.ones(3).to(dtype)
    name = str(dtype).removeprefix("torch.")
    clock = torch.tensor([5.0])
    if dtype is not torch.float8_e4m3fn:
        first = float(_stats.decode(_stats.measure(x, clock).numpy())[-1])
        assert first == 5 + DTYPES.index(name) / 16
        line = _stats.blank(1, "cpu")[0]
        assert _cpu.fold(x, line, torch.tensor([4.0]))
        assert float(_stats.decode(line.numpy())[-1]) == first
    assert _stats._dtype_code(x) == (DTYPES.index(name) if name in DTYPES else 0) / 16


def test_a_default_dtype_of_the_user_changes_nothing():
    """torch.set_default_dtype(bfloat16) must not reach into the sums."""
    x = torch.randn(40, 50)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_right(x)
        assert _stats.blank(2, "cpu").dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


lines = st.lists(st.floats(0, 1e6, width=32), min_size=8, max_size=8).map(lambda v: torch.tensor(v, dtype=torch.float32))


@given(st.lists(lines, min_size=1, max_size=5))
def test_folding_is_idempotent_and_blind_to_order(several):
    """A layer that runs again under checkpointing changes nothing; micro-batches combine in any order."""
    forward, backward = _stats.blank(1, "cpu")[0], _stats.blank(1, "cpu")[0]
    for line in several:
        _stats.fold(forward, line)
    for line in reversed(several + several):
        _stats.fold(backward, line)
    assert torch.equal(forward, backward)


def test_a_blank_line_did_not_run():
    """A tap that did not run is told from one that was zero."""
    blank, zero = _stats.blank(1, "cpu")[0], _stats.blank(1, "cpu")[0]
    _stats.fold(zero, _stats.measure(torch.zeros(4), torch.ones(1)))
    assert math.isnan(decoded(blank)["norm"])
    assert decoded(zero) == {**dict.fromkeys(NAMES, 0.0), "zeros": 1.0, "elements": 4.0}
    assert len(COLUMNS) * blank.element_size() == 32
