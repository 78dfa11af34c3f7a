"""All ranks in one report: who was first, who is late, dead or missing, norms of the whole; over made black boxes."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_ranks import FAILS, LAYERS, REDUCED, Rank, but, called, dirty, failed, several, written

from nobs import _codec, cli
from nobs._blackbox import Status, this_process
from nobs._history import History
from nobs._merge import dumps, merge
from nobs._merge._whole import Whole
from nobs._ranks import folded, named
from nobs._schema import Failure
from nobs._table import WHOLE, Shard, Tap, TapTable
from nobs.errors import UnreadableDump
from nobs.render.ranks import print_ranks


def place(merged):
    first = merged.first
    return first.rank, first.layer, first.site, first.step


def printed(merged, width=80):
    out = io.StringIO()
    print_ranks(merged, merged.file, file=out, width=width)
    return out.getvalue()


FORWARD = dirty("fc2", "output", "output.grad") | dirty("head", "output", "output.grad") | dirty("fc1", "output.grad")
"""NaN born in the forward of fc2."""
BACKWARD = dirty("embed", "output.grad") | dirty("fc1", "output.grad")
"""NaN born in the backward of fc2: the gradient that came into it was clean."""


@pytest.mark.parametrize(
    ("changes", "reduced", "where"),
    [(FORWARD, REDUCED, ("fc2", "output")), (BACKWARD, dirty("fc1", "weight.grad"), ("fc2", "output.grad"))],
    ids=["forward", "backward"],
)
@pytest.mark.parametrize("count", [2, 4])
def test_a_nan_is_where_it_was_born_though_every_rank_has_it(tmp_path, changes, reduced, where, count):
    """By the reduction all have it in the same step, in the first gradient of the backward already."""
    ranks = several(count, changes=reduced, status=failed())
    ranks = but(ranks, 1, changes=changes | reduced)
    merged = merge(written(tmp_path, *ranks))
    assert place(merged) == (1, *where, FAILS)
    assert merged.first.ranks == tuple(range(count))
    assert "with the reduced gradients" in merged.first.why
    assert merged.report.rank == 1
    assert f"training failed on rank 1 of {count}" in printed(merged)


def test_the_next_step_does_not_hide_it(tmp_path):
    """One step on all outputs of all ranks are NaN, on the lowest rank first."""
    after = {(layer, site, FAILS + 1): {"nan": 4096} for layer in LAYERS for site in ("output", "output.grad", "weight")}
    ranks = but(several(3, changes=REDUCED | after), 2, changes=FORWARD | REDUCED | after)
    assert place(merge(written(tmp_path, *ranks))) == (2, "fc2", "output", FAILS)


def test_nobody_can_tell_where_only_what_is_reduced_is_dirty(tmp_path):
    """The first layer has no output before it whose gradient could show it: the layer is named, and no rank."""
    merged = merge(written(tmp_path, *several(2, changes=dirty("embed", "weight.grad"), status=failed())))
    assert place(merged) == (None, "embed", "weight.grad", FAILS)
    assert merged.first.ranks == (0, 1)
    assert "in the reduction itself" in merged.first.why
    assert "training failed on all 2 ranks" in printed(merged)


def test_dirty_shards_name_the_ranks_that_hold_them_and_not_one(tmp_path):
    """A reduction that scatters leaves the NaN with those whose part it is in."""
    ranks = [Rank(r, 3, shards={("fc1", "weight.grad"): Shard(r, 3)}) for r in range(3)]
    ranks = but(ranks, 2, changes=dirty("fc1", "weight.grad"))
    merged = merge(written(tmp_path, *ranks))
    assert (merged.first.rank, merged.first.ranks) == (None, (2,))
    assert "rank 2, which hold that part of it" in merged.first.why


def test_a_weight_that_is_dirty_on_one_rank_alone_came_by_no_reduction(tmp_path):
    """All others have it clean, and it is whole: the hardware, or what somebody loaded."""
    merged = merge(written(tmp_path, *but(several(3), 1, changes=dirty("fc1", "weight"))))
    assert place(merged) == (1, "fc1", "weight", FAILS)
    assert "no reduction made it" in merged.first.why


@pytest.mark.parametrize("where", ["output", "output.grad"])
def test_pipeline_stages(tmp_path, where):
    """Forward a NaN comes in from the stage before, backward from the one behind; it is born where what is before it is clean."""
    early, late = LAYERS[:2], LAYERS[2:]
    if where == "output":  # born in fc1, on stage 0
        stages = dirty("fc1", "output"), dirty("fc2", "output") | dirty("head", "output")
        born = 0, "fc1"
    else:  # born in the backward of head, on stage 1
        stages = dirty("fc1", "output.grad") | dirty("embed", "output.grad"), dirty("fc2", "output.grad")
        born = 1, "head"
    merged = merge(
        written(
            tmp_path,
            Rank(0, 2, layers=early, changes=stages[0], has_loss=False),
            Rank(1, 2, layers=late, changes=stages[1], status=failed()),
        )
    )
    assert (merged.first.rank, merged.first.layer) == born
    assert merged.norms.gradient[0] == pytest.approx(math.sqrt(13**2 + 17**2 + 13**2 + 17**2)), "of both stages"


def test_the_same_nan_on_two_ranks(tmp_path):
    """Replicas of one computation: nobody can tell, and nobody is named."""
    merged = merge(written(tmp_path, *but(several(3, changes=FORWARD), 0, changes=REDUCED)))
    assert (merged.first.rank, merged.first.ranks) == (None, (0, 1, 2))
    assert "ranks 1, 2 had NaN or Inf in fc2 (output) at step 112, at the same place; rank 0 got it" in merged.first.why


def test_the_overflow_of_a_loss_scale_is_no_news(tmp_path):
    """Whose way to find itself it is."""
    ranks = several(2, changes={("fc1", "weight.grad", 105): {"posinf": 3}})
    for rank in ranks:
        history = rank.history()
        scaled = replace(
            history,
            scalars=dict(history.scalars) | {"loss_scale": np.full(15, 2.0**16)},
            given=dict(history.given) | {"loss_scale": np.full(15, True)},
        )
        _codec.save(
            replace(rank.report(), history=scaled, reason="manual"), tmp_path / "step00000114" / f"rank0000{rank.rank}.json"
        )
    assert merge(tmp_path).first is None


def test_a_bad_batch_on_one_rank(tmp_path):
    """Its own outputs and loss jump; the gradients jump on all, and every trigger fires in the same step."""
    jump = {(layer, "weight.grad", FAILS): {"norm": 900} for layer in LAYERS}
    seen = failed(trigger="GradientNorm", message="gradient norm 1800 at step 112", layer="fc1", site="weight.grad")
    own = {("embed", "output", FAILS): {"norm": 400}, ("fc1", "output", FAILS): {"norm": 120}}
    ranks = but(several(4, changes=jump, status=seen), 2, changes=jump | own)
    merged = merge(written(tmp_path, *ranks))
    assert place(merged)[0] == 2
    assert merged.first.why.startswith("on rank 2 alone the output of embed jumped at step 112, 4")


def test_all_ranks_alike(tmp_path):
    """A learning rate, say: nobody is named, and the report says of whom it is."""
    seen = failed(trigger="GradientNorm", message="gradient norm 1800 at step 112", layer="fc1", site="weight.grad")
    merged = merge(written(tmp_path, *several(3, status=seen)))
    assert (merged.first.rank, merged.first.ranks) == (None, (0, 1, 2))
    assert "failed alike" in merged.first.why


def test_one_rank_alone_saw_it(tmp_path):
    """The others were told, which is no failure of theirs."""
    seen = failed(step=111, trigger="LossSpike", message="loss spiked at step 111")
    merged = merge(written(tmp_path, *but(several(3, status=called(1, 111)), 1, status=seen)))
    assert (merged.first.rank, merged.first.ranks, merged.first.step) == (1, (1,), 111)
    assert [word.state for word in merged.words] == ["called", "failed", "called"]
    assert [word.failure is None for word in merged.words] == [True, False, True]


LOST = Status("exception", exception="RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:36")


def test_a_rank_that_died_without_a_word(tmp_path):
    """The others lost its connection, which is an exception too, and not the first."""
    ranks = but(several(3, status=LOST), 1, status=Status(), steps=range(100, 113))
    merged = merge(written(tmp_path, *ranks))
    assert (merged.first.rank, merged.first.step) == (1, FAILS)
    assert merged.words[1].state == "killed"
    assert merged.late == (1,)
    assert "died, late" in printed(merged)


def test_an_exception_of_its_own_is_before_a_death(tmp_path):
    """The launcher killed the others behind it."""
    bug = Status("exception", exception="ZeroDivisionError: division by zero")
    merged = merge(written(tmp_path, *but(several(3, status=Status()), 2, status=bug)))
    assert (merged.first.rank, merged.first.ranks) == (2, (2,))


def test_a_sigterm_for_all_is_of_no_rank(tmp_path):
    """It came from outside."""
    merged = merge(written(tmp_path, *several(3, status=Status("sigterm"))))
    assert (merged.first.rank, merged.first.ranks) == (None, (0, 1, 2))
    assert "training failed on all 3 ranks" in printed(merged)


def test_missing_late_and_unreadable(tmp_path):
    """Each is named, and none of them ends the merge."""
    ranks = several(6, status=Status(), process=this_process())
    ranks = but(ranks, 3, steps=range(100, 110))
    for rank in ranks[:-1]:
        rank.write(tmp_path)
    (tmp_path / "rank00002.blackbox").write_bytes(b"\x89nobsbox" + b"?" * 500)
    merged = merge(tmp_path)
    assert (merged.missing, merged.late, merged.first) == ((5,), (3,), None)
    assert [word.state for word in merged.words] == ["running", "running", "unreadable", "running", "running", "missing"]
    text = printed(merged)
    assert "6 ranks, none failed" in text
    assert "rank 5 wrote nothing" in text
    assert "unreadable" in text


def test_nothing_that_can_be_read(tmp_path):
    """Is said, with the words of the first file."""
    for rank in range(2):
        (tmp_path / f"rank0000{rank}.blackbox").write_bytes(b"?" * 500)
    with pytest.raises(UnreadableDump, match="rank00000"):
        merge(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableDump, match="without dumps"):
        merge(tmp_path / "empty")


def test_dumps_alone_and_a_box_before_its_dump(tmp_path):
    """A rank is read from its box, which holds more, and without one from its dump."""
    ranks = but(several(2, changes=REDUCED, status=failed()), 1, changes=FORWARD | REDUCED)
    for rank in ranks:
        _codec.save(rank.report(), tmp_path / "dumps" / "step00000112" / f"rank0000{rank.rank}.json")
    merged = merge(tmp_path / "dumps")
    assert place(merged) == (1, "fc2", "output", FAILS)
    assert [word.file.endswith(".json") for word in merged.words] == [True, True]
    ranks[0].write(tmp_path / "dumps")
    assert [word.file.endswith(".json") for word in merge(tmp_path / "dumps").words] == [False, True]


def test_a_restart_in_the_same_folder(tmp_path):
    """Of two boxes of a rank the newer one speaks."""
    written(tmp_path, *several(2, changes=FORWARD))
    again = [replace(rank, steps=range(200, 215)) for rank in several(2)]
    merged = merge(written(tmp_path, *again))
    assert merged.first is None
    assert [word.last_step for word in merged.words] == [214, 214]
    assert all(word.file.endswith("-2.blackbox") for word in merged.words)


def test_ranks_that_do_not_agree_on_how_many_they_are(tmp_path):
    """Is a note, and the larger number counts."""
    merged = merge(written(tmp_path, Rank(0, 2), Rank(1, 4)))
    assert (merged.world_size, merged.missing) == (4, (2, 3))
    assert "2, 4" in merged.notes[0]


def test_copies_that_differ(tmp_path):
    """A weight of one rank is no longer that of the others; gradients may differ, and shards do."""
    changes = {("fc2", "weight", step): {"norm": 20.3} for step in range(107, 115)}
    changes |= {("fc2", "weight.grad", 103): {"norm": 99}}
    merged = merge(written(tmp_path, *but(several(3), 2, changes=changes)))
    assert [(a.layer, a.site, a.step, a.ranks) for a in merged.apart] == [("fc2", "weight", 107, (2,))]
    assert "fc2.weight is not the same on all ranks since step 107: other on rank 2" in " ".join(printed(merged).split())


def sharded(rank, ranks):
    return {(layer, site): Shard(rank % ranks, ranks) for layer in LAYERS for site in ("weight", "weight.grad")}


def test_a_shard_of_a_weight_that_one_rank_holds(tmp_path):
    """Gathered, it takes its NaN to the outputs of all ranks at the same place; the parameter itself tells of which."""
    ranks = [Rank(rank, 4, shards=sharded(rank, 4), changes=FORWARD, status=failed()) for rank in range(4)]
    merged = merge(written(tmp_path, *but(ranks, 2, changes=FORWARD | dirty("fc2", "weight"))))
    assert place(merged) == (2, "fc2", "weight", FAILS)
    assert "ranks 0, 1, 3 had it further on" in merged.first.why


def test_a_warning_of_long_ago_is_not_where_it_began(tmp_path):
    """A trigger that warned, and let the rank go on, before a NaN was born on another; nor is it why a rank was called."""
    warned = Failure("LossSpike", 103, "the loss spiked at step 103")
    ranks = [Rank(0, 2, changes=REDUCED, status=Status("running", (warned,))), Rank(1, 2, changes=FORWARD, status=failed())]
    assert place(merge(written(tmp_path / "nan", *ranks))) == (1, "fc2", "output", FAILS)
    spiked = failed(trigger="LossSpike", message="the loss spiked at step 112")
    ranks = [Rank(0, 2, status=Status("failed", (warned, *called(1).failures))), Rank(1, 2, status=spiked)]
    merged = merge(written(tmp_path / "called", *ranks))
    assert (merged.first.rank, merged.first.step) == (1, FAILS)
    assert [word.state for word in merged.words] == ["called", "failed"]


def test_the_first_rank_may_have_been_called(tmp_path):
    """Another rank's triggers were quicker by a moment; the report of the first is not that another one failed."""
    merged = merge(written(tmp_path, Rank(0, 2, changes=REDUCED, status=failed()), Rank(1, 2, changes=FORWARD, status=called(0))))
    assert place(merged) == (1, "fc2", "output", FAILS)
    assert merged.report.what == "loss is NaN at step 112"
    assert (merged.report.rank, merged.report.findings[0].layer) == (1, "fc2")


