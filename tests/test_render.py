"""The report as a user sees it: exact text at 80 columns, any width, pipe, colour and ASCII; and the picture."""

import io
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from samples import story_report
from strategies import reports

from nobs._history import History
from nobs._names import cells
from nobs.render import _story
from nobs.render.figure import draw, save_png
from nobs.render.terminal import print_report

GOLDEN = Path(__file__).parent / "golden"


def printed(report, width=80, **options):
    buffer = io.StringIO()
    print_report(report, Path("crashes/run/step00000349/rank00000.json"), file=buffer, width=width, **options)
    return buffer.getvalue()


def spreading(report, out, factor=10.0):
    """The report with `factor` on the norms of some layers: {layer: (0 output or 3 gradient, first row)}."""
    values = report.history.values.copy()
    for layer, (kind, row) in out.items():
        values[row:, (len(report.layers) - 1 - layer) * 4 + kind, 0] *= factor
    return replace(report, history=replace(report.history, values=values))


def blaming(report, step):
    """The report with a first finding of a step, which names the layer of the first tap, if there is one."""
    layer = report.history.table.taps[0].layer
    return replace(report, findings=tuple(replace(finding, layer=layer, step=step) for finding in report.findings))


def blaming_the_loss(report):
    return replace(report.findings[0], layer=None, site="loss", confidence=0.8)


