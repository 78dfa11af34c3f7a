"""Random small models: sequences, branches, shared layers, in-place activations, any dtype; each number is the twin's."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modes import MODES, run
from torch import nn
from twin import furthest
from zoo import Specimen

WIDTH = 6
LEAVES = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH, affine=False),
    "prelu": lambda: nn.PReLU(WIDTH),
    "linear, relu in place": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
    "linear, silu in place": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(inplace=True)),
    "tanh": nn.Tanh,
    "dropout": lambda: nn.Dropout(0.3),
}
plans = st.recursive(
    st.sampled_from([*LEAVES, "shared"]),
    lambda plan: st.tuples(st.sampled_from(["sequence", "branch", "frozen"]), st.lists(plan, min_size=1, max_size=3)),
    max_leaves=6,
)


class Branch(nn.ModuleList):
    """A sum of its parts' outputs and the input, scaled by a parameter of its own; each works on a copy."""

    def __init__(self, parts):
        super().__init__(parts)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x + self.scale * sum(part(x.clone()) for part in self)


def built(plan, shared):
    """The model of a plan; every "shared" in it is one and the same layer."""
    if plan == "shared":
        return shared
    if isinstance(plan, str):
        return LEAVES[plan]()
    kind, parts = plan
    parts = [built(part, shared) for part in parts]
    if kind == "branch":
        return Branch(parts)
    return nn.Sequential(*parts).requires_grad_(kind != "frozen")


@st.composite
def specimens(draw):
    plan = draw(st.lists(plans, min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))

    def make():
        shared = nn.Linear(WIDTH, WIDTH)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), *[built(part, shared) for part in plan]).to(dtype)

    return Specimen(make, lambda n: (torch.randn(n, WIDTH).to(dtype),))


def check(specimen, mode, tmp_path):
    backend = "aot_eager_decomp_partition"
    plain = run(specimen, mode, observed=False, backend=backend)
    watched = run(specimen, mode, observed=True, watched=True, backend=backend, directory=tmp_path)
    assert watched.graphs == plain.graphs
    for key, theirs in plain.state.items():
        assert torch.equal(watched.state[key], theirs), key
    error, where = max(furthest(row, lines) for row, lines in zip(watched.rows, watched.lines, strict=True))
    assert error <= 1e-5, where


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specimen=specimens(), mode=st.sampled_from(["eager", "accumulated", "checkpoint", "two optimizers", "frozen"]))
def test_in_eager(specimen, mode, tmp_path):
    """GIVEN any model, WHEN it trains in eager, THEN nobs reads what the twin reads, and moves not one bit."""
    check(specimen, MODES[mode], tmp_path)


COMPILED = ("compiled", "compiled, forwards first", "checkpoint inside", "checkpoint around")


@pytest.mark.usefixtures("fresh_dynamo")
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specimen=specimens(), mode=st.sampled_from([mode for mode in COMPILED if mode in MODES]))
def test_compiled(specimen, mode, tmp_path):
    """The same in one graph, which stays one."""
    check(specimen, MODES[mode], tmp_path)
