"""Dumps: any floats round-trip, any language reads them, and whatever is wrong with a file ends in one kind of error."""

import json
import math
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import reports

import nobs
from nobs import _codec
from nobs._columns import STATISTICS
from nobs._find import find
from nobs._history import History
from nobs._parse import loads
from nobs._schema import Failure, Report
from nobs._table import Tap, TapTable
from nobs.errors import UnreadableDump


def refuse(word):
    raise AssertionError(f"the token {word}")


def same(a, b):
    return (a == b) | (np.isnan(a) & np.isnan(b))


@settings(max_examples=60)
@given(reports)
def test_round_trip(report):
    """GIVEN a report of any floats and names, THEN its JSON is strict, and reads back to the same statistics, bit for bit."""
    text = _codec.dumps(report)
    json.loads(text, parse_constant=refuse)
    back = loads(text)
    assert same(
        np.array([getattr(back.failure, "value", None) or 0.0]), np.array([getattr(report.failure, "value", None) or 0.0])
    ).all()
    assert back.findings == report.findings
    assert (back.reason, back.created, back.exception) == (report.reason, report.created, report.exception)
    assert back.history.steps.tolist() == report.history.steps.tolist()
    for name, values in report.history.scalars.items():
        assert same(back.history.scalars[name], values).all()
        assert (back.history.given[name] == report.history.given[name]).all()
    for layer in report.layers:
        for site, facts in layer.sites.items():
            for statistic in STATISTICS:
                ours, theirs = report.history[layer.name, site, statistic], back.history[layer.name, site, statistic]
                assert same(ours, theirs).all(), (layer.name, site, statistic)
            assert next(one for one in back.layers if one.name == layer.name).sites[site] == facts
    ran = [layer.name for layer in report.layers if layer.order is not None]
    assert [layer.name for layer in back.layers if layer.order is not None] == ran
    assert _codec.dumps(back) == _codec.dumps(loads(_codec.dumps(back)))


def example():
    table = TapTable((Tap("fc", "Linear", "output", "output"),))
    values = np.array([[[1.5, 1, 0, 0, 0, 0, 4, 1 + 1 / 16]], [[2.5, 2, 1, 0, 0, 0, 4, 1 + 1 / 16]]], dtype=np.float32)
    history = History(np.array([7, 8]), table, values, {"loss": np.array([0.5, math.nan])}, {"loss": np.array([True, True])})
    return Report(history, "trigger", "now", "0.1.0", Failure("NonFinite", 8, "loss is NaN", value=math.nan, threshold=-math.inf))


def test_the_text_of_a_dump():
    """The fields of design.md; zero throughout is left out; non-finite are strings."""
    data = json.loads(_codec.dumps(example()))
    assert list(data)[:3] == ["format", "format_version", "nobs_version"]
    assert data["failure"]["value"] == "NaN"
    assert data["failure"]["threshold"] == "-Infinity"
    assert data["layers"] == [
        {"name": "fc", "type": "Linear", "order": 0, "sites": {"output": {"dtype": "float32", "elements": 4}}}
    ]
    assert data["series"] == {"fc": {"output": {"norm": [1.5, 2.5], "absmax": [1.0, 2.0], "nan": [0.0, 1.0]}}}
    assert data["scalars"] == {"loss": [0.5, "NaN"]}


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_another_language_reads_it(tmp_path):
    """JavaScript's JSON.parse, which refuses bare NaN, takes the dump."""
    path = _codec.save(example(), tmp_path / "rank00000.json")
    script = f"console.log(JSON.parse(require('fs').readFileSync({json.dumps(str(path))})).failure.value)"
    assert subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True).stdout == "NaN\n"


