"""Rows that wait and are learned by the block: the same failures at the same rows, and the same states, as row by row."""

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import TABLE, row

from nobs._columns import COLUMNS, DTYPES, KINDS
from nobs._table import Tap, TapTable
from nobs.triggers import DEFAULT, TriggerEngine, blocks
from nobs.triggers.sieve import BLOCK, SETTLED

SITES = [(f"layer{i}", site) for i in range(3) for site in ("output", "output_grad", "weight", "weight_grad")]


class OneByOne:
    """The reference: each trigger is shown each row."""

    def __init__(self):
        self.states = [None] * len(DEFAULT)

    def check(self, shown):
        failures = []
        for i, trigger in enumerate(DEFAULT):
            self.states[i], failure = trigger.update(self.states[i], shown)
            failures.append(failure)
        return next((failure for failure in failures if failure), None)


def healthy(step, rng, scatter=0.05, **changes):
    """A row whose norms scatter around what is usual for each site."""
    sizes = np.exp(scatter * rng.normal(size=len(SITES)))
    usual = {f"{layer}_{site}": {"norm": size, "absmax": size / 2} for (layer, site), size in zip(SITES, sizes, strict=True)}
    for i in range(3):
        usual[f"layer{i}_weight"]["first"] = 2 + 1 / 16
        usual[f"layer{i}_output"]["first"] = 1 + i + DTYPES.index("float16") / 16
    for name, columns in changes.items():
        usual[name] = {**usual[name], **columns}
    return row(step, 1 + 0.05 * rng.normal(), **usual)


def numbers(state):
    """All numbers of a state, in order; what only counts on behind the warm-up of all sites is left out."""
    if isinstance(state, dict):
        return [number for key in sorted(state) if key not in ("alive", "clean") for number in numbers(state[key])]
    if isinstance(state, (tuple, list)):
        return [number for part in state for number in numbers(part)]
    return [] if state is None else np.ravel(state).tolist()


def words(failure):
    """What a failure says but for its numbers."""
    return failure and (failure.trigger, failure.step, failure.message, failure.layer, failure.site)


def figures(failure):
    """And those."""
    return [0.0, 0.0] if failure is None else [failure.value or 0.0, failure.threshold or 0.0]


def alike(states, others):
    for trigger, state, other in zip(DEFAULT, states, others, strict=True):
        assert numbers(state) == pytest.approx(numbers(other), rel=1e-9, abs=1e-12, nan_ok=True), type(trigger).__name__


@settings(max_examples=10)
@given(
    seed=st.integers(0, 10**6),
    scatter=st.sampled_from([0.02, 0.3, 1.0]),
    every=st.integers(1, 3),
    odd=st.sampled_from([0.0, 0.002, 0.02]),
    drift=st.sampled_from([-0.03, 0.0, 0.03]),
    sizes=st.booleans(),
)
def test_the_sieve_changes_nothing(seed, scatter, every, odd, drift, sizes):
    """GIVEN any run, with jumps, zeros, NaN, masks, sites and steps that do not run, sizes that change, THEN what each row says
    is what it says to triggers that are shown each row, and so are the states behind it."""
    rng = np.random.default_rng(seed)
    engine, reference = TriggerEngine.only(DEFAULT), OneByOne()
    for step in range(SETTLED + 4 * BLOCK):
        shown = healthy(step, rng, scatter)
        shown.values[:, :2] *= np.exp(drift * step) if seed % 2 else 1
        if sizes and rng.random() < 0.5:  # batches of several sizes
            shown.values[TABLE.of_kind["output"], 6] = rng.integers(1, 50)
        for line in np.flatnonzero(rng.random(len(TABLE)) < odd):
            column = rng.integers(0, 8)
            shown.values[line, column] = rng.choice([0, 3, 16, 1e4, np.inf if column in (0, 1, 7) else 5])
        if step % every:
            shown.values[:] = 0
            shown.values[:, -1] = np.inf
        failure, expected = engine.check(shown), reference.check(shown)
        assert words(failure) == words(expected)
        assert figures(failure) == pytest.approx(figures(expected), rel=1e-9, nan_ok=True)
    alike(engine.states, reference.states)


