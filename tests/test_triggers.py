"""Each trigger on made rows: what fires, what does not, and that nothing poisons or disarms it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_rows import SITES, judge, row

import nobs
from nobs._columns import KINDS
from nobs._history import Row
from nobs._schema import Failure
from nobs._table import Tap, TapTable
from nobs.errors import BadSetting
from nobs.triggers import (
    DEFAULT,
    ActivationGrowth,
    GradientNorm,
    GradientZScore,
    LossCusum,
    LossSpike,
    NonFinite,
    TriggerEngine,
)

uniform = np.random.default_rng(1).random(3000)
noise = np.random.default_rng(0).normal(size=5000)
HEALTHY = {
    "heavy tails": np.exp(0.8 * noise[:2000]),
    "a cold start": np.r_[1e6, 2.3 + 0.1 * noise[:500]],
    "decaying": 2.3 * np.exp(-np.arange(400) / 100) + 0.05 * np.abs(noise[:400]),
    "noisy": 1 + 0.3 * noise[:2000],
    "near zero": 0.01 * np.abs(noise[:2000]),
    "negative": -1000 + noise[:2000],
    "crossing zero": np.linspace(5, -5, 1000) + 0.1 * noise[:1000],
    "plateau": np.full(1000, 2.3),
    "always zero": np.zeros(100),
    "zero and then some": np.r_[np.zeros(50), 0.5, np.zeros(50)],
    "slow rise by half": np.linspace(2, 3, 2000) + 0.05 * noise[:2000],
    "mostly zero": np.where(uniform < np.maximum(np.exp(-np.arange(3000) / 150), 0.003), np.abs(noise[:3000]), 0)[:1500],
    "two in a desert": np.r_[np.zeros(50), 0.5, np.zeros(5), 0.5],
    "zero in the end": 2 * np.exp(-np.arange(3000) / 100) * np.exp(0.5 * noise[:3000]) + 1e-4 * np.exp(2 * noise[2000:5000]),
    "restarts": np.r_[
        np.geomspace(2.3, 0.02, 160), np.tile(np.r_[np.linspace(0.02, 0.3, 40), np.geomspace(0.3, 0.02, 260)], 5)[:1300]
    ]
    * np.exp(0.2 * noise[:1460]),
    "equal, then noisy": np.r_[np.full(10, -2.0), -2 + 0.1 * noise[:500]],
    "adversarial": -0.3 * np.minimum(1, np.arange(2000) / 200) + 0.1 * np.sin(np.arange(2000) / 150) + 0.01 * noise[:2000],
    "a slow period below zero": -20 + 0.3 * np.sin(np.arange(3000) / 200) + 0.05 * noise[:3000],
    "wandering": np.convolve(noise, 0.97 ** np.arange(200), "valid")[:3000],
    "falling by a thousand": np.geomspace(10, 0.01, 500) * (1 + 0.1 * noise[:500]),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_loss_spike_leaves_healthy_losses_alone(name):
    """No alarm on losses that are noisy, negative, zero, or falling."""
    assert judge(LossSpike(), HEALTHY[name]) == []


@pytest.mark.parametrize(
    ("losses", "first"),
    [
        ([1.0] * 30 + [3.5], 30),
        ([1.0, 1.1, 0.9] * 10 + [4.0], 30),
        ([-1000.0, -1001, -999] * 20 + [-900.0], 60),
        ([0.0, 0.01, 0.02] * 20 + [1.0], 60),
        ([1.0] * 30 + [1e30], 30),
        ([1e4, *np.geomspace(1e4, 1, 200), *[1.0] * 500, 50.0], 701),
        ([2.3, 1e6, *[2.3] * 200, 500.0], 202),
        ([*(7 * np.exp(-np.arange(500) / 60) * np.exp(0.2 * noise[:500]) + 0.02), 2.3], 500),
    ],
)
def test_loss_spike_fires(losses, first):
    """On a spike over a positive, a negative, and a near-zero loss."""
    assert judge(LossSpike(), losses) == [first]


@pytest.mark.parametrize("steps", [100, 300, 1000, 3000])
def test_a_slow_climb_from_2_to_20(steps):
    """No step of it is a spike over a moving average that climbs along; the lowest average remembers."""
    climb = np.r_[np.full(50, 2.0), np.linspace(2, 20, steps)] + 0.05 * noise[: steps + 50]
    fired = judge(LossSpike(), climb)
    assert fired
    assert climb[fired[0]] < 12


@pytest.mark.parametrize("outlier", [0.0, 2.0])
def test_back_to_chance(outlier):
    """A run that loses all it had won and stays there has failed, although its loss is nowhere above where it began."""
    losses = np.r_[0.4 + 1.9 * np.exp(-np.arange(300) / 60), np.linspace(0.4, 2.3, 60), np.full(100, 2.3)]
    losses[80] += outlier  # one that is no spike yet, and after which single losses seem to scatter as far
    fired = judge(LossSpike(), losses + 0.05 * noise[:460])
    assert fired
    assert 330 < fired[0] < 420


@pytest.mark.parametrize("growth", [1.01, 1.02, 1.05, 1.1, 1.3, 1.5, 2.0, 3.0, 10.0])
@pytest.mark.parametrize("healthy", [0, 300])
def test_a_loss_that_grows_by_the_same_factor_each_step(growth, healthy):
    """A divergence sets no scale for itself: it fires before the loss is a thousand times what it was."""
    steps = np.arange(min(700, int(60 / np.log10(growth) / 2)))
    losses = np.r_[0.5 + 1.8 * np.exp(-np.arange(healthy) / 60), 0.5 * growth**steps] if healthy else 2.3 * growth**steps
    losses *= np.exp(0.05 * noise[: len(losses)])
    fired = judge(LossSpike(), losses)
    assert fired
    assert losses[fired[0]] < 1000 or fired[0] < healthy + 16


def test_a_negative_loss_that_climbs_and_stays():
    """All that was won is lost within fifty steps: it fires while it climbs."""
    losses = np.r_[5 * np.exp(-np.arange(300) / 40) - 3, np.linspace(-3, 7, 50), np.full(500, 7.0)] + 0.1 * noise[:850]
    assert 300 < judge(LossSpike(), losses)[0] < 350
    assert 300 < judge(LossSpike(), np.r_[np.full(300, -3.0) + 0.1 * noise[:300], losses[300:]])[0] < 350


@pytest.mark.parametrize(("top", "level", "steps"), [(100, 1, 2), (20, 1, 3), (2.3, 0.1, 3)])
def test_a_steep_start_hides_no_later_spike(top, level, steps):
    """A descent in the first steps is no scatter."""
    losses = (top * np.exp(-np.arange(300) / steps) + level) * np.exp(0.05 * noise[:300])
    assert judge(LossSpike(), [*losses, 10 * level]) == [300]


def test_a_climb_that_comes_down_again():
    """The average follows a climb, and so the alarm ends with it."""
    losses = np.r_[np.full(50, 1.0), np.linspace(1, 5, 100), np.full(2000, 1.3)] + 0.03 * noise[:2150]
    fired = judge(LossSpike(), losses)
    assert fired
    assert max(fired) < 150


def test_the_spike_does_not_enter_the_average():
    """A second spike right behind the first is judged against the same average."""
    losses = [1.0] * 30 + [10.0] * 50
    assert judge(LossSpike(), losses) == list(range(30, 80))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nothing_disarms_loss_spike(poison):
    """NaN before, in and after the warm-up: the spike behind it is still found, and only the spike."""
    assert judge(LossSpike(), [poison, 1.0, poison, *[1.0] * 30, poison, 1.0, 10.0, 1.0]) == [35]


@given(st.lists(st.floats(width=32), max_size=60))
def test_triggers_are_never_poisoned(prefix):
    """GIVEN any floats as losses and norms, THEN each default trigger keeps a finite state and still finds a NaN."""
    states = [None] * len(DEFAULT)
    for step, x in enumerate(prefix):
        r = row(step, x, layer1_weight_grad={"norm": x, "absmax": x})
        for i, trigger in enumerate(DEFAULT):
            states[i], _ = trigger.update(states[i], r)
    known = dict(zip((type(trigger) for trigger in DEFAULT), states, strict=True))
    if known[LossSpike] is not None:
        assert all(math.isfinite(v) for v in (known[LossSpike].first or (*known[LossSpike][:7], *known[LossSpike].recent)))
    if known[LossCusum] is not None:
        assert all(math.isfinite(v) for v in (known[LossCusum].first or known[LossCusum][:8]))
    for trigger, arrays in (
        (GradientNorm, ("log",)),
        (GradientZScore, ("level", "spread")),
        (ActivationGrowth, ("level", "spread")),
    ):
        assert all(np.isfinite(known[trigger][name]).all() for name in arrays if known[trigger] is not None)
    engine = TriggerEngine.only(DEFAULT)
    engine.states[:] = states
    assert engine.check(row(99, math.nan)).trigger == "NonFinite"


def test_gradient_norm_names_the_layer():
    """Alone, a threshold; it names the largest."""
    _, failure = GradientNorm(100).update(None, row(7, layer1_weight_grad={"norm": 150}, layer0_weight_grad={"norm": 120}))
    assert (failure.layer, failure.site, failure.step, failure.value) == ("layer1", "weight.grad", 7, 150)
    assert "gradient norm 150 of layer1.weight at step 7 (1 more above)" in failure.message
    assert GradientNorm(100).update(None, row(layer1_weight_grad={"norm": 99}))[1] is None


def test_gradient_norm_with_a_baseline():
    """Healthy runs with large sums live; the layer furthest above its own baseline is named, not the largest."""
    trigger, state = GradientNorm(100, factor=10), None
    for step in range(50):
        state, failure = trigger.update(state, row(step, layer0_weight_grad={"norm": 5000 + step}))
        assert failure is None
    for step in (50, 51):  # the failing norm is not learned: the second is judged like the first
        state, failure = trigger.update(state, row(step, layer0_weight_grad={"norm": 6e4}, layer1_weight_grad={"norm": 900}))
        assert failure.layer == "layer1"
        assert "900 times its baseline" in failure.message


def test_a_gradient_that_climbs_along_with_its_baseline():
    """No step is ten times the baseline of the steps before; the lowest baseline remembers."""
    trigger, state, fired = GradientNorm(100, factor=10), None, []
    for step in range(200):
        state, failure = trigger.update(state, row(step, layer0_weight_grad={"norm": 1.1**step}))
        fired += [step] if failure else []
    assert 70 < fired[0] < 110
    assert fired == list(range(fired[0], 200))


def test_gradients_that_grow_from_zero_are_healthy():
    """The A of a LoRA, whose B is zero: its gradient grows by a million, but not at once; nothing fires."""
    trigger, state = GradientNorm(100, factor=10), None
    for step, norm in enumerate(np.geomspace(1e-3, 1e3, 1000)):
        state, failure = trigger.update(state, row(step, layer0_weight_grad={"norm": norm}))
        assert failure is None, failure


def test_partly_non_finite_gradients_are_no_baseline():
    """While a GradScaler finds its scale, the finite rest of a gradient is small; the first whole one is no jump."""
    trigger, state = GradientNorm(100, factor=10), None
    for step, norm in enumerate((0, 0, 7, 6, 6, 7)):
        state, _ = trigger.update(state, row(step, layer0_weight_grad={"norm": norm, "posinf": 9}))
    assert trigger.update(state, row(6, layer0_weight_grad={"norm": 1170}))[1] is None


def test_gradient_norm_survives_nan_and_inf():
    """A NaN norm (nothing finite) is NonFinite's; an infinite one is above any threshold; neither is learned."""
    trigger, state = GradientNorm(100, factor=10), None
    for step in range(10):
        state, failure = trigger.update(state, row(step, layer0_weight_grad={"norm": 0, "nan": 10}))
        assert failure is None
    state, failure = trigger.update(state, row(10, layer1_weight_grad={"norm": math.inf}))
    assert failure.layer == "layer1"


