"""`nobs export`: each format read back by its own reader and compared with the history, number by number."""

import csv
import io
import json
import math
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import loss_of
from samples import story_report
from strategies import reports

import nobs
from nobs import _codec, cli
from nobs._columns import COLUMNS, DTYPES, ELEMENTS, FIRST
from nobs._history import History, bad_counts
from nobs._table import Tap, TapTable
from nobs.export import FORMATS
from nobs.export._csv import HEAD
from nobs.export._tracks import distinct, moments_s

NUMBERS = HEAD[HEAD.index("norm") : HEAD.index("dtype")]
ODD = "=1+1\n\x1b[2J,\"'\0\ud800"


def timed(report, times_s=None):
    """The report with a clock, half a second a step."""
    times_s = 1.79e9 + np.arange(len(report.history)) / 2 if times_s is None else np.array(times_s, dtype=np.float64)
    return replace(report, history=replace(report.history, times_s=times_s))


def odd_report(names=(ODD, "fc/weight", "-loss")):
    """A few steps under names that no format was made for, two series of which share a path, with all kinds of numbers."""
    taps = tuple(Tap(name, name, site, "output") for name in names for site in ("output", "weight"))
    values = np.ones((3, len(taps), 8), dtype=np.float32)
    values[..., FIRST] += 1 / 16
    values[0, :, :2], values[1, :, :2] = [math.nan, math.inf], [1e-45, -0.0]
    values[1, ::2, 2:5] = 1, 2, 4
    values[2, 0, FIRST] = math.inf
    scalars = {"fc/weight/output": np.array([math.nan, math.inf, 1e308]), "fc/weight/output/norm": np.array([0.1, -math.inf, 0])}
    there = dict.fromkeys(scalars, np.array([True, True, True]))
    return timed(
        replace(story_report(), history=History(np.array([7, 8, 9]), TapTable(taps), values, scalars, there, ("", "a", None)))
    )


def save(report, folder):
    return _codec.save(report, folder / "run" / "step00000349" / "rank00000.json")


@pytest.fixture
def dump(tmp_path):
    return save(timed(story_report()), tmp_path)


def same(text, value):
    """Whether digits give a number back, NaN and infinity included."""
    return np.array(float(text), dtype=value.dtype).tobytes() == value.tobytes() or (math.isnan(float(text)) and np.isnan(value))


# csv


def cell(name):
    """A name as the table has it."""
    name = "".join("\\x00" if c == "\0" else f"\\u{ord(c):04x}" if 0xD800 <= ord(c) < 0xE000 else c for c in name)
    return "'" + name if name[:1] in ("=", "+", "-", "@", "\t", "\r") and name else name


def check_csv(report):
    """Every row of the table, in its place, equals the history; and there is no other."""
    history = report.history
    head, *rows = csv.reader(io.StringIO(FORMATS["csv"].content(report).decode(), newline=""), strict=True)
    assert tuple(head) == HEAD
    rows = [dict(zip(HEAD, row, strict=True)) for row in rows]
    left = iter(rows)
    for t, step in enumerate(history.steps):
        for name, values in history.scalars.items():
            if history.given[name][t]:
                row = next(left)
                assert (row["step"], row["site"], row["layer"]) == (str(step), cell(name), "")
                assert same(row["value"], values[t])
                assert not any(row[column] for column in ("type", "order", "dtype", *NUMBERS))
        for layer in history.layers:
            for line, tap in enumerate(history.table.taps):
                if tap.layer == layer.name and np.isfinite(history.values[t, line, FIRST]):
                    row = next(left)
                    order = "" if layer.order is None else str(layer.order)
                    wanted = (str(step), cell(tap.layer), cell(tap.layer_type), order, cell(tap.site), "")
                    assert tuple(row[name] for name in ("step", "layer", "type", "order", "site", "value")) == wanted
                    assert row["dtype"] == DTYPES[round(history.values[t, line, FIRST] % 1 * 16)]
                    for name in NUMBERS:
                        exact = history[tap.layer, tap.site, name][t]
                        assert same(row[name], exact if name == "nonfinite" else np.float32(exact)), name
    assert next(left, None) is None
    return rows


@given(reports)
def test_csv_is_exact(report):
    """Any history, under any names: each site that ran and each scalar that was given, digit for digit."""
    check_csv(report)


