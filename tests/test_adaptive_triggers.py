"""The adaptive triggers on made rows: what each finds, what it leaves alone, that a NaN or a spike disarms none."""

import math

import numpy as np
import pytest
from made_rows import TABLE, judge, row
from torch import nn

import nobs
from nobs._columns import DTYPES, PARAMETER_GRAD
from nobs.errors import BadSetting
from nobs.triggers import (
    DEFAULT,
    SEVERAL,
    ActivationGrowth,
    DeadLayer,
    GradientZScore,
    InputShift,
    LossCusum,
    OverflowHeadroom,
    WeightJump,
)

noise = np.random.default_rng(0).normal(size=5000)
HALF = 1 + DTYPES.index("float16") / 16
TRAINED = {f"layer{i}_weight": {"first": 2 + 1 / 16} for i in range(3)}


def fired(trigger, rows):
    """(step, failure) of each row at which a trigger fires."""
    state, found = None, []
    for r in rows:
        state, failure = trigger.update(state, r)
        if failure:
            found.append((r.step, failure))
    return found


def series(site, sizes, column="norm", layer="layer1", **more):
    """Rows in which one number of one site goes through a series."""
    return [row(step, **{f"{layer}_{site}": {column: size, **more}}) for step, size in enumerate(sizes)]


def jitter(count, scale=0.1):
    return np.exp(scale * noise[:count])


def test_a_tiny_gradient_that_jumps():
    """From 1e-6 to 1e-3: far below any threshold, and a thousand times what is usual for that layer."""
    norms = np.r_[1e-6 * jitter(50), 1e-3, 1e-6 * jitter(5)]
    [(step, failure)] = fired(GradientZScore(), series("weight_grad", norms))
    assert (step, failure.layer, failure.site) == (50, "layer1", "weight.grad")
    assert "962 times its usual size" in failure.message


def test_gradients_with_heavy_tails_are_healthy():
    """What a layer has shown before is no failure: hard samples of a converged run, a start with large gradients."""
    spiky = 1e-4 * jitter(400, 0.5)
    spiky[::40] *= 300
    assert fired(GradientZScore(), series("weight_grad", np.r_[np.geomspace(1, 1e-4, 60), spiky])) == []


def test_a_jump_of_gradients_is_not_learned():
    """The second is judged like the first."""
    norms = np.r_[np.ones(40), [1e4] * 5]
    assert [step for step, _ in fired(GradientZScore(), series("weight_grad", norms))] == [40, 41, 42, 43, 44]


def test_an_output_that_jumps_in_one_step():
    """Thirty times its usual size."""
    [(step, failure)] = fired(ActivationGrowth(), series("output", np.r_[jitter(50), 30.0, jitter(4)]))
    assert (step, failure.layer, failure.site) == (50, "layer1", "output")


def test_an_output_that_grows_beyond_all_others():
    """By a tenth at each step no step is a jump; beyond ten times any layer's record it has grown."""
    found = fired(ActivationGrowth(), series("output", np.r_[np.ones(60), 1.2 ** np.arange(60)]))
    assert found
    assert 72 < found[0][0] < 90


def test_a_branch_that_begins_at_zero_is_healthy():
    """It grows by a million, and never beyond the others; so do logits that learn to be large."""
    assert fired(ActivationGrowth(), series("output", np.r_[np.zeros(5), np.geomspace(1e-6, 1.0, 300)])) == []
    assert fired(ActivationGrowth(), series("output", np.r_[np.geomspace(0.1, 4.0, 60), 4 * jitter(100)])) == []


def test_batches_of_any_size_are_alike():
    """A norm grows with the number of samples; the root mean square does not."""
    rows = [row(s, layer1_output={"norm": math.sqrt(n), "elements": n}) for s, n in enumerate([100] * 40 + [10_000, 1, 100])]
    assert fired(ActivationGrowth(), rows) == []