def settled(rows=SETTLED + BLOCK + BLOCK // 2):
    """An engine and a reference in the middle of a healthy run, and the numbers that it goes on with."""
    rng, engine, reference = np.random.default_rng(3), TriggerEngine.only(DEFAULT), OneByOne()
    for step in range(rows):
        shown = healthy(step, rng)
        assert engine.check(shown) is None
        assert reference.check(shown) is None
    return engine, reference, rng, rows


@pytest.mark.parametrize(
    ("trigger", "changes"),
    [
        ("NonFinite", {"layer1_output_grad": {"nan": 1}}),
        ("NonFinite", {"layer1_output": {"neginf": 1}}),
        ("WeightJump", {"layer1_weight": {"norm": 0.1}}),
        ("WeightJump", {"layer1_weight": {"norm": 4.0}}),
        ("OverflowHeadroom", {"layer1_output": {"absmax": 3e4}}),
        ("ActivationGrowth", {"layer1_output": {"norm": 30.0}}),
        ("GradientNorm", {"layer1_weight_grad": {"norm": 500.0}}),
        ("GradientZScore", {"layer1_weight_grad": {"norm": 90.0}}),
    ],
)
def test_a_failure_is_found_at_its_row(trigger, changes):
    """Behind rows that wait, in the row that it is in."""
    engine, _, rng, step = settled()
    failure = engine.check(healthy(step, rng, **changes))
    assert (failure.trigger, failure.step, failure.layer) == (trigger, step, "layer1")


@pytest.mark.parametrize(
    ("trigger", "steps", "changes"),
    [("DeadLayer", 5, {"layer1_output": {"norm": 0.0}}), ("InputShift", 3, {"layer0_output": {"absmax": 4.0, "norm": 3.0}})],
)
def test_a_failure_that_takes_some_steps(trigger, steps, changes):
    """Counted from the first row of it on, though rows before it wait."""
    engine, _, rng, step = settled()
    failures = [engine.check(healthy(step + i, rng, **changes)) for i in range(steps)]
    assert failures[:-1] == [None] * (steps - 1)
    assert failures[-1].trigger == trigger


@pytest.mark.parametrize("kind", ["each step", "every second step", "sizes"])
def test_most_rows_wait(kind):
    """Of a healthy run, also where every second step is recorded, or each batch has another size, hardly a row is shown again."""
    engine, rng = TriggerEngine.only(DEFAULT), np.random.default_rng(0)
    for step in range(SETTLED + 4 * BLOCK):
        shown = healthy(step, rng)
        if kind == "every second step" and step % 2:
            shown.values[:] = 0
            shown.values[:, -1] = np.inf
        if kind == "sizes":
            outputs, size = TABLE.of_kind["output"], rng.integers(1, 10_000)
            shown.values[outputs, 6] = size
            shown.values[outputs, 0] *= math.sqrt(size / 10)
        engine.check(shown)
    assert engine._shown < SETTLED + 5


def test_rows_that_nothing_holds():
    """Where each row stands out the sieve is tried less and less often, and what is said stays right."""
    engine, rng, reference = TriggerEngine.only(DEFAULT), np.random.default_rng(0), OneByOne()
    made = []
    new_sieve = engine._new_sieve
    engine._new_sieve = lambda *how: made.append(how) or new_sieve(*how)
    for step in range(SETTLED + 4 * BLOCK):
        shown = healthy(step, rng, layer1_weight_grad={"norm": 10.0 ** (step % 2 * 3)})
        assert words(engine.check(shown)) == words(reference.check(shown))
    assert len(made) < 2 * BLOCK
    alike(engine.states, reference.states)


def test_a_checkpoint_in_the_middle_of_rows_that_wait():
    """Its states are those of triggers that were shown each row, and a run that goes on from it says the same."""
    engine, reference, rng, step = settled()
    again = TriggerEngine.only(DEFAULT)
    again.load_state(copy.deepcopy(engine.state()))
    alike(again.states, reference.states)
    for i in range(2 * BLOCK):
        shown = healthy(step + i, rng, **({"layer1_weight_grad": {"norm": 90.0}} if i == 2 * BLOCK - 1 else {}))
        failures = [one.check(shown) for one in (engine, again, reference)]
        assert words(failures[0]) == words(failures[1]) == words(failures[2])
    assert failures[0] is not None
    alike(again.states, engine.states)


@pytest.mark.parametrize("trigger", DEFAULT, ids=lambda trigger: type(trigger).__name__)
def test_a_state_is_never_changed(trigger):
    """What `update` was given, and what the engine has given away, stays as it was."""
    engine, rng, state = TriggerEngine.only([trigger]), np.random.default_rng(0), None
    for step in range(SETTLED + 2 * BLOCK):
        shown = healthy(step, rng)
        before, kept = copy.deepcopy(state), state
        state, _ = trigger.update(state, shown)
        assert repr(kept) == repr(before)
        engine.check(shown)
        if step in (SETTLED - 1, SETTLED + BLOCK // 2):
            [(_, given_away)] = engine.state()
            copied = copy.deepcopy(given_away)
    assert repr(given_away) == repr(copied)


def test_a_users_trigger_is_shown_each_row():
    """Whatever the others do."""

    class Counts:
        def update(self, state, shown):
            return (state or 0) + 1, None

    engine, rng = TriggerEngine(triggers=[Counts()]), np.random.default_rng(0)
    for step in range(SETTLED + 3):
        engine.check(healthy(step, rng))
    assert engine.states[-1] == SETTLED + 3


def test_another_model_in_the_middle():
    """Rows of another table are judged too, and by nobody's bounds but their own."""
    engine, _, rng, step = settled()
    other = TapTable(tuple(Tap("a", "Linear", site, kind) for site, kind in zip(("output",) * 1, KINDS[:1], strict=True)))
    shown = healthy(step, rng)
    foreign = type(shown)(step, 0.0, {"loss": 1.0}, other, np.array([[1, 1, 3, 0, 0, 0, 4, 1]], dtype=np.float32))
    assert engine.check(foreign).layer == "a"


@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 300), st.integers(1, 5))
def test_blocks_of_averages(rows, window, memory, sites):
    """A moving average, how far readings are above it, and its lowest: as step by step."""
    rng = np.random.default_rng(rows + window)
    readings, level = rng.normal(size=(rows, sites)), rng.normal(size=sites)
    rises = blocks.product(blocks.level_and_rises(rows, window), blocks.behind(level, readings))
    lows = blocks.product(blocks.level_and_lows(rows, window, memory), blocks.behind(level, readings))
    low = low_before = level - 0.1
    for i, reading in enumerate(readings):
        assert rises[1 + i] == pytest.approx(reading - level)
        level = level + (reading - level) / window
        low = np.minimum(low + (level - low) / memory, level)
    lows[-1] += low_before * (1 - 1 / memory) ** rows
    assert rises[0] == pytest.approx(level)
    assert lows[0] == pytest.approx(level)
    assert lows[1:].min(axis=0) == pytest.approx(low)