def test_csv_of_a_story():
    """What a table of a run looks like: counts without a point, times, `NaN` and `inf`, all on lines of their own."""
    rows = check_csv(timed(story_report()))
    assert len(rows) == 50 * (2 + 24)
    assert rows[0]["time_s"] == "1790000000.0"
    bad = next(row for row in rows if row["nan"] == "17")
    assert (bad["layer"], bad["site"], bad["nonfinite"], bad["elements"]) == (
        "blocks.3.attention.up",
        "weight.grad",
        "17",
        "4096",
    )
    assert rows[-26]["value"] == "NaN"
    assert [row["layer"][7] for row in rows[2:26:4]] == list("012345")
    assert check_csv(story_report())[0]["time_s"] == ""
    text = FORMATS["csv"].content(odd_report()).decode()
    assert "\r\n7,1790000000.0,,,,fc/weight/output,NaN," in text
    assert "\r\n8,1790000000.5,,,,fc/weight/output,inf," in text
    check_csv(odd_report())


def test_csv_holds_no_formula_and_no_nul():
    """A stranger's name is text in a spreadsheet, and bytes that no reader takes are escaped; line breaks are quoted."""
    content = FORMATS["csv"].content(odd_report())
    assert b"\0" not in content
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    assert {row["layer"] for row in rows} == {"", "'=1+1\n\x1b[2J,\"'\\x00\\ud800", "fc/weight", "'-loss"}


# npz


def text_array(texts):
    """Text as NumPy can hold it."""
    return [text.rstrip("\0") + "\\x00" * (len(text) - len(text.rstrip("\0"))) for text in texts]


def check_npz(report):
    """Every array, bit for bit, and the facts."""
    history, taps = report.history, report.history.table.taps
    with np.load(io.BytesIO(FORMATS["npz"].content(report)), allow_pickle=False) as file:
        data = dict(file)
    for name, dtype in (("steps", "int64"), ("times_s", "float64"), ("values", "float32")):
        assert data[name].dtype == dtype
        assert data[name].shape == getattr(history, name).shape
        assert data[name].tobytes() == getattr(history, name).tobytes()
    assert data["columns"].tolist() == list(COLUMNS)
    for name, attribute in (("layers", "layer"), ("types", "layer_type"), ("sites", "site"), ("kinds", "kind")):
        assert data[name].tolist() == text_array(getattr(tap, attribute) for tap in taps)
    assert data["scalar_names"].tolist() == text_array(history.scalars)
    assert data["scalars"].shape == data["given"].shape == (len(history), len(history.scalars))
    for i, name in enumerate(history.scalars):
        assert data["scalars"][:, i].tobytes() == history.scalars[name].tobytes()
        assert data["given"][:, i].tolist() == history.given[name].tolist()
    assert data["batches"].tolist() == (text_array(batch or "" for batch in history.batches) or [""] * len(history))
    whole = json.loads(_codec.dumps(report))
    assert json.loads(str(data["meta"])) == {
        name: whole[name]
        for name in ("nobs_version", "created", "reason", "exception", "rank", "world_size", "run", "failure", "findings")
    }


@given(reports)
def test_npz_is_exact(report):
    """Any history and report, bit for bit, without pickle."""
    check_npz(report)


def test_npz_of_odd_names_and_of_nothing():
    """Lone surrogates, NUL in the middle and at the end, batches; no taps, no steps."""
    check_npz(odd_report((ODD, "a\0b\0\0", "")))
    check_npz(replace(story_report(), history=History(np.empty(0, np.int64), TapTable(()), np.empty((0, 0, 8), np.float32))))


# trace