def test_a_death_on_another_machine(tmp_path):
    """Nobody can tell from here whether a process lives; where the others have lost one, it does not."""
    elsewhere = replace(this_process(), host="node17")
    ranks = but(several(3, status=LOST, process=elsewhere), 1, status=Status())
    assert merge(written(tmp_path / "dead", *ranks)).first.rank == 1
    ranks = but(several(3, status=Status(), process=elsewhere), 1, steps=range(100, 110))
    slow = merge(written(tmp_path / "slow", *ranks))
    assert (slow.first, slow.late) == (None, (1,)), "all may be alive"
    ranks = but(ranks, 2, status=Status("ended"))
    assert merge(written(tmp_path / "over", *ranks)).first.rank == 1


def test_a_timeout_of_its_own_is_no_lost_rank(tmp_path):
    """The loader of data has them too."""
    bug = Status("exception", exception="RuntimeError: DataLoader timed out after 30 seconds")
    assert merge(written(tmp_path, *but(several(3, status=LOST), 1, status=bug))).first.rank == 1


def test_a_damaged_box_beside_a_dump(tmp_path):
    """The dump is read."""
    ranks = [Rank(0, 2, changes=REDUCED, status=failed()), Rank(1, 2, changes=FORWARD, status=failed())]
    _codec.save(ranks[1].report(), tmp_path / "step00000112" / "rank00001.json")
    ranks[0].write(tmp_path)
    (tmp_path / "rank00001.blackbox").write_bytes(b"\x89nobsbox" + b"?" * 500)
    merged = merge(tmp_path)
    assert place(merged) == (1, "fc2", "output", FAILS)
    assert merged.words[1].file.endswith(".json")