@pytest.mark.parametrize("after", [50.0, 0.02, 0.0])
def test_a_weight_that_jumps(after):
    """Up, down, to zero; once, as what it jumped to is where it is now."""
    found = fired(WeightJump(), series("weight", np.r_[np.linspace(1, 1.2, 40), [after] * 5]))
    assert found[0][0] == 40
    assert found[0][1].layer == "layer1"
    assert len(found) == 1


def test_weights_that_move_with_their_updates_are_healthy():
    """A bias from zero, one of a single element that comes by zero, a rate that restarts."""
    assert fired(WeightJump(), series("weight", np.r_[0, np.cumsum(np.full(60, 0.01))])) == []
    assert fired(WeightJump(), series("weight", np.abs(np.linspace(0.1, -0.1, 80)))) == []


def test_an_activation_on_its_way_out_of_float16():
    """At a quarter of its largest number, and growing; not one that always runs hot, nor in float32."""
    grows = 1.3 ** np.arange(60)
    [(step, failure), *_] = fired(OverflowHeadroom(), series("output", grows, "absmax", first=HALF))
    assert (step, failure.layer) == (37, "layer1")
    assert "25% of the largest number" in failure.message
    assert fired(OverflowHeadroom(), series("output", np.full(50, 30_000.0), "absmax", first=HALF)) == []
    assert fired(OverflowHeadroom(), series("output", grows, "absmax")) == []


def test_outputs_that_are_zero_from_a_step_on():
    """Five steps of it; not where it has been so before, at random, nor from the start."""
    [(step, failure), *_] = fired(DeadLayer(), series("output", np.r_[np.ones(20), np.zeros(8)]))
    assert (step, failure.layer, failure.site) == (24, "layer1", "output")
    dropped = np.where(np.arange(200) % 7 < 4, 0.0, 1.0)
    assert fired(DeadLayer(), series("output", dropped)) == []
    assert fired(DeadLayer(), series("output", np.zeros(50))) == []


def test_a_layer_that_gets_no_gradient_any_more():
    """Zero, or none at all: ten steps of it. Not a frozen one, one that does not run, or where the loss is zero."""
    rows = [row(s, **TRAINED, layer1_weight_grad={"norm": float(s < 30)}) for s in range(60)]
    assert fired(DeadLayer(), rows)[0][0] == 39
    gone = [row(s, **TRAINED, layer1_weight_grad={"first": math.inf if s >= 30 else 1}) for s in range(60)]
    assert fired(DeadLayer(), gone)[0][1].layer == "layer1"
    frozen = [
        row(s, layer1_weight={"first": 1 if s >= 30 else 2}, layer1_weight_grad={"first": math.inf if s >= 30 else 1})
        for s in range(60)
    ]
    assert fired(DeadLayer(), frozen) == []
    unused = {"layer1_output": {"first": math.inf}, "layer1_weight_grad": {"first": math.inf}}
    assert fired(DeadLayer(), [row(s, **TRAINED, **(unused if s >= 30 else {})) for s in range(60)]) == []
    none = {f"layer{i}_weight_grad": {"norm": 0.0} for i in range(3)}
    assert fired(DeadLayer(), [row(s, 0.0, **TRAINED, **(none if s >= 30 else {})) for s in range(60)]) == []
    assert fired(DeadLayer(), [row(s, 0.7, **TRAINED, **(none if s >= 30 else {})) for s in range(60)])


def test_a_gradient_that_is_nothing_beside_the_others():
    """It vanishes through depth from the first step on."""
    [(step, failure), *_] = fired(DeadLayer(), [row(s, **TRAINED, layer0_weight_grad={"norm": 1e-9}) for s in range(30)])
    assert (step, failure.layer) == (19, "layer0")
    assert fired(DeadLayer(), [row(s, **TRAINED, layer0_weight_grad={"norm": 1e-4}) for s in range(30)]) == []