def check_trace(report):
    """Strict JSON that keeps the rules of the format, and whose counters are the history; the events by phase."""

    def refuse(word):
        raise AssertionError(word)

    trace = json.loads(FORMATS["trace"].content(report), parse_constant=refuse)
    assert trace["displayTimeUnit"] == "ms"
    phases = {"M": [], "X": [], "C": [], "i": []}
    for event in trace["traceEvents"]:
        phases[event["ph"]].append(event)
        assert isinstance(event["name"], str)
        assert event["pid"] == report.rank
        assert event["ts"] >= 0
    assert [event["name"] for event in trace["traceEvents"][:2]] == ["process_name", "thread_name"]
    assert len(phases["M"]) == 2
    times = [event["ts"] for event in trace["traceEvents"]]
    assert times == sorted(times)
    history = report.history
    assert [event["name"] for event in phases["X"]] == [f"step {step}" for step in history.steps]
    assert all(event["dur"] >= 0 for event in phases["X"])
    assert all(event["s"] == "p" for event in phases["i"])
    counted = [value for event in phases["C"] for value in event["args"].values()]
    assert counted == [value for value in numbers(history) if math.isfinite(value)]
    wrong = sum(event["name"].startswith("not finite") for event in phases["i"])
    lines = np.isfinite(history.values[..., FIRST]) & (history.values[..., ELEMENTS] > 0)
    norms = np.stack([history[tap.layer, tap.site, "norm"] for tap in history.table.taps], axis=1)
    sites = (bad_counts(history.values, history.table) > 0) | (lines & ~np.isfinite(norms))
    scalars = sum((there & ~np.isfinite(history.scalars[name])).sum() for name, there in history.given.items())
    assert wrong == sites.sum() + scalars
    assert len(phases["i"]) == wrong + len(report.findings) + (report.failure is not None) + 1
    return phases


def numbers(history):
    """Scalars, then norms, step by step."""
    for t in range(len(history)):
        yield from (values[t] for values in history.scalars.values())
        yield from (history[tap.layer, tap.site, "norm"][t] for tap in history.table.taps)


@given(reports, st.booleans())
def test_trace_keeps_the_rules(report, with_clock):
    """Any report: strict JSON, events in order, every finite number a counter, every other an instant."""
    check_trace(timed(report) if with_clock else report)


def test_trace_of_a_story():
    """Steps of half a second on a thread of their own; the failure at its step, with all that is known of it."""
    phases = check_trace(timed(story_report()))
    assert phases["M"][0]["args"] == {"name": "nobs rank 0"}
    assert {event["dur"] for event in phases["X"]} == {500_000}
    assert phases["X"][1]["ts"] == 500_000
    failure = next(event for event in phases["i"] if event["name"] == "failure: NonFinite")
    assert failure["ts"] == 49 * 500_000
    assert failure["args"]["value"] == "NaN"
    assert next(event["ts"] for event in phases["i"] if event["name"] == "finding: gradient_explosion") == 35 * 500_000
    loss, bad = (event for event in phases["i"] if event["name"].startswith("not finite"))
    assert loss["args"] == {"step": 349, "value": "NaN"}
    assert bad["name"] == "not finite: blocks.3.attention.up/weight.grad"
    assert bad["args"] == {"step": 349, "norm": 0, "nan": 17, "posinf": 0, "neginf": 0}
    assert phases["i"][-1]["name"] == "end: trigger"
    check_trace(odd_report())


def test_a_trace_without_a_step_in_the_window():
    """A failure that the window does not hold stands at the end; a report without steps has it too."""
    report = timed(story_report())
    late = replace(report, failure=replace(report.failure, step=1), exception="ValueError: x", findings=())
    assert check_trace(late)["i"][-2]["ts"] == 49 * 500_000
    none = replace(late, history=replace(report.history.only([]), **empty(report.history)))
    trace = json.loads(FORMATS["trace"].content(none))
    assert [event["name"] for event in trace["traceEvents"][2:]] == ["failure: NonFinite", "end: trigger"]
    assert trace["otherData"]["exception"] == "ValueError: x"


def empty(history):
    """The fields of a history without steps."""
    return {
        "steps": history.steps[:0],
        "values": np.empty((0, 0, 8), np.float32),
        "times_s": history.times_s[:0],
        "scalars": {name: values[:0] for name, values in history.scalars.items()},
        "given": {name: values[:0] for name, values in history.given.items()},
    }


@pytest.mark.parametrize(
    ("times_s", "expected"),
    [
        ([5.0, 7.0, 6.0], [5.0, 7.0, 7.0]),
        ([5.0, math.nan, 6.0], [0, 0.001, 0.002]),
        ([0.0, 1.7e308, 1.0], [0, 0.001, 0.002]),
        ([], []),
    ],
)
def test_moments(times_s, expected):
    """A clock that was set back stands still; times that are not known, or none, make way for a millisecond a step."""
    steps = len(expected)
    history = History(np.arange(steps), TapTable(()), np.empty((steps, 0, 8), np.float32), times_s=np.array(times_s))
    assert moments_s(history).tolist() == expected