def test_the_name_of_a_file_says_of_which_rank_it_is(tmp_path):
    """Also where two have the same header: none is lost."""
    box = Rank(0, 2).write(tmp_path)
    box.with_name("rank00001.blackbox").write_bytes(box.read_bytes())
    assert [(word.rank, word.state) for word in merge(tmp_path).words] == [(0, "ended"), (1, "ended")]


def test_copies_of_which_the_first_is_another(tmp_path):
    """Those are named that are fewer, be it the lowest rank; shards that several ranks hold are compared too, and NaN."""
    changes = {("fc2", "weight", step): {"norm": 20.3} for step in range(107, 115)}
    merged = merge(written(tmp_path / "whole", *but(several(4), 0, changes=changes)))
    assert [(a.layer, a.site, a.step, a.ranks) for a in merged.apart] == [("fc2", "weight", 107, (0,))]
    hybrid = [Rank(rank, 6, shards=sharded(rank, 2)) for rank in range(6)]
    merged = merge(written(tmp_path / "hybrid", *but(hybrid, 3, changes=changes)))
    assert [(a.layer, a.site, a.step, a.ranks) for a in merged.apart] == [("fc2", "weight", 112, (3,))]
    lost = {("fc2", "weight", 114): {"norm": math.nan, "nan": 4096}}
    merged = merge(written(tmp_path / "nan", *but(several(3), 2, changes=lost)))
    assert [(a.step, a.ranks) for a in merged.apart] == [(114, (2,))]