GOOD = json.loads(_codec.dumps(example()))
HOSTILE = {
    "empty": b"",
    "truncated": _codec.dumps(example()).encode()[:-40],
    "foreign": b'{"a": 1}',
    "a list": b"[1, 2]",
    "binary": bytes(range(256)),
    "deep": b"[" * 200_000 + b"]" * 200_000,
    "deep inside": _codec.dumps(example()).replace('"run": {}', '"run": ' + "[" * 100_000 + "]" * 100_000).encode(),
    "bare NaN": _codec.dumps(example()).replace('"NaN"', "NaN").encode(),
    "bare Infinity": b'{"format": "nobs.report", "x": Infinity}',
    "huge float": _codec.dumps(example()).replace("1.5", "1e999").encode(),
    "huge integer": _codec.dumps(example()).replace("[7, 8]", f"[{10**30}, 8]").encode(),
    "endless integer": _codec.dumps(example()).replace("[7, 8]", f"[{'9' * 10_000}, 8]").encode(),
    "newer": json.dumps({**GOOD, "format_version": 99, "nobs_version": "3.1.0"}).encode(),
    "no version": json.dumps({**GOOD, "format_version": True}).encode(),
    "a run of infinity": json.dumps({**GOOD, "run": {"x": 3}}).replace('"x": 3', '"x": 1e999').encode(),
    "sure by infinity": json.dumps(
        {**GOOD, "findings": [{"cause": "unknown", "confidence": "Infinity", "evidence": "", "advice": ""}]}
    ).encode(),
    "beyond float32": json.dumps(GOOD).replace('"norm": [', '"norm": [1e300, ').replace("1e300, 1.5", "1e300").encode(),
    "a batch too few": json.dumps({**GOOD, "batches": ["[0]"]}).encode(),
    "short series": json.dumps({**GOOD, "steps": [7]}).encode(),
    "a text for a number": json.dumps({**GOOD, "scalars": {"loss": ["0.5", 1]}}).encode(),
    "a missing key": json.dumps({k: v for k, v in GOOD.items() if k != "layers"}).encode(),
    "layers of numbers": json.dumps({**GOOD, "layers": [1]}).encode(),
    "a null failure step": json.dumps({**GOOD, "failure": {"trigger": "x", "step": None, "message": "y"}}).encode(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, tmp_path):
    """Each ends in UnreadableDump with the path in it, never in another exception or a number that is not there."""
    path = tmp_path / "rank00000.json"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(UnreadableDump, match=r"reading .*rank00000.json[\s\S]*got:[\s\S]*expected:[\s\S]*type:") as caught:
        nobs.load(path)
    if name == "newer":
        assert "pip install --upgrade 'neural-observer==3.1.0'" in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(GOOD)), json_values)
def test_any_field_may_be_anything(field, value):
    """GIVEN a dump with one field replaced by any JSON, THEN it loads or is refused in words; nothing else happens."""
    try:
        report = loads(json.dumps({**GOOD, field: value}))
    except UnreadableDump:
        return
    assert isinstance(report, Report)
    report.summary()
    _codec.dumps(report)


def test_missing_files_and_folders(tmp_path):
    """A path that is not there, a folder without dumps, a folder as a dump."""
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(UnreadableDump, match=r"a dump \(<directory>"):
            nobs.load(path)


def test_a_folder_means_its_newest_dump(tmp_path):
    """Of the newest failure, the lowest rank."""
    import os

    for i, part in enumerate(("a/step1/rank00000", "a/step2/rank00001", "a/step2/rank00000")):
        path = _codec.save(example(), tmp_path / f"{part}.json")
        os.utime(path, (i, i if i < 2 else 1))
    assert find(tmp_path).relative_to(tmp_path).as_posix() == "a/step2/rank00000.json"


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that fills up while writing leaves neither half a dump nor a draft."""
    from pathlib import Path

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def write(self, content):
            raise OSError(28, "No space left on device")

    def full(self, mode):
        self.touch(exist_ok=False)
        return Full()

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space"):
        _codec.save(example(), tmp_path / "rank00000.json")
    assert list(tmp_path.iterdir()) == []


def test_history_look_ups():
    """A layer, site or statistic that is not there is named with what is."""
    history = example().history
    assert history["fc", "output", "rms"].tolist() == [0.75, 1.25]
    for key, says in [
        (("fd", "output", "norm"), "'fc'"),
        (("fc", "weight", "norm"), r"the sites \['output'\]"),
        (("fc", "output", "median"), "absmax"),
        ("fc", "a layer, a site and a statistic"),
        (("fc", "output"), "a layer, a site and a statistic"),
    ]:
        with pytest.raises(nobs.NobsError, match=says):
            history[key]