def test_distinct():
    """No two series share a name, and every name is legal in UTF-8."""
    assert distinct(["a", "a", "a (2)", "a", "\ud800", "\\ud800"]) == [
        "a",
        "a (2)",
        "a (2) (2)",
        "a (3)",
        "\\ud800",
        "\\ud800 (2)",
    ]


# tensorboard


def read_events(folder):
    """What TensorBoard itself reads from a folder: scalars by tag, as (step, time, value), and the text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.wall_time, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, events.Tensors("nobs/report")[0].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("report", [timed(story_report()), odd_report()], ids=["story", "odd"])
def test_tensorboard_is_exact(report, tmp_path):
    """Every scalar and every statistic of every site, at its step and time, NaN and Inf among them, and what failed."""
    out = tmp_path / "deep" / "events"
    assert cli.main(["export", str(save(report, tmp_path)), "-f", "tensorboard", "-o", str(out)]) == 0
    assert [file.name for file in out.iterdir()] == ["events.out.tfevents.0.nobs"]
    found, text = read_events(out)
    history = nobs.load(tmp_path).history  # in JSON a NUL or a surrogate is a name like any other
    wanted = {f"nobs/{name}": (values, history.given[name]) for name, values in history.scalars.items()}
    for tap in history.table.taps:
        for name in ("norm", "absmax", "nonfinite"):
            values = history[tap.layer, tap.site, name]
            tag = f"nobs/{tap.layer}/{tap.site}/{name}".replace("\ud800", "\\ud800")
            ran = np.isfinite(history.values[:, history.table.line(tap.layer, tap.site), FIRST])
            wanted[f"{tag} (2)" if tag in wanted else tag] = values, ran
    assert set(found) == set(wanted)
    for tag, (values, there) in wanted.items():
        with np.errstate(over="ignore"):
            exact = zip(history.steps[there], history.times_s[there], values[there].astype(np.float32), strict=True)
        assert [(s, t, struct.pack("f", v)) for s, t, v in found[tag]] == [(s, t, struct.pack("f", v)) for s, t, v in exact], tag
    assert text.startswith(f"    {report.failure.message} (cause: gradient_explosion in blocks.3.attention.up)\n    gradient_exp")


def test_tensorboard_again_replaces(dump, tmp_path, capsys):
    """Beside the dump it is written anew, in one file; an -o that exists is not touched, but for --force."""
    for _ in range(2):
        assert cli.main(["export", str(dump), "-f", "tensorboard", "-l", "blocks.1"]) == 0
    folder = dump.with_suffix(".tensorboard")
    assert capsys.readouterr().out.splitlines() == [str(folder)] * 2
    assert len(list(folder.iterdir())) == 1
    assert len(read_events(folder)[0]) == 2 + 4 * 3
    again = ["export", str(dump), "-f", "tensorboard", "-o", str(folder)]
    assert cli.main(again) == 2
    assert "add --force" in capsys.readouterr().err
    assert cli.main([*again, "--force"]) == 0


def test_without_tensorboard(dump, monkeypatch, capsys):
    """Where the package is not there, an error says what to install, and nothing is written."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    assert cli.main(["export", str(dump), "-f", "tensorboard"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "pip install 'neural-observer[tensorboard]'" in err
    assert not dump.with_suffix(".tensorboard").exists()
    assert cli.main(["export", str(dump)]) == 0


# the command


@pytest.mark.parametrize("form", FORMATS)
def test_export(form, dump, capsys):
    """A file beside the dump, whole, its path on stdout; of a folder the newest; and the folder shows what it showed."""
    arguments = ["export", str(dump.parent.parent), "-f", form]
    out = dump.with_suffix(FORMATS[form].suffix)
    for _ in range(2):
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out == f"{out}\n"
    content = FORMATS[form].file(out).read_bytes()
    assert content == FORMATS[form].content(nobs.load(dump))
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"format": form, "path": str(out), "steps": 50, "bytes": len(content)}
    assert {file.name for file in dump.parent.iterdir()} == {dump.name, out.name}
    assert cli.main(["check", str(dump.parent)]) == 1
    assert str(dump) in capsys.readouterr().out