def test_products_of_many_sites():
    """Part by part: the same."""
    rng = np.random.default_rng(0)
    matrix, rows = rng.normal(size=(5, 11)), rng.normal(size=(11, 5000))
    assert blocks.product(matrix, rows) == pytest.approx(matrix @ rows)


@pytest.mark.parametrize("sizes", [(2,) * 7, (1, 3, 0, 2), (400, *(1,) * 300), ()])
def test_the_largest_of_each_layer(sizes):
    """Layers of any number of parameters, NaN left aside, and one of which there is nothing else."""
    kind = KINDS[3]
    taps = [Tap(f"layer{i}", "X", f"p{j}.grad", kind) for i, size in enumerate(sizes) for j in range(size)]
    table, values = TapTable(tuple(taps)), np.random.default_rng(0).normal(size=len(taps))
    values[::3] = np.nan
    expected = [np.fmax.reduce(values[[i for i, t in enumerate(taps) if t.layer == name]]) for name in table.of_layer]
    assert np.array_equal(table.largest_of_layers(values), expected, equal_nan=True)


def test_readings_are_what_a_row_says():
    """Bit for bit what `Row.kind` gives, whatever ran and whatever is NaN."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        shown = healthy(0, rng)
        for line in np.flatnonzero(rng.random(len(TABLE)) < 0.3):
            shown.values[line, rng.integers(0, len(COLUMNS))] = rng.choice([0, 1, np.nan, np.inf])
        read = shown.readings
        whole = np.where(shown.kind("parameter.grad", "nonfinite") > 0, np.nan, shown.kind("parameter.grad", "norm"))
        for mine, theirs in (
            (read.outputs, shown.kind("output", "norm")),
            (read.parameters, shown.kind("parameter", "norm")),
            (read.gradients, shown.kind("parameter.grad", "norm")),
            (read.whole_gradients, whole),
            (read.output_rms, shown.kind("output", "rms")),
            (read.gradient_rms, shown.kind("parameter.grad", "rms")),
            (read.output_peaks, shown.kind("output", "absmax")),
        ):
            assert np.array_equal(mine, theirs, equal_nan=True)
        assert read.clean == (not shown.values[:, 2:5].any())