def on_one_line(text):
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("name", ["few", "many"])
def test_golden_at_80_columns(name):
    """The exact text. After a wanted change: run with NOBS_GOLDEN=write and read the difference."""
    import os

    text = printed(story_report() if name == "few" else story_report(layers=300, guilty=123))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("NOBS_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(width):
    """At any width the text fits, says the cause and the layer, and marks the guilty one, with the gaps counted."""
    text = printed(story_report(name="a_rather_long_name_of_a_block.{}.with_a_layer", layers=40, guilty=20), width)
    assert sum(line.startswith("▶") for line in text.splitlines()) == 1
    assert "… 16 more" in text
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "gradient_explosion" in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_what_failed_stands_first():
    """Within the first lines: what, when, where; the guilty layer is marked in the table and shows its NaN."""
    lines = printed(story_report()).splitlines()
    assert any("loss is NaN at step 349" in line for line in lines[:4])
    assert any("blocks.3.attention.up" in line and "step 335" in line for line in lines[:5])
    assert "batch: shard-6.tar" in printed(
        replace(story_report(), history=replace(story_report().history, batches=("shard-6.tar",) * 50))
    )
    (marked,) = [line for line in lines if line.startswith("▶")]
    assert "✕" in marked
    assert "NaN/Inf" in marked


def test_the_order_of_the_answers():
    """What failed and when, which layer first, how it spread, why and how sure, what to do, where the files are."""
    first = story_report().findings[0]
    others = [replace(first, cause="bad_batch", confidence=0.2), replace(first, cause="overflow", confidence=0.1), first]
    text = printed(replace(story_report(), findings=(first, *others)))
    answers = [
        "loss is NaN at step 349", "first wrong: blocks.3", " spread blocks.3", "layers in execution order", "▶ blocks.3",
        "\n loss ", "\n   lr ", " why gradient_explosion, in blocks.3.attention.up (70% sure)", "12.3 times its median",
        "  or bad_batch", "(20% sure)", "  or overflow", "(10% sure)", "  do clip gradients", "  dump ", " again ", " nobs 0.1.0",
    ]  # fmt: skip
    places = [text.find(answer) for answer in answers]
    assert -1 not in places
    assert places == sorted(places)
    assert text.count("% sure") == 3
    assert text.count("clip gradients") == 1


def test_how_it_spread():
    """Layers that go out one after the other stand in that order in the sentence, each with its step in the table."""
    report = spreading(story_report(), {4: (0, 37), 2: (3, 38), 1: (3, 40)})
    text = printed(report, 120)
    steps = {"3": "(step 335)", "4": "(337)", "2": "(338)", "1": "(340)"}
    assert f"spread {' → '.join(f'blocks.{i}.attention.up {step}' for i, step in steps.items())}" in on_one_line(text)
    since = {line[2:].split()[0]: line.split("Linear")[1].split()[0] for line in text.splitlines() if " Linear " in line}
    assert {name: step for name, step in since.items() if step.isdigit()} == {
        "blocks.1.attention.up": "340",
        "blocks.2.attention.up": "338",
        "blocks.3.attention.up": "335",
        "blocks.4.attention.up": "337",
    }
    narrow = printed(report, 40)  # the sentence stays, and says it all
    assert f"spread {' → '.join(f'blocks.{i}.a…on.up {step}' for i, step in steps.items())}" in on_one_line(narrow)
    assert not {"since", "output"} & set(narrow.split())


def test_how_it_spread_further():
    """Four layers by name, all of them in the table too, the others counted with the last one's step."""
    report = spreading(story_report(layers=300, guilty=123), {i: (3, 36 + i // 50) for i in range(0, 300, 10)})
    told = on_one_line(printed(report, 100)).split("spread ")[1]
    names = [f"blocks.{i}.attention.up" for i in (123, 40, 30, 20)]
    sentence = f"{names[0]} (step 335) → {names[1]} (336) → {names[2]} (336) → {names[3]} (336) → 27 more by step 341 "
    assert told.startswith(sentence)
    assert all(f"{name} Linear 33" in told for name in names)
    assert "-> 27 more by step 341" in on_one_line(ascii_of(report))


def test_nothing_spread():
    """A layer that was alone in it is said to be; where none left its usual range, or nothing failed, nothing is said."""
    report = story_report()
    assert "spread blocks.3.attention.up (step 335)" in printed(report)
    calm = report.history.values.copy()
    calm[..., 2] = 0  # NaN
    calm[..., 0] = 5.0 + np.arange(50)[:, None] / 10  # to twice of what it was
    for silent in (
        replace(report, failure=None, findings=(), reason="manual"),
        replace(report, failure=None, findings=(), exception="KeyboardInterrupt"),
        replace(report, history=replace(report.history, values=calm), findings=()),
        replace(report, history=replace(report.history, values=calm), findings=(blaming_the_loss(report),)),
    ):
        text = printed(silent)
        assert "layers in execution order" in text
        assert "spread" not in text
        assert "since" not in text


def test_within_a_step_as_it_is_computed():
    """GIVEN a NaN in an output, THEN the layers behind it come first, and then those before it as backward reaches them."""
    report = story_report()
    values = report.history.values.copy()
    values[..., 0], values[..., 2] = 5.0, 0
    for layer in range(6):
        for kind in (0, 3) if layer >= 3 else (3,):
            values[-1, (5 - layer) * 4 + kind, 2] = 1
    nan = replace(report, history=replace(report.history, values=values), findings=())
    assert [line.name[7] for _, line in _story.spread(_story.lines(nan))] == ["3", "4", "5", "2", "1", "0"]


@pytest.mark.parametrize(
    ("values", "left"),
    [
        ([1, 1, 1, 1, 1, 1], None),
        ([1, 1, 1, 1, 4, 4], 4),
        ([1, 1, 1, 2.9, 3.1, 9], 4),
        ([1, 1, 1, 1, 0.09, 0.05], 4),
        ([1, 1, 1, 0, 0, 0], 3),
        ([1, 1, 1, 1, 4, 1], None),  # came back
        ([1, 1, 1, 9, 1, 9], 5),
        ([1, 1, 9, 9, 9, 9], 3),  # out before it began, and so from then on
        ([1, 1, 1, 9, None, None], 3),  # did not run any more
        ([1, None, 1, 9, 9, 9], None),  # two readings tell nothing usual
        ([0, 0, 0, 9, 9, 9], None),
        ([1, 1, 1, 1, 4, "bad"], 4),
        (["bad", 1, "bad", 1, "bad", "bad"], 4),  # NaN needs no usual range
        ([1, 1, 1, np.inf, np.inf, np.inf], 3),
        ([None] * 6, None),
        ([1, 1, 1, 1, 1, 1, 9], None),  # after the failing step
    ],
)
def test_left_at(values, left):
    """Three times its median before the failure began, a tenth of it, or not finite: from a row on until the failing one."""
    bad = np.array([value == "bad" for value in values])
    series = np.array([np.nan if value in (None, "bad") else value for value in values], dtype=np.float64)
    assert _story.left_at(series, bad, 3, 5) == left


def test_plain_in_a_pipe_and_with_no_color(monkeypatch):
    """No escape sequence in a pipe; colours where FORCE_COLOR asks for them, and never with NO_COLOR."""
    assert "\x1b" not in printed(story_report())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in printed(story_report())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", printed(story_report()))


def ascii_of(report):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    print_report(report, file=file, width=80)
    file.flush()
    return raw.getvalue().decode("ascii")


def test_ascii_where_the_encoding_has_no_more():
    """A terminal in Latin-1 gets ASCII instead of an error."""
    text = ascii_of(story_report())
    (marked,) = [line for line in text.splitlines() if line.startswith("> blocks.3")]
    assert "X  NaN/Inf" in marked


def test_hostile_names_are_harmless():
    """Markup, escapes, line breaks and path separators in a layer's name are shown as they are."""
    name = "[bold red]{}[/]\x1b[2J\n../../x"
    text = printed(story_report(name=name), 200)
    assert "\x1b" not in text
    assert "[bold red]3[/]\\x1b[2J\\n../../x" in text


@settings(max_examples=30)
@given(reports, st.integers(0, 9), st.sampled_from([20, 60, 100]))
def test_any_report_prints(report, step, width):
    """GIVEN any report that can be loaded, THEN it prints, and no control character gets through."""
    text = printed(report) + printed(blaming(report, step), width)
    assert all(c.isprintable() or c == "\n" for c in text)


def test_no_layer_is_guilty_of_what_the_loss_did():
    """GIVEN a first finding about the loss itself and a second about a layer, THEN no arrow points at the second."""
    report = story_report()
    loss = blaming_the_loss(report)
    blames_loss = replace(report, findings=(loss, report.findings[0]))
    assert "first wrong: the loss itself" in printed(blames_loss)
    assert "▶" not in printed(blames_loss)
    assert "▶" in printed(report)


def test_many_layers_show_the_guilty_one_and_its_neighbours():
    """Of 300 layers: the first, the last, the guilty one with three on each side, and the gaps counted."""
    shown = _story.that_matter(_story.lines(story_report(layers=300, guilty=123)), 16)
    names = [line.name for line in shown if not isinstance(line, int)]
    assert names == [f"blocks.{i}.attention.up" for i in (0, *range(120, 127), 299)]
    assert len(names) + sum(line for line in shown if isinstance(line, int)) == 300


@pytest.mark.parametrize(("layers", "panels"), [(1, 3), (6, 3), (13, 5), (300, 5)])
def test_the_figure(layers, panels, tmp_path):
    """Loss and two panels of lines; with many layers a heat map for each direction; the same bytes each time."""
    report = story_report(layers=layers, guilty=layers // 2)
    figure = draw(report)
    assert sum(bool(axes.get_title(loc="left")) or axes.get_ylabel() == "loss" for axes in figure.axes) == panels
    assert "loss is NaN at step 349" in figure.get_suptitle()
    assert f"blocks.{layers // 2}.attention.up" in figure.get_suptitle()
    path = save_png(report, tmp_path / "a.png")
    assert path.read_bytes() == save_png(report, tmp_path / "b.png").read_bytes()
    pixels = matplotlib.image.imread(path)[..., :3]
    red = (abs(pixels - np.array([0xC8, 0x10, 0x2E]) / 255) < 0.02).all(axis=-1)
    assert red.sum() > 500, "nothing is marked in red"


@pytest.mark.parametrize(("layers", "panels"), [(6, 3), (300, 5)])
def test_the_figure_says_when_and_where_first(layers, panels):
    """In the title the step and the layer first wrong, and why; in each panel a dashed line there, in the heat map a ring."""
    report = spreading(story_report(layers=layers), {4: (0, 37), 2: (3, 38), 1: (3, 40)})
    figure = draw(report)
    said = ["loss is NaN at step 349", "first wrong: blocks.3.attention.up (Linear), weight.grad, at step 335"]
    assert figure.get_suptitle().splitlines()[:2] == said
    assert "why: gradient_explosion (70% sure): the gradient left its band at 12.3" in figure.get_suptitle()
    drawn = [(axes, line) for axes in figure.axes for line in axes.lines]
    assert sum(line.get_linestyle() == "--" and set(line.get_xdata()) == {335} for _, line in drawn) == panels
    assert {"first wrong: step 335", "failed: step 349"} <= {text.get_text() for axes in figure.axes for text in axes.texts}
    points = [line for axes, line in drawn if axes.images and line.get_marker() == "o"]
    marks = [(line.get_mfc(), *xy) for line in points for xy in line.get_xydata().tolist()]
    if panels == 5:
        assert marks == [("black", 337, 4), ("white", 335, 3), ("black", 340, 1), ("black", 338, 2)]


def test_the_figure_of_a_step_that_was_first_wrong_and_failed():
    """One label for both, and nothing between them."""
    report = story_report()
    figure = draw(replace(report, findings=(replace(report.findings[0], step=349),)))
    said = [text.get_text() for text in figure.axes[0].texts]
    assert said == ["first wrong and failed: step 349"]


@settings(max_examples=10)
@given(reports, st.integers(0, 9))
def test_any_report_draws(report, step):
    """GIVEN any report that can be loaded, THEN it draws, without a warning, and into a file."""
    draw(blaming(report, step))
    with tempfile.TemporaryDirectory() as folder:
        save_png(report, Path(folder) / "a.png")


@pytest.mark.parametrize("layers", [4, 14])
@pytest.mark.parametrize("name", ["$\\frac{{{}$", "_head{}", "", "[red]{}"])
def test_a_strange_layer_name(name, layers, tmp_path):
    """Dollar signs would be mathematics, a legend would leave out an underscore: the guilty layer is named in both panels."""
    report = story_report(name=name, layers=layers)
    figure = draw(report)
    guilty = report.findings[0].layer
    named = [text for axes in figure.axes for text in axes.texts if text.get_text().endswith(f"━━ {guilty}")]
    assert len(named) == 2
    save_png(report, tmp_path / "a.png")


def test_a_report_without_steps():
    """An empty history prints its reason."""
    report = story_report()
    empty = History(report.history.steps[:0], report.history.table, report.history.values[:0])
    assert "dump on request" in printed(replace(report, history=empty, failure=None, findings=(), reason="manual"))


@pytest.mark.parametrize("layers", [4, 20])
def test_nothing_but_nan(layers, tmp_path):
    """A run that was NaN from its first step has a picture too."""
    report = story_report(layers=layers, steps=1, guilty=0)
    history = report.history
    values = history.values.copy()
    values[..., 0], values[..., 2] = np.nan, 8
    broken = replace(report, history=replace(history, values=values))
    at_first = replace(report.findings[0], step=int(history.steps[0]))
    save_png(replace(broken, findings=(at_first,)), tmp_path / "a.png")


@pytest.mark.parametrize(
    "name",
    ["模型.编码器.第{}层.注意力.查询键值投影.线性变换", "block_with_a_long_common_prefix_{}_and_a_long_common_suffix_here"],
)
@pytest.mark.parametrize("width", [80, 120])
def test_long_names_are_told_apart(name, width):
    """Sixteen layers, sixteen different rows, none wider than the terminal."""
    lines = printed(story_report(layers=16, name=name), width).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  layer "))
    rows = [line[2:].split()[0] for line in lines[start + 1 : start + 17]]
    assert len(set(rows)) == 16
    assert all(cells(line) <= width for line in lines)


def test_no_width_at_all():
    """COLUMNS=0 means that nobody knows."""
    assert "loss is NaN at step 349" in printed(story_report(), 0)


def test_scalars_that_have_no_room():
    """Eight rows; the user's own before the learning rates of further groups, and the rest counted."""
    report = story_report()
    history, t = report.history, np.arange(50.0)
    rates = {f"lr.{i}": t for i in range(1, 9)}
    scalars = {**history.scalars, **rates, "accuracy": t}
    given = dict.fromkeys(scalars, np.ones(50, dtype=bool))
    text = printed(replace(report, history=replace(history, scalars=scalars, given=given)))
    assert "accuracy" in text
    assert "3 more in the dump" in text


def test_names_at_the_ends_do_not_overlap():
    """Lines that end at the same height have their names above each other, right of the frame."""
    report = story_report(layers=6)
    values = report.history.values.copy()
    values[:, :, 0] = 5.0
    figure = draw(replace(report, history=replace(report.history, values=values)))
    panels = [axes for axes in figure.axes if axes.get_title(loc="left").endswith("norm")]
    assert len(panels) == 2
    for axes in panels:
        heights = sorted(text.xy[1] for text in axes.texts if text.xy[0] == 1.01)
        assert len(heights) == 5
        assert min(np.diff(heights)) > 0.05
        assert heights[-1] <= 1