# -- norms of the whole ------------------------------------------------------------------------------------------------


def history_of(parts, shards, steps=(0,)):
    """A history of one layer whose parameters, and gradients, are these arrays."""
    taps = [Tap("fc", "Linear", name, "parameter.grad" if name.endswith(".grad") else "parameter") for name in parts]
    values = np.zeros((len(steps), len(taps), 8), dtype=np.float32)
    for line, part in enumerate(parts.values()):
        norm = math.sqrt(float(np.square(part).sum())) if len(part) else math.nan
        values[:, line] = norm, 0, 0, 0, 0, 0, len(part), 1
    return History(np.array(steps), TapTable(tuple(taps)), values, shards={("fc", name): shard for name, shard in shards.items()})


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), max_size=40),
    st.lists(st.integers(0, 40), max_size=5),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_the_norm_of_the_whole(vector, cuts, copies, order):
    """However a vector is cut into parts, empty ones too, and however often each is held: the norm is that of the vector."""
    vector = np.array(vector, dtype=np.float64)
    parts = np.split(vector, sorted(min(cut, len(vector)) for cut in cuts))
    held = [(i, part) for i, part in enumerate(parts) for _ in range(copies)]
    order.shuffle(held)
    whole = Whole()
    for rank, (i, part) in enumerate(held):
        whole.add(rank, history_of({"weight.grad": part}, {"weight.grad": Shard(i, len(parts))}))
    norms = whole.norms()
    expected = np.linalg.norm(vector) if len(vector) else math.nan
    got = norms.sites["fc", "weight.grad"][0] if len(parts) > 1 else norms.gradient[0]
    if len(vector) or len(parts) > 1:
        assert got == pytest.approx(expected, rel=1e-6, nan_ok=True)
    if len(vector):
        assert norms.gradient[0] == pytest.approx(expected, rel=1e-6)