def test_the_first_layer_sees_another_input():
    """For three steps; a single odd batch is none, nor is another layer the first."""
    shifted = np.r_[jitter(40, 0.02), [4.0] * 6]
    [(step, failure), *_] = fired(InputShift(), series("output", shifted, layer="layer0"))
    assert (step, failure.layer) == (42, "layer0")
    assert fired(InputShift(), series("output", np.r_[jitter(40, 0.02), 4.0, jitter(9)], layer="layer0")) == []
    assert fired(InputShift(), series("output", shifted, layer="layer1")) == []
    flat = series("output", np.r_[np.full(40, 0.5), [0.1] * 6], "absmax", layer="layer0")
    assert fired(InputShift(), flat)[0][1].message.startswith("largest value of the output of layer0")


def test_a_loss_that_goes_back_to_where_it_began():
    """Labels that no longer belong to their images: no spike of three times the average, and all is lost."""
    learned = 0.9 + 1.4 * np.exp(-np.arange(80) / 20)
    losses = np.r_[learned, np.full(30, 2.4)] + 0.05 * noise[:110]
    found = judge(LossCusum(), losses)
    assert found
    assert 80 <= found[0] < 90


@pytest.mark.parametrize(
    "losses",
    [
        np.full(300, 2.3) + 0.1 * noise[:300],
        np.r_[0.3 + 2 * np.exp(-np.arange(100) / 20), 0.8 * np.exp(-np.arange(100) / 30) + 0.4] + 0.03 * noise[:200],
        np.r_[0.3 + 2 * np.exp(-np.arange(150) / 20)] * np.where(np.arange(150) % 25 == 24, 4, 1),
        1.2 + 0.25 * np.sin(np.arange(400) / 40) + 0.05 * noise[:400],
    ],
    ids=["a plateau", "a curriculum", "outliers", "adversaries"],
)
def test_losses_that_rise_in_health(losses):
    """None of them loses all that was won in one go, or for long."""
    assert judge(LossCusum(), losses) == []


ADAPTIVE = [ActivationGrowth(), DeadLayer(), GradientZScore(), InputShift(), LossCusum(), OverflowHeadroom(), WeightJump()]


@pytest.mark.parametrize("trigger", ADAPTIVE, ids=lambda trigger: type(trigger).__name__)
def test_all_are_on_and_their_states_go_into_a_checkpoint(trigger, tmp_path):
    """Frozen, in the default set, and as good behind a checkpoint as before it."""
    assert trigger in DEFAULT
    assert (trigger in SEVERAL) == (type(trigger) is not LossCusum)
    with pytest.raises(AttributeError):
        trigger.window = 3
    model = nobs.instrument(nn.Linear(2, 2))
    recorder = nobs.Recorder(model, triggers=[trigger], directory=tmp_path)
    for step in range(30):
        recorder._engine.check(row(step))
    again = nobs.Recorder(model, triggers=[trigger], directory=tmp_path)
    again.load_state_dict(recorder.state_dict())
    rows = [row(30 + s, **{f"layer{i}_output": {"norm": 50.0, "absmax": 9.0} for i in range(3)}) for s in range(4)]
    assert [recorder._engine.check(r) for r in rows] == [again._engine.check(r) for r in rows]


@pytest.mark.parametrize("trigger", ADAPTIVE, ids=lambda trigger: type(trigger).__name__)
@pytest.mark.parametrize("value", [0, -1, math.nan, "3"])
def test_settings_that_make_no_sense(trigger, value):
    """Refused at set-up, with what to type."""
    name = next(iter(type(trigger).__dataclass_fields__))
    with pytest.raises(BadSetting, match=name):
        type(trigger)(**{name: value})


@pytest.mark.parametrize("bad", [{"nan": 3.0, "norm": math.nan}, {"norm": math.inf, "absmax": math.inf}, {"first": math.inf}])
def test_nothing_disarms_a_gradient_z_score(bad):
    """A NaN, an Inf or a step without a reading: the jump behind it is found."""
    rows = series("weight_grad", np.ones(40))
    rows += [row(40, layer1_weight_grad=bad), row(41, layer1_weight_grad={"norm": 1e4})]
    assert 41 in [step for step, _ in fired(GradientZScore(), rows)]
    assert len(TABLE.of_kind[PARAMETER_GRAD]) == 3