def test_non_finite_loss_first_then_the_first_site():
    """The loss; then parameters, outputs forward, gradients backward, in execution order and not in table order."""
    bad = {"nan": 3, "norm": 0.5}
    both = row(5, math.nan, layer0_output=bad)
    assert NonFinite().update(None, both)[1].message == "loss is NaN at step 5"
    cases = [
        ({"layer2_output": bad, "layer1_output": bad, "layer0_output_grad": bad}, ("layer1", "output")),
        ({"layer0_output_grad": bad, "layer1_output_grad": bad, "layer1_weight_grad": bad}, ("layer1", "output.grad")),
        ({"layer2_weight": bad, "layer0_output": bad}, ("layer2", "weight")),
        ({"layer0_weight_grad": bad}, ("layer0", "weight.grad")),
    ]
    for changes, expected in cases:
        failure = NonFinite().update(None, row(5, 1.0, **changes))[1]
        assert (failure.layer, failure.site) == expected
        assert "3 of 10 values NaN in layer" in failure.message


def test_masked_minus_inf_is_legal_in_outputs_only():
    """Attention masks are -Inf; in a weight or a gradient it is a failure, and +Inf is one everywhere."""
    assert NonFinite().update(None, row(layer1_output={"neginf": 5}))[1] is None
    assert NonFinite().update(None, row(layer1_output={"neginf": 5, "nan": 1}))[1].value == 1
    for key in ("layer1_output_grad", "layer1_weight", "layer1_weight_grad"):
        assert "Inf" in NonFinite().update(None, row(**{key: {"neginf": 5}}))[1].message
    assert NonFinite().update(None, row(layer1_output={"posinf": 5}))[1] is not None


