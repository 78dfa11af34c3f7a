"""`nobs show` and `nobs plot`: stdout carries the answer, stderr the rest, and the exit code says which."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from samples import story_report

from nobs import _codec, cli


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