def test_copies_count_once_and_not_as_a_root_of_their_number():
    """Replicas of whole tensors, as DistributedDataParallel has them, and of shards, as hybrid sharding has them."""
    gradient = np.arange(1, 9, dtype=np.float64)
    expected = np.linalg.norm(gradient)
    replicated, hybrid = Whole(), Whole()
    for rank in range(4):
        replicated.add(rank, history_of({"weight.grad": gradient}, {}))
        hybrid.add(rank, history_of({"weight.grad": gradient[rank % 2 :: 2]}, {"weight.grad": Shard(rank % 2, 2)}))
    assert replicated.norms().gradient[0] == pytest.approx(expected)
    assert hybrid.norms().gradient[0] == pytest.approx(expected)
    assert hybrid.norms().gradient[0] != pytest.approx(expected * math.sqrt(2))


@pytest.mark.parametrize(
    "shards",
    [
        [Shard(0, 3), Shard(1, 3)],  # the third is missing
        [Shard(0, 2), Shard(1, 3)],  # they do not agree
        [Shard(0, 1, addend=True), Shard(0, 1, addend=True)],  # a sum that nobody has made
        [WHOLE, Shard(1, 2)],
    ],
)
def test_a_norm_that_is_not_known(shards):
    """Is not made up."""
    whole = Whole()
    for rank, shard in enumerate(shards):
        whole.add(rank, history_of({"weight.grad": np.ones(4)}, {"weight.grad": shard}))
    assert np.isnan(whole.norms().sites["fc", "weight.grad"]).all()
    assert np.isnan(whole.norms().gradient).all()