def test_a_grad_scaler_may_overflow_for_a_while():
    """With a loss scale, non-finite gradients are expected; a non-finite output never is; nor 21 steps of it."""
    trigger, state, fired = NonFinite(), None, []
    for step in range(25):
        state, failure = trigger.update(state, row(step, scalars={"loss_scale": 65536.0}, layer0_weight_grad={"posinf": 4}))
        fired += [step] if failure else []
    assert fired == [20, 21, 22, 23, 24]
    assert trigger.update(None, row(scalars={"loss_scale": 2.0}, layer0_output={"nan": 1}))[1] is not None
    state, _ = trigger.update(state, row(scalars={"loss_scale": 2.0}))
    assert state["overflows"] == 0


def test_a_grad_scaler_and_every():
    """Steps without taps between neither count nor reset the count."""
    trigger, state, fired = NonFinite(), None, []
    unsampled = {
        f"{layer}_{site}": {"first": math.inf}
        for layer in ("layer0", "layer1", "layer2")
        for site in ("output", "output_grad", "weight", "weight_grad")
    }
    for step in range(50):
        changes = unsampled if step % 2 else {"layer0_weight_grad": {"nan": 4}}
        state, failure = trigger.update(state, row(step, scalars={"loss_scale": 2.0}, **changes))
        fired += [step] if failure else []
    assert fired == [40, 42, 44, 46, 48]


