"""Names and the environment: cleaned, matched, made harmless."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nobs import _launch, _names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "(model)"),
        ("_orig_mod", "(model)"),
        ("_orig_mod.blocks.0._orig_mod.up", "blocks.0.up"),
        ("0._checkpoint_wrapped_module.weight", "0.weight"),
        ("my_orig_mod.x", "my_orig_mod.x"),
    ],
)
def test_clean(name, expected):
    """What wrappers add is gone, what merely looks like it stays."""
    assert _names.clean(name) == expected


def test_matching_and_nearest():
    """Globs cross dots; a misspelt name finds its neighbours."""
    names = ["blocks.0.up", "blocks.0.down", "head", "x[0]"]
    assert _names.matching("blocks.*", names) == names[:2]
    assert _names.matching("x[0]", names) == ["x[0]"]
    assert _names.nearest("haed", names)[0] == "head"
    assert _names.nearest("zzz", names)


@given(st.text())
def test_printable_is_harmless(text):
    """No control character, line break or lone surrogate is left; ordinary text is untouched."""
    shown = _names.printable(text)
    assert shown.isprintable()
    assert "\x1b" not in shown
    shown.encode()
    if text.isprintable():
        assert shown == text


@given(st.text())
def test_file_name_stays_in_its_folder(text):
    """One plain name: no separators, not hidden, not empty, not a way up."""
    name = _names.file_name(text)
    assert name
    assert "/" not in name
    assert "\\" not in name
    assert not name.startswith(".")
    assert len(name) <= 80


def test_the_launcher():
    """Rank, size and run id of torchrun and Slurm; without them 0, 1 and the time without colons."""
    assert (_launch.rank({}), _launch.world_size({})) == (0, 1)
    assert _launch.rank({"SLURM_PROCID": "5"}) == 5
    assert _launch.rank({"RANK": "2", "SLURM_PROCID": "5"}) == 2
    assert _launch.world_size({"WORLD_SIZE": "x"}) == 1
    assert _launch.run_name({"TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": "77"}) == "77"
    assert _launch.run_name({}, now_s=0) == "1970-01-01T00-00-00Z"
    assert [_launch.disabled({"NOBS_DISABLE": value}) for value in ("", "0", "false", "1", "yes")] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("width", [24, 30, 32, 48])
@pytest.mark.parametrize(
    "names",
    [
        [f"{side}.block.{i}.layer.0.SelfAttention.q" for side in ("encoder", "decoder") for i in (0, 1, 10, 11)],
        [f"model_layers_{i}_self_attention_query_key_value_projection" for i in range(20)],
        [f"block_with_a_long_common_prefix_{i}_and_a_long_common_suffix_here" for i in range(5)],
        [f"模型.编码器.第{i}层.注意力.查询键值投影.线性变换" for i in range(12)],
    ],
)
def test_short_names_are_told_apart(names, width):
    """Cut to the width of a column, no two of them are alike."""
    short = _names.shortened(names, width)
    assert len(set(short)) == len(names)
    assert max(map(_names.cells, short)) <= width


@given(st.lists(st.text(max_size=30), max_size=5), st.integers(2, 20))
def test_shortened_to_any_width(names, width):
    """Never wider than asked for, as many as given, and what fits is left as it is."""
    short = _names.shortened(names, width)
    assert len(short) == len(names)
    for name, cut in zip(names, short, strict=True):
        assert _names.cells(cut) <= width
        assert cut == name or _names.cells(name) > width