def test_steps_that_not_all_ranks_have():
    """Are known where all have them."""
    whole = Whole()
    for rank, steps in enumerate([(3, 4, 5), (4, 5, 6)]):
        whole.add(rank, history_of({"weight.grad": np.ones(2)}, {"weight.grad": Shard(rank, 2)}, steps))
    norms = whole.norms()
    assert norms.steps == (3, 4, 5, 6)
    np.testing.assert_allclose(norms.sites["fc", "weight.grad"], [math.nan, 2, 2, math.nan])
    np.testing.assert_allclose(norms.gradient, [math.nan, 2, 2, math.nan])


def test_a_copy_knows_what_the_first_has_not_recorded():
    """A rank that ended early, and one that began late, leave no hole where another holds the same part; nor does one count
    twice.
    """
    gradient = np.arange(1, 9, dtype=np.float64)
    for order in ([(0, (3, 4)), (1, (3, 4, 5)), (0, (4, 5))], [(0, (4, 5)), (1, (3, 4, 5)), (0, (3, 4))]):
        whole = Whole()
        for rank, (index, steps) in enumerate(order):
            whole.add(rank, history_of({"weight.grad": gradient[index::2]}, {"weight.grad": Shard(index, 2)}, steps))
        np.testing.assert_allclose(whole.norms().gradient, [np.linalg.norm(gradient)] * 3)


def test_stages_add_up_and_what_did_not_run_is_no_hole():
    """Of layers on different ranks the gradient is that of all; where a rank that holds one is gone, it is not known."""
    branch = history_of({"a.grad": np.full(1, 3.0), "b.grad": np.full(1, 4.0)}, {}, (0, 1))
    branch.values[1, 1, -1] = np.inf  # b is a branch that was not taken
    other = replace(history_of({"c.grad": np.full(1, 12.0)}, {}, (0,)))
    whole = Whole()
    whole.add(0, branch)
    np.testing.assert_allclose(whole.norms().gradient, [5, 3])
    whole.add(1, other)
    np.testing.assert_allclose(whole.norms().gradient, [13, math.nan])


def test_ranks_far_apart_keep_the_newest_steps():
    """However many there are."""
    whole = Whole()
    for rank in range(20):
        whole.add(rank, history_of({"weight": np.ones(2)}, {}, range(10 * rank, 10 * rank + 5)))
    assert whole.norms().steps == (*range(180, 185), *range(190, 195))


