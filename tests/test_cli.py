"""The commands: stdout carries the answer, stderr the rest, and the exit code says which."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from boxes import box_of
from samples import story_report

from nobs import _codec, cli, load
from nobs._blackbox import this_process


@pytest.fixture
def dump(tmp_path):
    return _codec.save(story_report(), tmp_path / "run" / "step00000349" / "rank00000.json")


def test_show(dump, capsys):
    """The report of a file, or of the newest dump in a folder."""
    for path in (dump, dump.parent.parent):
        assert cli.main(["show", str(path)]) == 0
        out, err = capsys.readouterr()
        assert "loss is NaN at step 349" in out
        assert err == ""


def test_show_json(dump, capsys):
    """Only JSON on stdout, the same that lies in the file."""
    assert cli.main(["show", "--json", str(dump)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(dump.read_text())


def test_plot(dump, tmp_path, capsys):
    """A PNG beside the dump, drawn anew, or where -o says; there an existing file only with --force."""
    for _ in range(2):
        assert cli.main(["plot", str(dump)]) == 0
        assert capsys.readouterr().out.strip() == str(dump.with_suffix(".png"))
    assert cli.main(["plot", str(dump), "-o", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plot", str(dump), "-o", str(tmp_path / "x.png")]) == 2
    assert "add --force" in capsys.readouterr().err
    assert cli.main(["plot", str(dump), "-o", str(tmp_path / "x.png"), "-f"]) == 0
    capsys.readouterr()
    assert cli.main(["plot", str(dump), "-o", str(tmp_path / "x.svg")]) == 2
    assert "-o x.svg.png" in capsys.readouterr().err
    odd = dump.rename(dump.with_name("odd.png"))
    assert cli.main(["plot", str(odd)]) == 2  # a dump is never written over by its picture
    assert "which is what is read" in capsys.readouterr().err
    odd.rename(dump)
    assert cli.main(["plot", str(dump), "-o", "nul\0.png"]) == 2
    assert cli.main(["plot", str(dump), "-o", ".", "-f"]) == 2
    assert cli.main(["plot", str(dump), "-o", "a" * 300 + ".png"]) == 2
    assert "cannot write" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["plot", str(dump), "-o", str(tmp_path / "file" / "x.png")]) == 2
    assert "cannot write" in capsys.readouterr().err


def healthy():
    """A report in which nothing is wrong, but for a gradient that climbs."""
    report = story_report()
    history = report.history
    values = np.where(history.values == 17, 0, history.values)
    scalars = {name: np.ones(len(history)) for name in history.scalars}
    return replace(report, failure=None, findings=(), history=replace(history, values=values, scalars=scalars))


def test_the_newest_by_default(dump, tmp_path, monkeypatch, capsys):
    """Without a path: the newest below ./crashes, be it a dump or a black box."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["show"]) == 2
    assert "./crashes if it was told no other" in capsys.readouterr().err
    (tmp_path / "run").rename(tmp_path / "crashes")
    assert cli.main(["check"]) == 1
    assert "loss is NaN at step 349" in capsys.readouterr().out
    later = replace(healthy().history, times_s=np.arange(50) + 4e9)
    box = box_of(replace(healthy(), history=later), tmp_path / "crashes" / "later", state="ended")
    assert cli.main(["check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(box.relative_to(tmp_path))
    assert cli.main(["show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reason"] == "ended"


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (["blocks.3.attention.up"], [3]),
        (["blocks.3"], [3]),  # a block
        (["blocks.4.at"], [4]),  # as much as no other begins with
        (["*.[12].*"], [1, 2]),
        (["blocks.2", "blocks.0"], [0, 2]),
    ],
)
def test_show_a_layer(typed, shown, dump, capsys):
    """All sites of the layers that were typed, in execution order, and nothing of the others."""
    arguments = [word for name in typed for word in ("--layer", name)]
    names = [f"blocks.{i}.attention.up" for i in shown]
    assert cli.main(["show", str(dump), *arguments]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("blocks")] == names
    assert out.count("weight.grad") == len(shown)
    assert cli.main(["show", str(dump), *arguments, "--json"]) == 0
    assert [layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"]] == names


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("bloks.3.attention.up", "did you mean blocks.3.attention.up"),
        ("blocks", None),
        ("b", "6 layers that begin so"),
        ("blocks.3.x", "no such layer"),
    ],
)
def test_did_you_mean(typed, says, dump, capsys):
    """A name that fits no layer, or begins several, is answered with those that were meant."""
    assert cli.main(["show", str(dump), "--layer", typed]) == (2 if says else 0)
    assert (says or "") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        ({"state": "ended"}, 0, "fine: the run ended; steps 300 to 349"),
        ({"state": "running"}, 1, "failed: the process died without a word"),
        ({"state": "sigterm"}, 1, "failed: stopped by SIGTERM"),
        ({"state": "exception", "exception": "OutOfMemoryError: 80 GiB"}, 1, "failed: OutOfMemoryError: 80 GiB"),
        ({"state": "failed", "failures": (story_report().failure,)}, 1, "failed: loss is NaN at step 349"),
    ],
)
def test_check(status, code, says, tmp_path, capsys):
    """Exit code 1 for what a trigger saw, an exception, or a death; a line that says so."""
    box_of(healthy(), tmp_path, triggers=(("NonFinite", {}),), **status)
    assert cli.main(["check", str(tmp_path)]) == code
    assert capsys.readouterr().out.startswith(says)
    assert cli.main(["check", str(tmp_path), "--json"]) == code
    assert json.loads(capsys.readouterr().out)["failed"] == bool(code)


