"""`nobs show` and `nobs plot`: stdout carries the answer, stderr the rest, and the exit code says which."""

import json
import subprocess
import sys

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
    """A PNG beside the dump or where -o says; an existing file only with --force."""
    assert cli.main(["plot", str(dump)]) == 0
    assert capsys.readouterr().out.strip() == str(dump.with_suffix(".png"))
    assert cli.main(["plot", str(dump)]) == 2
    assert "add --force" in capsys.readouterr().err
    assert cli.main(["plot", str(dump), "-f"]) == 0
    assert cli.main(["plot", str(dump), "-o", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    assert cli.main(["plot", str(dump), "-o", str(tmp_path / "file" / "x.png")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_unreadable(tmp_path, capsys):
    """Exit code 2, an explanation on stderr, nothing on stdout."""
    assert cli.main(["show", str(tmp_path / "nothing")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "type:" in err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["show"], ["show", "a", "--unknown"]])
def test_wrong_usage(arguments, capsys):
    """Exit code 2 and the usage."""
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "usage: nobs" in capsys.readouterr().err


def test_as_a_module_into_a_closed_pipe(dump):
    """`python -m nobs show dump | head -1` ends without a traceback."""
    command = f"{sys.executable} -m nobs show --json {dump} | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith('{"format"')
    assert done.stderr == ""