def test_a_layer_that_ran_only_inside_its_parent():
    """MultiheadAttention's out_proj is never called: its gradient stands where its parent stands, not first."""
    table = TapTable(
        tuple(Tap(name, "Linear", site, kind) for name in ("a", "a.out", "head") for site, kind in zip(SITES, KINDS, strict=True))
    )
    values = np.tile(np.float32([1, 0.5, 0, 0, 0, 0, 10, 1]), (len(table), 1))
    values[4:6, -1] = np.inf
    values[8:10, -1] = 2
    for line in (7, 11):
        values[line, 2] = 3
    failure = NonFinite().update(None, Row(0, 0.0, {"loss": 1.0}, table, values))[1]
    assert (failure.layer, failure.site) == ("head", "weight.grad")


def test_a_frozen_mask_may_be_minus_inf():
    """A parameter without a gradient may hold -Inf; a trained one may not."""
    frozen = {"layer1_weight": {"neginf": 5}, "layer1_weight_grad": {"first": math.inf}}
    assert NonFinite().update(None, row(**frozen))[1] is None
    assert NonFinite().update(None, row(layer1_weight={"neginf": 5}))[1] is not None


def test_the_engine_takes_a_users_trigger():
    """Any object with `update`; every trigger learns from every row, the first failure is given back."""

    class Even:
        def update(self, state, row):
            state = (state or 0) + 1
            return state, Failure("Even", row.step, "even") if row.step % 2 == 0 else None

    engine = nobs.TriggerEngine(grad_threshold=10, spike_factor=2, triggers=[Even()])
    assert [engine.check(row(step)) and engine.check(row(step)).trigger for step in (1, 2, 3)] == [None, "Even", None]
    assert engine.check(row(4, math.nan)).trigger == "NonFinite"
    assert engine.states[-1] == 5


@pytest.mark.parametrize("value", [math.nan, 0, -1, math.inf, "3", None, True, 10**400])
def test_thresholds_that_make_no_sense(value):
    """NaN, zero, negative: refused at set-up, with an example."""
    for call in (
        lambda: nobs.TriggerEngine(grad_threshold=value),
        lambda: nobs.TriggerEngine(spike_factor=value),
        lambda: LossSpike(warmup=value),
        lambda: NonFinite(patience=value),
    ):
        with pytest.raises(BadSetting, match=r"a positive finite number[\s\S]*type:"):
            call()
    for wrong, says in ((3, "an object with update"), (LossSpike, r"an instance of it[\s\S]*triggers=\[LossSpike\(\)\]")):
        with pytest.raises(BadSetting, match=says):
            nobs.TriggerEngine(triggers=[wrong])
    with pytest.raises(BadSetting, match="a list of triggers"):
        nobs.TriggerEngine(triggers=None)
    assert LossSpike(np.float32(3)).factor == 3
    with pytest.raises(BadSetting, match="a whole number of steps"):
        LossSpike(window=2.5)


def test_settings_are_frozen():
    """A trigger is settings; its state is elsewhere."""
    with pytest.raises(AttributeError):
        LossSpike().factor = 2


@pytest.mark.parametrize("answer", [None, Failure("x", 0, "y"), (0, "text"), (0,)])
def test_a_trigger_with_the_wrong_answer(answer):
    """What came back and what should have, with the trigger's name."""

    class Mine:
        def update(self, state, row):
            return answer

    with pytest.raises(BadSetting, match=r"Mine.update\(state, row\)[\s\S]*a pair \(state, nobs.Failure or None\)"):
        nobs.TriggerEngine(triggers=[Mine()]).check(row())