@pytest.mark.parametrize("form", ["csv", "trace"])
def test_to_stdout(form, dump, capsys):
    """`-o -`: the text and nothing else, of the layers that were asked for; csv is what there is without -f."""
    arguments = ["export", str(dump), "-o", "-", *(["-f", form] if form != "csv" else [])]
    assert cli.main(arguments) == 0
    assert capsys.readouterr() == (FORMATS[form].content(nobs.load(dump)).decode(), "")
    assert cli.main([*arguments, "-l", "blocks.1.attention.up", "-l", "blocks.2*"]) == 0
    out = capsys.readouterr().out
    assert "blocks.1" in out
    assert "blocks.2" in out
    assert "blocks.3.attention.up/" not in out
    assert ",blocks.3" not in out
    assert list(dump.parent.iterdir()) == [dump]


class Terminal(io.StringIO):
    """A stdout with somebody in front of it."""

    def isatty(self):
        return True


def test_to_a_terminal(tmp_path, monkeypatch):
    """There a name moves no cursor and forges no line end."""
    dump = save(odd_report((ODD, "a\rb")), tmp_path)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.main(["export", str(dump), "-o", "-"]) == 0
    shown = sys.stdout.getvalue()
    assert "\\x1b[2J" in shown
    assert shown.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-f", "npz", "-o", "-"], "-o - for npz"),
        (["-f", "tensorboard", "-o", "-"], "-o - for tensorboard"),
        (["--json", "-o", "-"], "-o - together with --json"),
        (["-l", "blocks.3.attention.upp"], "did you mean blocks.3.attention.up"),
        (["-o", "there.csv"], "add --force"),
        (["-o", "there.csv/x.csv"], "cannot write"),
        (["-f", "tensorboard", "-o", "there.csv", "--force"], "cannot write"),
        (["-o", ".", "--force"], "cannot write"),
        (["-o", "nul\0.csv"], "cannot write"),
        (["-o", "a" * 300], "cannot write"),
    ],
)
def test_refused(arguments, says, dump, tmp_path, capsys):
    """Exit code 2 and what to type, nothing on stdout, and no file is touched or left behind."""
    (tmp_path / "there.csv").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["export", str(dump), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert "type:" in err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_force_and_the_source(dump, tmp_path, capsys):
    """--force writes over a file, `-f` does not mean it; a dump is never written over by its own export."""
    (tmp_path / "there.csv").write_text("mine")
    assert cli.main(["export", str(dump), "-o", "there.csv", "--force"]) == 0
    assert (tmp_path / "there.csv").read_text().startswith("step,")
    odd = dump.rename(dump.with_name("odd.csv"))
    assert cli.main(["export", str(odd)]) == 2
    assert "which is what is read" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["xml", "", "CSV"])
def test_unknown_format(form, dump, capsys):
    """Exit code 2, and the formats that there are."""
    with pytest.raises(SystemExit) as left:
        cli.main(["export", str(dump), "-f", form])
    assert left.value.code == 2
    assert "tensorboard" in capsys.readouterr().err


def test_export_without_torch(dump):
    """All formats with torch and TensorFlow blocked: a dump leaves a laptop as it came."""
    code = """
import sys
sys.modules["torch"] = sys.modules["tensorflow"] = None
from nobs import cli
from nobs.export import FORMATS
assert not {"tensorboard", "rich", "matplotlib"} & set(sys.modules)
sys.exit(sum(cli.main(["export", sys.argv[1], "-f", form]) for form in FORMATS))
"""
    done = subprocess.run([sys.executable, "-c", code, str(dump)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(dump.with_suffix(form.suffix)) for form in FORMATS.values()]


def test_a_black_box(model, tmp_path, capsys):
    """What a run leaves is exported bit for bit, its times and batches included, beside the box."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with nobs.Recorder(model, optimizer=optimizer, directory=tmp_path / "runs") as recorder:
        for step in range(3):
            loss = loss_of(model, model.batch())
            loss.backward()
            optimizer.step()
            recorder.step(loss, batch=f"file{step}")
    assert cli.main(["export", str(tmp_path / "runs"), "-f", "npz"]) == 0
    (box,) = (tmp_path / "runs").rglob("*.blackbox")
    assert capsys.readouterr().out == f"{box.with_suffix('.npz')}\n"
    report = nobs.load(box)
    with np.load(box.with_suffix(".npz")) as data:
        assert data["values"].tobytes() == report.history.values.tobytes()
        assert data["batches"].tolist() == ["file0", "file1", "file2"]
        assert np.isfinite(data["times_s"]).all()
    check_csv(report)
    check_trace(report)