def test_check_of_many(tmp_path, capsys):
    """No rank that failed is hidden behind one that ended later; several paths may be asked about at once."""
    failure = story_report().failure
    later = replace(healthy(), history=replace(healthy().history, times_s=np.arange(50) + 4e9))
    box_of(later, tmp_path / "run", rank=0, state="ended")
    failed = box_of(story_report(), tmp_path / "run", rank=1, state="failed", failures=(failure,))
    box_of(later, tmp_path / "other", rank=0, state="ended")
    assert cli.main(["check", str(tmp_path / "run")]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("failed: loss is NaN")
    assert out[1:] == ["1 of 2 failed"]
    assert cli.main(["check", str(tmp_path / "other"), str(failed), "--json"]) == 1
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["path"], verdict["failed"], len(verdict["checked"])) == (str(failed), True, 2)
    assert cli.main(["check", str(tmp_path / "other")]) == 0
    with pytest.raises(SystemExit):
        cli.main(["check", ""])
    assert "an empty path" in capsys.readouterr().err


def test_recover_of_a_run_that_goes_on(tmp_path, capsys):
    """Shown, and not written: what stands of it now would hide what becomes of it."""
    box_of(healthy(), tmp_path / "run", process=this_process(), triggers=(("NonFinite", {}),))
    assert cli.main(["recover", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "the run goes on" in out
    assert "nothing was written" in err
    assert list((tmp_path / "run").glob("step*")) == []


def test_recover(tmp_path, capsys):
    """A black box without a dump: diagnosed, written, drawn and printed; once."""
    failure = story_report().failure
    box = box_of(story_report(), tmp_path / "run", state="failed", failures=(failure,))
    assert cli.main(["recover", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    dump = tmp_path / "run" / "step00000349" / "rank00000.json"
    assert "loss is NaN at step 349" in out
    assert str(dump) in out.replace("\n", "").replace(" ", "")
    assert err == ""
    assert dump.with_suffix(".png").exists()
    report = load(dump)
    assert report.failure == failure
    assert report.findings[0].layer == "blocks.3.attention.up"
    assert report.findings == load(box).findings
    assert cli.main(["recover", str(box), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(dump.read_text())
    assert "is there already" in err
    assert cli.main(["recover", str(box), "--force"]) == 0
    assert (tmp_path / "run" / "step00000349-2" / "rank00000.json").exists()
    assert cli.main(["recover", str(dump.parent)]) == 2
    assert "a folder without black boxes" in capsys.readouterr().err
    assert cli.main(["recover", str(dump)]) == 2  # a dump is a report
    assert "no black box" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help(command, capsys):
    """Each command says what it does, shows examples, and prints JSON if asked."""
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert f"nobs {command}" in out.partition("examples:")[2]
    assert "--json" in out


@pytest.mark.parametrize("name", ["nothing", "a" * 300, "a\0b"])
def test_unreadable(name, tmp_path, capsys):
    """Exit code 2, an explanation on stderr, nothing on stdout."""
    assert cli.main(["show", f"{tmp_path}/{name}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "type:" in err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["show", "a", "b"], ["show", "a", "--unknown"]])
def test_wrong_usage(arguments, capsys):
    """Exit code 2 and the usage."""
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "usage: nobs" in capsys.readouterr().err


def test_a_folder_with_a_dangling_link(dump, capsys):
    """What is no file is no dump."""
    dump.with_name("rank00001.json").symlink_to(dump.parent / "gone")
    assert cli.main(["show", str(dump.parent)]) == 0


def shell(command, dump):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        f"set -o pipefail; nobs() {{ {sys.executable} -m nobs $*; }}; {command}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**environment, "DUMP": str(dump)},
    )


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")
@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("nobs show --json $DUMP | head -c 10", 0, ""),
        ("nobs show --json $DUMP | true", 0, ""),
        ("nobs --help | true", 0, ""),
        ("nobs show $DUMP > /dev/full", 2, "cannot write to stdout: No space left"),
        ("nobs show --json $DUMP > /dev/full", 2, "cannot write to stdout: No space left"),
        ("nobs show $DUMP >&-", 0, ""),
        ("PYTHONIOENCODING=ascii nobs show $DUMP", 0, ""),
    ],
)
def test_an_unhelpful_stdout(command, code, says, tmp_path):
    """A closed pipe, a full disk, no stdout at all, ASCII only: an exit code, at most one line, never a traceback."""
    dump = _codec.save(story_report(name="名.{}"), tmp_path / "rank00000.json")
    done = shell(command, dump)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert (says in done.stderr) if says else done.stderr == ""


class Full(io.StringIO):
    """A stdout that somebody has put in, without a descriptor and without room."""

    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("stdout", "code"), [(Full, 2), (io.StringIO, 0)])
def test_another_stdout(stdout, code, dump, monkeypatch, capsys):
    """One that is full, and one that is closed."""
    monkeypatch.setattr(sys, "stdout", stdout())
    if code == 0:
        sys.stdout.close()
    assert cli.main(["show", str(dump)]) == code
    assert ("No space left" in capsys.readouterr().err) == (code == 2)


def test_numbers_that_no_axis_can_hold(tmp_path):
    """A loss at the end of float64 costs its point in the picture, not the picture."""
    report = story_report()
    scalars = {name: np.where(np.arange(50) % 2, 1.7e308, -1.7e308) for name in ("loss", "lr")}
    huge = replace(report, history=replace(report.history, scalars=scalars))
    assert cli.main(["plot", str(_codec.save(huge, tmp_path / "rank00000.json"))]) == 0
