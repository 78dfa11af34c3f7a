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


def test_plain_in_a_pipe_and_with_no_color(monkeypatch):
    """No escape sequence in a pipe; colours where FORCE_COLOR asks for them, and never with NO_COLOR."""
    assert "\x1b" not in printed(story_report())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in printed(story_report())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", printed(story_report()))


def test_ascii_where_the_encoding_has_no_more():
    """A terminal in Latin-1 gets ASCII instead of an error."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    print_report(story_report(), file=file, width=80)
    file.flush()
    text = raw.getvalue().decode("ascii")
    (marked,) = [line for line in text.splitlines() if line.startswith("> blocks.3")]
    assert "X  NaN/Inf" in marked


def test_hostile_names_are_harmless():
    """Markup, escapes, line breaks and path separators in a layer's name are shown as they are."""
    name = "[bold red]{}[/]\x1b[2J\n../../x"
    text = printed(story_report(name=name), 200)
    assert "\x1b" not in text
    assert "[bold red]3[/]\\x1b[2J\\n../../x" in text


@settings(max_examples=30)
@given(reports)
def test_any_report_prints(report):
    """GIVEN any report that can be loaded, THEN it prints, and no control character gets through."""
    text = printed(report)
    assert all(c.isprintable() or c == "\n" for c in text)


def test_no_layer_is_guilty_of_what_the_loss_did():
    """GIVEN a first finding about the loss itself and a second about a layer, THEN no arrow points at the second."""
    report = story_report()
    loss = replace(report.findings[0], layer=None, site="loss", confidence=0.8)
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


@settings(max_examples=10)
@given(reports)
def test_any_report_draws(report):
    """GIVEN any report that can be loaded, THEN it draws, without a warning, and into a file."""
    draw(report)
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