# -- the terminal, the command line ------------------------------------------------------------------------------------


def test_a_thousand_ranks_are_a_few_rows(tmp_path):
    """Those that differ stand out, and the rest is one row with the range of its numbers."""
    made = merge(
        written(tmp_path, *but(several(4, changes=REDUCED, status=called(1)), 1, changes=FORWARD | REDUCED, status=failed()))
    )
    alike = [replace(made.words[0], rank=rank, loss=2 + rank / 1000) for rank in range(1000)]
    alike[1], alike[7] = made.words[1], replace(alike[7], state="killed", last_step=90)
    alike[9] = replace(alike[9], state="missing")
    text = printed(replace(made, world_size=1000, words=tuple(alike), late=(7,)))
    rows = text[text.index("first wrong\n") :].splitlines()
    assert len(rows) < 60
    assert "training failed on rank 1 of 1000" in text
    assert "997 ranks" in text
    assert "2..3" in text
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_hostile_names_stay_text(tmp_path, width):
    """Markup, escapes and very long names of layers, and what an exception says."""
    layers = ("[red]embed[/red]", "a" * 300, "\x1b[31mfc2", "head")
    changes = {(layers[2], "output", FAILS): {"nan": 1}}
    ranks = but(several(2, layers=layers), 1, changes=changes)
    ranks[0] = replace(ranks[0], status=Status("exception", exception="[bold]boom[/bold]\x1b[31m\nsecond line"))
    text = printed(merge(written(tmp_path, *ranks)), width)
    assert "\x1b" not in text
    assert "[red]embed[/red]" in text
    assert all(len(line) <= width for line in text.splitlines())


def test_the_command(tmp_path, capsys):
    """`merge`, `merge --json`, `-o`, and `show` of a folder with several ranks, which is the same; of a file it is not."""
    run = written(tmp_path / "run", *but(several(2, changes=REDUCED, status=failed()), 1, changes=FORWARD | REDUCED))
    assert cli.main(["merge", str(run)]) == 0
    text = capsys.readouterr().out
    assert "training failed on rank 1 of 2" in text
    assert cli.main(["show", str(tmp_path)]) == 0
    assert "training failed on rank 1 of 2" in capsys.readouterr().out
    assert cli.main(["show", str(run / "rank00000.blackbox")]) == 0
    assert "ranks at step" not in capsys.readouterr().out
    assert cli.main(["merge", str(run), "--json", "-o", str(tmp_path / "merged.json")]) == 0
    plain = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (plain["format"], plain["first"]["rank"], plain["first"]["step"]) == ("nobs.ranks", 1, FAILS)
    assert plain == json.loads((tmp_path / "merged.json").read_text())
    assert cli.main(["merge", str(run), "-o", str(tmp_path / "merged.json")]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main(["merge", str(tmp_path / "nothing")]) == 2


def test_a_merged_report_in_the_folder_of_its_run(tmp_path, capsys):
    """Is no dump of a rank, to whatever is asked next."""
    written(tmp_path, *several(2))
    assert cli.main(["merge", str(tmp_path), "-o", str(tmp_path / "merged.json")]) == 0
    for command in (["check"], ["merge"], ["show", "--layer", "fc2"]):
        assert cli.main([*command, str(tmp_path)]) == 0, capsys.readouterr().err


def test_one_rank_can_be_merged_too(tmp_path):
    """It says so."""
    merged = merge(written(tmp_path, Rank(0, 1, changes=FORWARD, status=failed())))
    assert place(merged) == (0, "fc2", "output", FAILS)
    assert "training failed on rank 0 of 1" in printed(merged)
    assert json.loads(dumps(merged))["missing"] == []


def test_ranks_in_few_words():
    """Spans of three and more."""
    assert folded([3, 1, 2, 0, 5, 7, 8, 100, 101, 102]) == "0-3, 5, 7, 8, 100-102"
    assert named([4]) == "rank 4"
    assert named([4, 2]) == "ranks 2, 4"
