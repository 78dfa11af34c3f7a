"""`nobs diff`: where two runs part, where they come apart, and what is said of it."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_rows import TABLE, row
from nets import Images, loss_of
from rich.cells import cell_len
from samples import story_report
from strategies import histories, reports

import nobs
from nobs import _codec, cli
from nobs._difference import Pair, Reading, Span, compare
from nobs._history import History
from nobs._schema import Report
from nobs._table import Tap, TapTable
from nobs.errors import BadSetting
from nobs.render._courses import MOST_LAYERS, that_matter
from nobs.render.difference import both, print_difference, sentences

BEGIN, STEPS = 12, 24


def train(folder, seed=0, spoil=None):
    """A run of STEPS steps; `spoil(model, step)` before each. Gives where its files are."""
    torch.manual_seed(seed)
    model = nobs.instrument(Images())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    try:
        with nobs.Recorder(model, optimizer=optimizer, directory=folder) as recorder:
            for step in range(STEPS):
                if spoil:
                    spoil(model, step)
                loss = loss_of(model, model.batch(16))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                recorder.step(loss)
    except nobs.TrainingFailure:
        pass
    return folder


def heavier(model, step):
    """One weight is off by a tenth from a step on."""
    if step == BEGIN:
        model.conv2.weight.data *= 1.1


def wrong_gradient(model, step):
    """The gradient of one weight is off by a tenth from a step on."""
    if step == BEGIN:
        model.conv2.weight.register_hook(lambda gradient: gradient * 1.1)


def growing(model, step):
    """A weight that grows and grows."""
    if step >= BEGIN:
        model.conv2.weight.data *= 1.5


def nan(model, step):
    """A NaN in a weight."""
    if step == BEGIN:
        model.conv2.weight.data[0, 0, 0, 0] = float("nan")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs, made once: of the same seed with a fault each, and a healthy one of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    spoilers = {"healthy": None, "heavier": heavier, "wrong_gradient": wrong_gradient, "growing": growing, "nan": nan}
    made = {name: train(folder / name, spoil=spoil) for name, spoil in spoilers.items()}
    return {**made, "other": train(folder / "other", seed=1)}


def difference_of(a, b, **options):
    return compare(nobs.load(a).history, nobs.load(b).history, **options)


@pytest.mark.parametrize(
    ("fault", "site"), [("heavier", "weight"), ("wrong_gradient", "weight.grad"), ("growing", "weight"), ("nan", "weight")]
)
def test_the_same_seed(fault, site, runs):
    """GIVEN two runs of one seed, one with a fault, THEN its layer, site and step are the first to part, and nothing before."""
    found = difference_of(runs[fault], runs["healthy"])
    at, layer = found.parting[0]
    assert (layer.name, at.site, at.step) == ("conv2", site, BEGIN)
    assert not found.only_in_a
    assert not found.only_in_b
    loss, lr = found.scalars
    assert loss.parts is None or loss.parts.step >= BEGIN
    assert lr.parts is None


def test_the_same_run_twice(runs, tmp_path):
    """A seed twice: bit for bit the same."""
    again = train(tmp_path / "again")
    found = difference_of(again, runs["healthy"], tolerance=0.0)
    assert (found.parting, found.leaving) == ((), ())
    assert sentences(found) == [f"no difference beyond 0 in {STEPS} common steps"]
    assert [layer.name for layer in found.layers] == ["conv1", "bn", "conv2", "fc"]
    assert found.common == found.measured == Span(0, STEPS - 1, STEPS)


@pytest.mark.parametrize(("fault", "by"), [("growing", BEGIN + 3), ("nan", BEGIN)])
def test_another_seed(fault, by, runs):
    """GIVEN a healthy run of another seed, THEN all parts at once, and the first layer to come apart is the faulty one."""
    found = difference_of(runs[fault], runs["other"])
    assert {at.step for at, _ in found.parting} == {0}
    at, layer = found.leaving[0]
    assert layer.name == "conv2"
    assert BEGIN <= at.step <= by
    assert not layer.always


def test_the_page_of_a_crash(runs, capsys, monkeypatch):
    """Which run is which and how each ended, what parts and comes apart first, that layer marked, and the loss."""
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["diff", str(runs["nan"]), str(runs["other"])]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    text = on_one_line(out)
    assert re.match(r" A \S*nan/\S+rank00000\.json loss is NaN at step 12", text)
    answers = [
        "loss is NaN at step 12", " B ", "other", "the run ended",
        "0 to 12 (13) in both; in B alone 13 to 23 (11)",
        "first to part: conv1 (Conv2d), weight, at step 0", "first a factor of 2 apart: conv2 (Conv2d), weight, at step 12",
        "▶ conv2", " loss parts at step 0", "NaN against", "the same lr",
    ]  # fmt: skip
    places = [text.find(answer) for answer in answers]
    assert -1 not in places
    assert places == sorted(places)


def on_one_line(text):
    return re.sub(r"[\s┃|]+", " ", text)


# Made histories: three layers that run in the order 0, 1, 2 and are registered in another.


def history(steps=10, changes=None, first=0, **options):
    """`steps` healthy steps; `changes[step]` are those of `made_rows.row`."""
    changes = changes or {}
    return History.of([row(step, **{**options, **changes.get(step, {})}) for step in range(first, first + steps)], TABLE)


def since(step, steps=10, **changes):
    """The same changes from a step on."""
    return dict.fromkeys(range(step, steps), changes)


def names(found):
    return [layer.name for _, layer in found]


def test_the_order_within_a_step():
    """Parameters, then outputs forward, then gradients backward: the layer whose turn comes first parts first."""
    a = history(changes={4: {"layer0_weight_grad": {"norm": 2}, "layer1_output_grad": {"norm": 2}, "layer2_output": {"norm": 2}}})
    assert names(compare(a, history()).parting) == ["layer2", "layer1", "layer0"]
    a = history(changes={4: {f"layer{i}_output": {"norm": 2} for i in range(3)} | {"layer2_weight": {"norm": 2}}})
    assert names(compare(a, history()).parting) == ["layer2", "layer0", "layer1"]
    a = history(changes={4: {"layer0_weight": {"norm": 2}}, 3: {"layer1_weight_grad": {"norm": 2}}})
    assert names(compare(a, history()).parting) == ["layer1", "layer0"]


def test_layers_stand_in_execution_order():
    """Also those of which only B knows when they run."""
    never = {step: {f"layer1_{site}": {"first": np.inf} for site in ("output", "output_grad")} for step in range(1, 10)}
    assert [layer.name for layer in compare(history(changes=never), history()).layers] == ["layer0", "layer1", "layer2"]


@pytest.mark.parametrize(
    ("a", "b", "parts"),
    [
        ({"norm": 1.0}, {"norm": 1.0009}, False),
        ({"norm": 1.0}, {"norm": 1.0012}, True),
        ({"norm": 0}, {"norm": 0}, False),
        ({"norm": 0}, {"norm": 1e-30}, True),
        ({"norm": np.inf}, {"norm": np.inf}, False),
        ({"norm": np.inf}, {"norm": 3e38}, True),
        ({"norm": np.nan}, {"norm": np.nan}, False),
        ({"norm": np.nan}, {"norm": 1}, True),
        ({"nan": 3}, {"nan": 3}, False),
        ({"nan": 3}, {"nan": 2}, True),
        ({"neginf": 3}, {}, True),
        ({"nan": np.nan}, {"nan": np.nan}, False),  # a dump may hold any floats
        ({"first": np.inf}, {"first": np.inf}, False),
        ({"first": np.inf}, {}, True),
        ({"elements": 0}, {"elements": 0}, False),
        ({"absmax": 7}, {}, False),  # the norm decides
    ],
)
def test_parts(a, b, parts):
    """By more than a thousandth of the larger norm, by a count of what is not finite, or by running in one run alone."""
    for pair in ((a, b), (b, a)):
        found = compare(*(history(changes={4: {"layer1_output": side}}) for side in pair))
        assert [(at.site, at.step) for at, _ in found.parting] == [("output", 4)] * parts


def test_what_both_held():
    """Norms and counts of both runs, and by what factor they differ; None where a site did not run."""
    a = history(changes={4: {"layer1_output": {"norm": 3}}, 6: {"layer1_output": {"nan": 2, "norm": np.nan}}})
    (at, layer), = compare(a, history()).parting  # fmt: skip
    assert (at.a, at.b, at.ratio) == (Reading(3.0, 0), Reading(1.0, 0), 3.0)
    assert layer.largest.step == 6
    assert (layer.largest.a.nonfinite, layer.largest.ratio) == (2, np.inf)
    assert layer.ratios.tolist() == [1, 1, 1, 1, 3, 1, np.inf, 1, 1, 1]
    assert layer.bad.tolist() == [step == 6 for step in range(10)]
    ((at, _),) = compare(history(changes={4: {"layer1_output": {"first": np.inf}}}), history()).parting
    assert (at.a, at.b) == (None, Reading(1.0, 0))
    assert np.isnan(at.ratio)


@pytest.mark.parametrize(
    ("norms", "leaves", "apart", "always"),
    [
        ([1, 1, 1, 1, 2, 2], 4, 4, False),
        ([1, 1, 1, 1, 0.5, 0.4], 4, 4, False),
        ([1, 1, 1, 1, 1.9, 1.9], None, None, False),
        ([1, 1, 1, 1.2, 1.9, 4], 3, 5, False),  # it leaves before it is a factor of two apart
        ([1.1, 0.9, 1.1, 0.9, 1.5, 9], 5, 5, False),  # a half is not much for what scatters by a tenth
        ([1.5, 0.7, 1.5, 0.7, 2.1, 30], 5, 5, False),  # nor a factor of two for what scatters by a half
        ([1, 1, 3, 3, 3, 1], None, None, False),  # together again
        ([1, 3, 3, 1, 3, 3], None, None, False),  # it has been so far before
        ([1, 3, 3, 1, 7, 7], 4, 4, False),
        ([3, 3, 3, 3, 3, 3], 0, 0, True),
        ([1, 1, 3, 3, 3, 3], 2, 2, True),  # two readings tell nothing of before
        ([1, 1, 1, 1, 1, 0], 5, 5, False),
        ([0, 0, 0, 0, 0, 0], 0, 0, True),
        ([1, 1, 1, 1, "nan", "nan"], 4, 4, False),
        ([1, 1, 1, 1, "nan", 1], None, None, False),
        ([1, 1, 1, 3, None, 3], 3, 3, False),  # a step without a reading says nothing
        ([1, 1, 1, 3, None, None], 3, 3, False),
        ([1, 1, 1, 1, None, None], None, None, False),
        ([1, 1, 1, 1, np.inf, np.inf], 4, 4, False),
    ],
)
def test_apart(norms, leaves, apart, always):
    """A factor of two until the end, and twice as far as ever before; it leaves where it is far out of what it was before."""

    def columns(value):
        return {None: {"first": np.inf}, "nan": {"nan": 1, "norm": np.nan}}.get(value, {"norm": value})

    changes = {step: {"layer1_output": columns(value)} for step, value in enumerate(norms)}
    found = [(at.step, layer.apart.step, layer.always) for at, layer in compare(history(6, changes), history(6)).leaving]
    assert found == ([] if leaves is None else [(leaves, apart, always)])


def test_what_begins_with_zero():
    """A bias that begins with zero in both runs was never together with the other; a zero that only one leaves tells when."""
    zero, small, large = ({"layer1_weight": {"norm": norm}} for norm in (0, 0.1, 0.3))
    begun = {step: zero if step < 4 else small for step in range(10)}, {step: zero if step < 4 else large for step in range(10)}
    (at, layer), = compare(*(history(changes=changes) for changes in begun)).leaving  # fmt: skip
    assert (at.step, layer.always) == (4, True)
    (at, layer), = compare(history(changes=begun[0]), history(changes=dict.fromkeys(range(10), zero))).leaving  # fmt: skip
    assert (at.step, layer.always) == (4, False)


def test_nan_in_both():
    """Where both runs have NaN nobody can say how far apart they are; before, one can."""
    bad = {"layer1_output": {"nan": 1, "norm": np.nan}}
    a = history(changes={**since(5, layer1_output={"norm": 4}), 8: bad, 9: bad})
    (at, _), = compare(a, history(changes={8: bad, 9: bad})).leaving  # fmt: skip
    assert at.step == 5


def test_masks_are_no_nan():
    """-Inf in an output is legal, so that it does not part two norms by any factor."""
    found = compare(history(changes=since(3, layer1_output={"neginf": 2})), history())
    assert names(found.parting) == ["layer1"]
    assert found.leaving == ()


def test_those_that_always_were_come_last():
    """Of layers and of sites: who has come apart is told before who always was."""
    a = history(changes={step: {"layer0_weight": {"norm": 9}, "layer1_weight": {"norm": 9}} for step in range(10)})
    b = history(changes=since(7, layer1_weight_grad={"norm": 5}))
    found = compare(a, b)
    assert [(layer.name, at.site, at.step) for at, layer in found.leaving] == [
        ("layer1", "weight.grad", 7),
        ("layer0", "weight", 0),
    ]
    assert sentences(found)[1:] == [
        "first a factor of 2 apart: layer1 (Linear), weight.grad, at step 7: 1 against 5",
        "a factor of 2 apart throughout: layer0",
    ]


def noisy(steps, seed, spread, changes=None):
    """The gradient of layer 1 scatters by itself."""
    norms = np.exp(np.random.default_rng(seed).normal(0, spread, steps))
    scattered = {step: {"layer1_weight_grad": {"norm": norm}} for step, norm in enumerate(norms)}
    return history(steps, {step: {**scattered[step], **(changes or {}).get(step, {})} for step in range(steps)})


def test_what_scatters_is_not_apart_so_soon():
    """Of two seeds a norm is soon a factor of two off by chance; not of a site that scatters, but where it is far off."""
    a, b = noisy(60, 0, 0.7), noisy(60, 3, 0.7)
    ratios = compare(a, b).layers[1].ratios
    assert (ratios > 2).mean() > 0.3
    assert (ratios[-3:] > 2).all()
    assert compare(a, b).leaving == ()
    far = noisy(60, 0, 0.7, since(50, 60, layer1_weight_grad={"norm": 1e4}))
    assert [(layer.name, at.step) for at, layer in compare(far, b).leaving] == [("layer1", 50)]
    sudden = history(60, since(56, 60, layer1_weight_grad={"norm": 2.5}))  # no scatter: the same, but for four steps
    assert [(layer.name, at.step) for at, layer in compare(sudden, history(60)).leaving] == [("layer1", 56)]


def with_bias(norm, weight_norm=1.0):
    """Histories of a layer whose bias has a gradient that cancels."""
    taps = [("weight", "parameter"), ("weight.grad", "parameter.grad"), ("bias", "parameter"), ("bias.grad", "parameter.grad")]
    table = TapTable(tuple(Tap("conv", "Conv2d", *tap) for tap in taps))
    values = np.zeros((5, 4, 8), dtype=np.float32)
    values[..., 0], values[..., 6], values[..., 7] = 1.0, 8, 2
    values[:, 1, 0], values[3:, 3, 0] = weight_norm, norm
    return History(np.arange(5), table, values)


def test_rounding_is_no_difference():
    """A gradient a million times below that of its layer is rounding: no seed gives it twice, and it tells nothing."""
    assert compare(with_bias(1e-8), with_bias(5e-8)).parting == ()
    assert compare(with_bias(1e-8), with_bias(5e-8)).leaving == ()
    for a, b in ((1e-8, 1e-2), (1e-2, 1e-8), (0.0, 1e-2)):
        assert names(compare(with_bias(a), with_bias(b)).parting) == ["conv"]
        assert names(compare(with_bias(a), with_bias(b)).leaving) == ["conv"]
    assert names(compare(with_bias(1e-8), with_bias(5e-8), tolerance=0.0).parting) == ["conv"]  # bit for bit
    assert compare(with_bias(0.0, 0.0), with_bias(0.0, 0.0)).parting == ()
    assert len(compare(with_bias(1.0, np.inf), with_bias(5.0)).leaving) == 1


# Steps.


def test_steps_of_one_run_alone():
    """Ranges of steps that one run has alone; a run that began later and went on longer."""
    found = compare(history(10), history(10, first=4))
    assert found.common == Span(4, 9, 6)
    assert found.only_a == (Span(0, 3, 4),)
    assert found.only_b == (Span(10, 13, 4),)
    a = History.of([row(step) for step in (0, 1, 2, 5, 6, 9)], TABLE)
    b = History.of([row(step) for step in (2, 3, 4, 5, 9)], TABLE)
    found = compare(a, b)
    assert (found.common, found.only_a, found.only_b) == (Span(2, 9, 3), (Span(0, 1, 2), Span(6, 6, 1)), (Span(3, 4, 2),))


def test_a_step_that_comes_twice():
    """Of a run that went back to a checkpoint the last time counts."""
    rows = [row(0), row(1, loss=7.0, layer1_output={"norm": 7}), row(2), row(1), row(2, layer1_output={"norm": 9})]
    found = compare(History.of(rows, TABLE), history(3))
    assert [(at.step, at.a.norm) for at, _ in found.parting] == [(2, 9.0)]
    assert found.common == Span(0, 2, 3)
    assert found.scalars[0].parts is None


def test_no_step_in_common():
    """An error that says which steps there are."""
    with pytest.raises(BadSetting, match=r"steps 0 to 9 in A, steps 20 to 29 in B"):
        compare(history(), history(first=20))
    with pytest.raises(BadSetting, match=r"steps 0 to 9 in A, no steps in B"):
        compare(history(), history(0))


def test_steps_that_were_not_measured():
    """With `every=3` in one run only the steps that both measured are compared."""
    silent = {tap.layer + "_" + tap.site.replace(".", "_"): {"first": np.inf} for tap in TABLE.taps}
    sparse = history(changes={step: silent for step in range(10) if step % 3})
    found = compare(sparse, history(changes=since(6, layer2_output={"norm": 3})))
    assert (found.common.count, found.measured) == (10, Span(0, 9, 4))
    assert [(layer.name, at.step) for at, layer in found.parting] == [("layer2", 6)]
    never = compare(history(changes=dict.fromkeys(range(10), silent)), history(loss=2.0))
    assert (never.layers, never.measured) == ((), None)
    assert sentences(never) == ["nothing to compare: no layer was measured by both in 10 common steps"]
    assert never.scalars[0].parts == Pair(0, 1.0, 2.0)


def test_scalars():
    """Where each parts, a NaN and one that was not given among them, and the last of it."""
    a = history(changes={3: {"loss": 2.0}, 9: {"loss": np.nan}}, scalars={"lr": 0.1, "same": np.nan, "mine": 1.0})
    b = history(changes={5: {"scalars": {"lr": 0.1, "same": np.nan}}}, scalars={"lr": 0.2, "same": np.nan})
    loss, lr, same, mine = compare(a, b).scalars
    lost = history(3, {1: {"scalars": {"x": np.nan}}}), history(3, {2: {"scalars": {"x": np.nan}}})
    assert compare(*lost).scalars[1].parts.step == 1  # a NaN is not the same as nothing
    assert loss.parts == Pair(3, 2.0, 1.0)
    assert (loss.last.step, loss.last.b) == (9, 1.0)
    assert np.isnan(loss.last.a)
    assert (lr.parts, lr.last) == (Pair(0, 0.1, 0.2), Pair(9, 0.1, 0.2))
    assert same.parts is None
    assert mine.parts == Pair(0, 1.0, None)


def test_what_only_one_run_has():
    """Layers and sites that ran in one run alone; those that ran in neither are no difference."""
    none = {f"layer1_{site}": {"first": np.inf} for site in ("weight", "weight_grad")}
    never = dict.fromkeys(range(10), none)
    found = compare(history(changes=never), history().only(["layer0", "layer1"]))
    assert found.only_in_a == tuple(("layer2", site) for site in ("output", "output.grad", "weight", "weight.grad"))
    assert found.only_in_b == (("layer1", "weight"), ("layer1", "weight.grad"))
    assert [layer.name for layer in found.layers] == ["layer0", "layer1"]
    text = on_one_line(page(report(history(changes=never)), report(history().only(["layer0", "layer1"]))))
    assert "only in A layer2 only in B layer1 weight, layer1 weight.grad" in text


def test_another_type():
    """A layer that is another one in B is said to be."""
    taps = tuple(replace(tap, layer_type="Conv2d") if tap.layer == "layer1" else tap for tap in TABLE.taps)
    found = compare(history(), replace(history(), table=TapTable(taps)))
    assert [layer.type for layer in found.layers] == ["Linear", "Linear or Conv2d", "Linear"]


@pytest.mark.parametrize("tolerance", [-1.0, np.nan, np.inf])
def test_a_wrong_tolerance(tolerance):
    """Is refused."""
    with pytest.raises(BadSetting, match="--tolerance"):
        compare(history(), history(), tolerance)


@given(histories(), histories())
def test_any_floats(a, b):
    """Whatever the floats: a history is the same as itself, and what A and B are makes no difference to where they part."""
    if not len(a):
        return
    itself = compare(a, a, 0.0)
    assert (itself.parting, itself.leaving, itself.only_in_a) == ((), (), ())
    assert not any(scalar.parts for scalar in itself.scalars)
    b = replace(b, steps=a.steps[0] + np.arange(len(b)), table=b.table)
    if len(b):
        there, back = compare(a, b), compare(b, a)
        assert {(at.step, layer.name) for at, layer in there.parting} == {(at.step, layer.name) for at, layer in back.parting}
        assert (there.only_in_a, there.only_a) == (back.only_in_b, back.only_b)


# The page.


def report(of, **options):
    return Report(of, "ended", "2026-11-23T00:00:00Z", "0.1.0", **options)


def page(a, b, width=80, **options):
    buffer = io.StringIO()
    print_difference(compare(a.history, b.history, **options), (Path("a.json"), a), (Path("b.json"), b), file=buffer, width=width)
    return buffer.getvalue()


def healed(story):
    """The story without its fault."""
    values = story.history.values.copy()
    values[-15:] = values[:15]
    scalars = {**story.history.scalars, "loss": np.linspace(2.3, 0.5, len(story.history))}
    return replace(
        story, history=replace(story.history, values=values, scalars=scalars), failure=None, findings=(), reason="ended"
    )


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(width):
    """At any width the text fits, and the layer that comes apart first is marked, with the gaps counted."""
    story = story_report(name="a_rather_long_name_of_a_block.{}.with_a_layer", layers=40, guilty=20)
    text = page(story, healed(story), width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "first to come apart: " in on_one_line(text)
    if width >= 40:
        assert sum(line.startswith("▶") for line in text.splitlines()) == 1
        assert " more" in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_the_columns():
    """In a wide terminal the type, the sites and both norms; in a narrow one when it parts and comes apart."""
    story = story_report()
    wide, narrow = (page(story, healed(story), width) for width in (150, 40))
    heads = [next(line for line in text.splitlines() if line.startswith("  layer ")) for text in (wide, narrow)]
    titles = ["layer", "type", "parts", "its site", "leaves", "site", "apart", "difference", "factor", "at step", "A", "B"]
    assert heads[0].split() == " ".join(titles).split()
    assert heads[1].split()[:3] == ["layer", "parts", "leaves"]
    (marked,) = [line for line in wide.splitlines() if line.startswith("▶")]
    assert marked.split()[1:3] == ["blocks.3.attention.up", "Linear"]
    assert "✕" in marked
    assert "NaN/Inf" in marked


def test_where_nothing_comes_apart():
    """There is no column of it."""
    text = page(report(history(changes=since(4, layer1_weight={"norm": 1.1}))), report(history()))
    assert not {"apart", "leaves"} & set(text.split())
    assert "first to part: layer1 (Linear), weight, at step 4: 1.1 against 1" in text
    assert "first in common" not in text


def test_the_layers_that_matter():
    """At most so many, in execution order: the first to part and to come apart always, the others as gaps."""
    story = story_report(layers=300, guilty=123)
    values = story.history.values.copy()
    of = {layer: (299 - layer) * 4 for layer in range(300)}
    for layer in range(300):
        values[:, of[layer] + 3, 0] *= 1.01 if layer % 7 == 0 else 1
    values[20:, of[250] + 2, 0] *= 3
    values[18:, of[17] + 2, 0] *= 3
    found = compare(replace(story.history, values=values), story.history)
    shown = that_matter(found, MOST_LAYERS)
    layers = [layer.name for layer in shown if not isinstance(layer, int)]
    assert len(layers) <= MOST_LAYERS
    assert layers == [layer.name for layer in found.layers if layer.name in layers]
    assert {*names(found.leaving)[:4], *names(found.parting)[:4]} <= set(layers)
    assert names(found.leaving) == ["blocks.17.attention.up", "blocks.250.attention.up"]
    assert {"blocks.0.attention.up", "blocks.299.attention.up", "blocks.16.attention.up"} <= set(layers)
    assert len(layers) + sum(gap for gap in shown if isinstance(gap, int)) == 300
    assert not any(isinstance(one, int) and isinstance(next_one, int) for one, next_one in pairwise(shown))


def test_the_first_of_very_many():
    """Where all layers leave, those that only parted first are shown all the same."""
    story = story_report(layers=100, guilty=50)
    values = story.history.values.copy()
    weights = [(99 - layer) * 4 + 2 for layer in range(100)]
    values[20:, weights, 0] *= 3
    values[30:, [weights[i] for i in (90, 91)], 0] *= 3
    values[:30, [weights[i] for i in (90, 91)], 0] = story.history.values[:30, [weights[i] for i in (90, 91)], 0] * 1.01
    found = compare(replace(story.history, values=values), story.history)
    shown = [layer for layer in that_matter(found, MOST_LAYERS) if not isinstance(layer, int)]
    assert len(shown) == MOST_LAYERS
    assert names(found.parting)[:2] == ["blocks.90.attention.up", "blocks.91.attention.up"]
    assert {*names(found.parting)[:4], *names(found.leaving)[:4]} <= {layer.name for layer in shown}


@given(reports, st.integers(10, 130))
def test_any_report(story, width):
    """Whatever is in it: the page fits, and nothing of it reaches the terminal as an escape code or markup."""
    if not len(story.history):
        return
    values = story.history.values * np.float32(0.5)
    text = page(story, replace(story, history=replace(story.history, values=values)), width)
    assert "\x1b" not in text
    assert max(cell_len(line) for line in text.splitlines()) <= width


def test_untrusted_names():
    """Names with markup and escape codes are shown, and not obeyed; so is all else that the user chose."""
    story = story_report(name="[red]x[/]\x1b[2J{}")
    text = page(replace(story, reason="[b]\x1b"), healed(story), 120)
    assert "\x1b" not in text
    assert r"[red]x[/]\x1b[2J3 (Linear)" in text


def test_ascii():
    """Where the encoding has no block characters, ASCII stands in for them."""
    story = story_report(layers=40)
    for width in (40, 80, 120):
        buffer = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        healthy = healed(story)
        print_difference(
            compare(story.history, healthy.history), (Path("a"), story), (Path("b"), healthy), file=buffer, width=width
        )
        buffer.flush()
        assert "> blocks.3.a" in buffer.buffer.getvalue().decode("ascii")


def test_plain_in_a_pipe_and_with_no_color(monkeypatch):
    """No escape sequence in a pipe; colours where FORCE_COLOR asks for them, and never with NO_COLOR."""
    story = story_report()
    assert "\x1b" not in page(story, healed(story))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in page(story, healed(story))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", page(story, healed(story)))


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (1.0, 1.0, ("1", "1")),
        (1.2301, 1.2349, ("1.23", "1.235")),
        (np.nan, np.nan, ("NaN", "NaN")),
        (np.inf, -1.0, ("Infinity", "-1")),
        (None, 0.5, ("not given", "0.5")),
    ],
)
def test_both(a, b, said):
    """In as many figures as tell them apart."""
    assert both(a, b) == said


# The command.


@pytest.fixture
def dumps(tmp_path):
    """The dumps of a crash and of the same run without its fault."""
    story = story_report()
    return [str(_codec.save(of, tmp_path / name / "rank00000.json")) for name, of in (("a", story), ("b", healed(story)))]


def strict(text):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_json_of_nan(tmp_path, capsys):
    """A norm of no finite values, a site that did not run, scalars and ratios of which nobody knows."""
    changes = {
        5: {"layer0_output": {"norm": np.nan}, "layer1_output": {"first": np.inf}},
        6: {"loss": np.nan},
        7: {"loss": np.inf},
    }
    files = [tmp_path / name / "rank00000.json" for name in "ab"]
    for file, of in zip(files, (history(changes=changes), history()), strict=True):
        _codec.save(report(of), file)
    assert cli.main(["diff", *map(str, files), "--json"]) == 0
    data = strict(capsys.readouterr().out)
    parts = {layer["layer"]: layer["parts"] for layer in data["layers"]}
    assert parts["layer0"] == {
        "site": "output", "step": 5, "a": {"norm": "NaN", "nonfinite": 0}, "b": {"norm": 1.0, "nonfinite": 0}, "ratio": "NaN",
    }  # fmt: skip
    assert parts["layer1"]["a"] is None
    assert data["scalars"][0]["parts"] == {"step": 6, "a": "NaN", "b": 1.0}


def test_json(dumps, capsys):
    """Strict JSON and nothing else on stdout, NaN and infinities as strings; the exit code is 0 though they differ."""
    assert cli.main(["diff", *dumps, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    data = strict(out)
    assert list(data) == [
        "a", "b", "tolerance", "steps", "first", "first_apart", "layers", "scalars", "only_in_a", "only_in_b",
    ]  # fmt: skip
    assert [data["a"], data["b"], data["tolerance"]] == [*dumps, 0.001]
    assert data["steps"] == {"common": [300, 349, 50], "measured": [300, 349, 50], "only_a": [], "only_b": []}
    assert [layer["layer"] for layer in data["layers"]] == [f"blocks.{i}.attention.up" for i in range(6)]
    assert data["first_apart"]["layer"] == "blocks.3.attention.up"
    assert data["first_apart"]["always"] is False
    largest = data["layers"][3]["largest"]
    assert (largest["step"], largest["a"], largest["ratio"]) == (349, {"norm": 0.0, "nonfinite": 17}, "Infinity")
    (loss,) = [scalar for scalar in data["scalars"] if scalar["name"] == "loss"]
    assert loss["parts"] == {"step": 349, "a": "NaN", "b": 0.5} or loss["last"] == {"step": 349, "a": "NaN", "b": 0.5}
    assert data["only_in_a"] == data["only_in_b"] == []


def test_json_of_no_difference(dumps, capsys):
    """null, and a word on stderr that it was one file."""
    assert cli.main(["diff", dumps[0], str(Path(dumps[0]).parent), "--json"]) == 0
    out, err = capsys.readouterr()
    data = strict(out)
    assert (data["first"], data["first_apart"]) == (None, None)
    assert all(layer["parts"] is layer["leaves"] is layer["apart"] is layer["largest"] is None for layer in data["layers"])
    assert "the same file" in err


def test_layers(dumps, tmp_path, capsys):
    """--layer, as often as wanted, of a layer in either run; an unknown one is an error that names what may have been meant."""
    assert cli.main(["diff", *dumps, "--json", "-l", "blocks.3", "--layer", "blocks.1.attention.up"]) == 0
    assert [layer["layer"] for layer in strict(capsys.readouterr().out)["layers"]] == [
        "blocks.1.attention.up",
        "blocks.3.attention.up",
    ]
    assert cli.main(["diff", *dumps, "-l", "blocks.3.atention.up"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "did you mean blocks.3.attention.up" in err
    other = story_report()
    other = replace(other, history=other.history.only(["blocks.1.attention.up"]))
    alone = str(_codec.save(other, tmp_path / "c" / "rank00000.json"))
    for pair in ((dumps[0], alone), (alone, dumps[0])):
        assert cli.main(["diff", *pair, "-l", "blocks.3"]) == 0
        assert "blocks.3.attention.up" in capsys.readouterr().out


def test_wrong_use(dumps, tmp_path, capsys):
    """Exit code 2, an explanation on stderr, nothing on stdout."""
    report = story_report()
    later = replace(report, history=replace(report.history, steps=report.history.steps + 1000))
    away = str(_codec.save(later, tmp_path / "later" / "rank00000.json"))
    for arguments, says in (
        ([dumps[0], away], "steps 300 to 349 in A, steps 1300 to 1349 in B"),
        ([*dumps, "--tolerance", "nan"], "a number from 0 on"),
        ([dumps[0], str(tmp_path / "nothing")], "no such file"),
    ):
        assert cli.main(["diff", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert says in err
    with pytest.raises(SystemExit) as left:
        cli.main(["diff", dumps[0]])
    assert left.value.code == 2


def test_without_torch(dumps):
    """With torch blocked, on a page and in JSON."""
    code = 'import sys; sys.modules["torch"] = None; from nobs import cli; sys.exit(cli.main(sys.argv[1:]))'
    for more in ([], ["--json"]):
        command = [sys.executable, "-c", code, "diff", *dumps, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "blocks.3.attention.up" in done.stdout
