"""`nobs watch`: frames of any size, keys, a run followed from another process in a terminal, in a pipe, and as JSON."""

import codecs
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from samples import story_report

from nobs import cli
from nobs._blackbox import BlackBox, Header, this_process
from nobs._history import Row
from nobs._schema import Failure
from nobs.cli import _follow, watch
from nobs.cli._follow import Follower
from nobs.cli._keys import Keyboard, names_of
from nobs.errors import UnreadableDump
from nobs.render._glyphs import that_fit
from nobs.render._scene import Norms, Scene
from nobs.render.live import View, frame, page_of, press

ROOT = Path(__file__).parent.parent
UNICODE, ASCII = that_fit("utf-8"), that_fit("ascii")
SPIKE = Failure("GradientNorm", 339, "gradient norm of blocks.3.attention.up at step 339: 4.2e+03", "blocks.3.attention.up")
DEAD = replace(this_process(), started="1")


def rows_of(report):
    """The rows of a report, a tenth of a second each, the last one now."""
    history = report.history
    begun_s = time.time() - 0.1 * len(history)
    for i, step in enumerate(history.steps.tolist()):
        scalars = {name: float(values[i]) for name, values in history.scalars.items()}
        yield Row(step, begun_s + 0.1 * i, scalars, history.table, history.values[i])


KEPT = []


@pytest.fixture(autouse=True)
def _keep_recorders():
    """A recorder that is gone has ended its run: here, with the test."""
    yield
    KEPT.clear()


def black_box(folder, report=None, process=None, rows=None, **news):
    """A black box of a run of this process, or another one's; its writer."""
    report = report or story_report()
    facts = {"device": "cpu", "compiled": True, "torch": "2.13.0"}
    header = Header("0.1.0", "now", 0, 1, facts, 100, report.history.table, (), process or this_process())
    box = BlackBox([Path(folder) / "run"], lambda: header)
    KEPT.append(box)
    for row in list(rows_of(report))[:rows]:
        box.write(row)
    if news:
        box.tell(**news)
    return box


def scene_of(tmp_path, report=None, **news):
    with closing(Follower(black_box(tmp_path, report, **news).path)) as follower:
        return follower.scene()


@pytest.fixture
def followed():
    """Followers of black boxes, closed at the end."""
    with ExitStack() as stack:
        yield lambda box: stack.enter_context(closing(Follower(box.path)))


# -- frames --------------------------------------------------------------------------------------------------------

ODD_NAMES = [
    "blocks.{}.attention.up",
    "層.{}.注意力機構の出力",
    "[bold red]{}[/] [link=x]",
    "evil\x1b[2J\n\u202e{}",
    "a" * 300 + ".{}",
]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("glyphs", [UNICODE, ASCII], ids=["unicode", "ascii"])
@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 24), (120, 40), (200, 60), (57, 17), (9, 4), (1, 1)])
def test_a_frame_fits(width, height, glyphs, name, tmp_path):
    """As many lines as the screen has, none wider, whatever layers are called; nothing in a name moves the cursor."""
    scene = scene_of(tmp_path, story_report(layers=40, name=name), failures=(SPIKE,), exception="ValueError: " + name * 9)
    for view in (View(), View("rise", "gradient", 7, True), View("name", top=1000)):
        lines = frame(scene, view, width, height, glyphs)
        assert len(lines) == height
        assert max(line.cell_len for line in lines) <= width
        assert all(line.plain.isprintable() for line in lines)


def plain(lines):
    return "\n".join(line.plain.rstrip() for line in lines)


def test_what_80_columns_show(tmp_path):
    """How the run stands, the loss, the triggers, the layer to look at, and where it is among the others."""
    text = plain(frame(scene_of(tmp_path, failures=(SPIKE,)), View(side="gradient"), 80, 24, UNICODE))
    assert re.search(r"^ running   step 349  10 steps/s  run$", text, re.MULTILINE)
    assert re.search(r"^ rank 0 \| pid \d+ on .* \| cpu \| compiled \| torch 2.13.0 \| nobs 0.1.0$", text, re.MULTILINE)
    assert re.search(r"^ loss +[▁▂▃▄▅▆▇█]+✕ +NaN +min 0.5$", text, re.MULTILINE)
    assert re.search(r"^ lr 0.5$", text, re.MULTILINE)
    assert re.search(r"^ triggers  GradientNorm  gradient norm of blocks.3.attention.up at step 339", text, re.MULTILINE)
    assert re.search(r"^ first bad blocks.3.attention.up  gradient NaN/Inf since step 349$", text, re.MULTILINE)
    assert re.search(r"^ gradient norms, in execution order +6 layers$", text, re.MULTILINE)
    assert re.search(r"^ layer +314 +349 +last +x usual$", text, re.MULTILINE)
    assert re.search(r"^▶blocks.3.attention.up +▄+▅*▆*▇*█+✕ +NaN/Inf$", text, re.MULTILINE)
    assert re.search(r"^ blocks.4.attention.up +▄+ +60 +1\.2x$", text, re.MULTILINE)
    assert text.index("blocks.0.") < text.index("blocks.5.")
    assert text.splitlines()[-1].split() == ["q", "quit", "arrows", "scroll", "s", "sort", "o", "outputs", "space", "pause"]
    assert "100x ✕ NaN, Inf · not run" in text.splitlines()[-2]


def test_a_healthy_run_says_so(tmp_path):
    """No trigger, and the layer that rose most is named all the same."""
    text = plain(frame(scene_of(tmp_path, rows=30), View(), 80, 24, UNICODE))
    assert " triggers  no trigger has fired" in text
    assert re.search(r" highest   blocks.\d.attention.up  (output|gradient) norm [\d.]+, 1(\.\d)?x its usual", text)


def test_nothing_yet(tmp_path, followed):
    """A black box whose first row is still to come, and one of a model without layers."""
    scene = scene_of(tmp_path, rows=1)
    none = followed(black_box(tmp_path / "b", rows=1))
    none._rows.clear()
    for shown in (scene, none.scene(), replace(none.scene(), layers=(), types=(), executed=())):
        for size in ((40, 10), (120, 40)):
            assert len(frame(shown, View(), *size, UNICODE)) == size[1]
    assert "no step yet" in plain(frame(none.scene(), View(), 80, 24, UNICODE))
    assert none.scene().worst is None


def test_colours_and_none(tmp_path):
    """A cell's colour goes with its height; without colours nothing is written but text, and ASCII has heights too."""
    scene = scene_of(tmp_path)
    row = next(line for line in frame(scene, View(side="gradient"), 120, 40, UNICODE) if "▶blocks.3" in line.plain)
    styles = {row.plain[span.start : span.end][:1]: span.style for span in row.spans}
    assert styles["▄"] == "grey35"
    assert styles["█"] == "red"
    assert styles["✕"] == "bold red"
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system="256", no_color=True)
    console.print(row)
    assert "38;5" not in out.getvalue()
    ascii_row = next(line for line in frame(scene, View(side="gradient"), 120, 40, ASCII) if ">blocks.3" in line.plain)
    assert re.search(r" =+[+*#]+@+X +NaN/Inf$", ascii_row.plain)


def test_a_layer_that_did_not_run_and_one_that_fell(tmp_path):
    """A branch not taken is a dot, what is zero is the lowest bar, and neither is the worst."""
    report = story_report()
    values = report.history.values.copy()
    values[10:, 0, 7] = np.inf  # the output of the layer that runs last
    values[20:, 4, :2] = 0
    scene = scene_of(tmp_path, replace(report, history=replace(report.history, values=values)), rows=30)
    text = plain(frame(scene, View(), 80, 24, UNICODE))
    assert re.search(r"blocks.5.attention.up +▄{10}·{20} +[\d.]+ +", text)
    assert re.search(r"blocks.4.attention.up +▄{20}▁{10} +0 +0x", text)
    assert scene.worst.since is None


def made_scene(values, bad, gradient_bad=None):
    """Layers a, b, c ... with the norms `[T, layers]` of their outputs; those of their gradients are 1."""
    count = values.shape[1]
    names, places = tuple("abcdefgh"[:count]), tuple(range(count))
    none = np.zeros_like(bad) if gradient_bad is None else gradient_bad
    sides = {"output": Norms(values, bad), "gradient": Norms(np.ones_like(values), none)}
    return Scene("", (), "running", 0, 9, np.arange(len(values)), {}, {}, None, None, (), names, names, places, sides)


def test_the_first_bad_layer_as_computation_runs():
    """Forward before backward, and backward in reverse; what came back is no longer bad."""

    def worst(forward, backward):
        bad = np.zeros((2, 4, 3), bool)
        for side, cells in zip(bad, (forward, backward), strict=True):
            for cell in cells:
                side[cell] = True
        found = made_scene(np.ones((4, 3)), *bad).worst
        return "abc"[found.layer], found.side, found.since

    assert worst([(3, 2), (3, 1)], [(3, 0)]) == ("b", "output", 3)
    assert worst([(3, 0)], [(2, 0), (2, 1), (3, 0), (3, 1)]) == ("b", "gradient", 2)
    assert worst([(1, 0)], [(3, 2)]) == ("c", "gradient", 3)


# -- keys ----------------------------------------------------------------------------------------------------------


def test_the_order_of_the_bad():
    """By rise: first what is bad the longest, then what had risen most before; what is fine comes behind."""
    values = np.ones((6, 4))
    values[4, 2], values[5, 3] = 50, 9
    bad = np.zeros((6, 4), bool)
    bad[4:, 1], bad[5, [0, 2]] = True, True
    assert made_scene(values, bad).sorted("rise", "output") == [1, 2, 0, 3]


def test_scroll(tmp_path):
    """State and key to state: never beyond the ends; until somebody scrolls, the layer that failed is there."""
    healthy = scene_of(tmp_path / "a", story_report(layers=20, name="b.{}"), rows=30)
    page = page_of(healthy, 18)
    assert page == sum("b." in line.plain for line in frame(healthy, View(), 80, 18, UNICODE)[7:]) == 8

    def pressed(view, *keys, scene=healthy, height=18):
        for key in keys:
            view = press(view, key, scene, height)
        return view.top

    steps = [("down", 1), ("j", 2), ("up", 1), ("k", 0), ("up", 0), ("page down", 8), ("page down", 12), ("home", 0), ("end", 12)]
    for i, (_, top) in enumerate(steps):
        assert pressed(View(), *(key for key, _ in steps[: i + 1])) == top
    assert pressed(View(), "G", "page up") == 4
    assert pressed(View(), "G", "g") == 0
    assert pressed(View(top=12), "down", height=100) == 0  # the screen has grown
    failing = scene_of(tmp_path / "b", story_report(layers=20, guilty=15, name="b.{}"))
    assert "▶b.15" in plain(frame(failing, View(), 80, 18, UNICODE))
    assert "▶b.15" not in plain(frame(failing, View(top=0), 80, 18, UNICODE))
    assert pressed(View(), "down", scene=failing) == 12
    assert pressed(View(), "home", scene=failing) == 0


def test_sort(tmp_path):
    """A new sort begins at its top; o and Tab turn from outputs to gradients; what has no meaning changes nothing."""
    scene = scene_of(tmp_path, story_report(layers=12, guilty=7, name="b.{}"))
    assert [press(View(sort), "s", scene, 18).sort for sort in ("execution", "rise", "name")] == ["rise", "name", "execution"]
    assert press(View(top=5), "s", scene, 18).top is None
    assert press(View(), "tab", scene, 18) == press(View(), "o", scene, 18) == View(side="gradient")
    assert press(View(), "space", scene, 18).paused
    assert press(View(), "x", scene, 18) == View()
    assert [scene.layers[i] for i in scene.sorted("name", "output")] == [f"b.{i}" for i in range(12)]
    assert scene.layers[scene.sorted("rise", "gradient")[0]] == "b.7"
    assert [scene.layers[i] for i in scene.sorted("execution", "output")] == [f"b.{i}" for i in range(12)]
    shown = plain(frame(scene, View("rise", "gradient", 3), 80, 18, UNICODE))
    assert "gradient norms, largest rise first" in shown
    assert "layers 4 to 11 of 12" in shown


def test_what_a_terminal_sends():
    """Sequences of both modes of a terminal; unknown ones and Alt with a letter are no key, least of all Escape."""
    assert names_of("\x1b[A\x1bOB\x1b[5~\x1b[6~\x1b[H\x1b[4~j \t") == [
        "up", "down", "page up", "page down", "home", "end", "j", "space", "tab",
    ]  # fmt: skip
    assert names_of("\x1b[200~\x1b[1;5C\x1bq\x1b[<0;1;2M") == []
    assert names_of("\x1b") == ["escape"]
    assert names_of("q\x1a") == ["q", "suspend"]


def test_the_keyboard_is_given_back(monkeypatch):
    """Keys come at once and whole; afterwards the terminal is as it was; a stdin that is none gives no keys."""
    ours, theirs = pty.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(theirs))
    before = termios.tcgetattr(theirs)
    with Keyboard() as keyboard:
        assert not termios.tcgetattr(theirs)[3] & (termios.ICANON | termios.ECHO)
        assert keyboard.pressed(0.01) == []
        os.write(ours, b"j\x1b[")
        threading.Timer(0.01, os.write, (ours, b"B")).start()
        assert keyboard.pressed(1.0) == ["j", "down"]
        os.write(ours, b"\x1b")
        assert keyboard.pressed(1.0) == ["escape"]
        os.close(ours)
        assert keyboard.pressed(1.0) == ["q"]
    assert before[3] & termios.ICANON
    sys.stdin.close()
    for stdin in (None, io.StringIO(), sys.stdin):
        monkeypatch.setattr(sys, "stdin", stdin)
        with Keyboard() as keyboard:
            assert keyboard.pressed(0.0) == []


# -- following -----------------------------------------------------------------------------------------------------


def test_only_what_is_new(tmp_path, followed):
    """Each look reads the fresh records; a ring that has gone round is read from what it holds."""
    report = story_report(steps=150)
    rows = list(rows_of(report))
    box = black_box(tmp_path, report, rows=130)
    follower = followed(box)
    assert follower.scene().steps[[0, -1]].tolist() == [330, 429]
    assert not follower.look()
    box.write(rows[130])
    assert follower.look()
    assert follower.scene().steps[[0, -1]].tolist() == [331, 430]
    for _ in range(2):
        for row in rows:
            box.write(row)
    assert follower.look()
    assert len(follower.scene().steps) == 100
    box.failed(SPIKE, "running")
    assert follower.look()
    assert not follower.look()
    assert follower.scene().failures == (SPIKE,)
    box.failed(replace(SPIKE, value=float("nan")), "running")
    assert [follower.look(), follower.look()] == [True, False]  # NaN is not equal to itself, and no news all the same


def test_when_a_run_is_over(tmp_path, monkeypatch, followed):
    """Not while what ended it may be caught, nor while its dump is on the way."""
    box = black_box(tmp_path)
    follower = followed(box)
    assert (follower.state, follower.over) == ("running", False)
    box.tell(state="failed")
    assert follower.look()
    assert (follower.state, follower.over) == ("failed", False)
    box.write(next(rows_of(story_report())))  # somebody caught it
    follower.look()
    assert follower.state == "running"
    box.tell(state="exception", exception="ValueError: no")
    follower.look()
    monkeypatch.setattr(_follow, "SETTLED_S", 0.0)
    assert not follower.over
    monkeypatch.setattr(_follow, "DUMP_S", 0.0)
    assert follower.over
    monkeypatch.setattr(_follow, "DUMP_S", 10.0)
    box.tell(state="ended")
    follower.look()
    assert follower.over


def test_silence_and_death(tmp_path, followed):
    """A process that says nothing is silent; one that is gone is dead, whatever it said; from afar nobody can tell."""
    follower = followed(black_box(tmp_path / "a"))
    follower._news_at_s -= 12.5
    assert follower.standing == ("silent", 12)
    assert " silent for 12 s " in plain(frame(follower.scene(), View(), 80, 24, UNICODE))
    dead = followed(black_box(tmp_path / "b", process=DEAD))
    assert (dead.state, dead.over) == ("died", True)
    far = followed(black_box(tmp_path / "c", process=replace(this_process(), host="elsewhere")))
    far._news_at_s -= 1000
    assert (far.state, far.over) == ("silent", False)


def test_a_black_box_that_is_taken_away(tmp_path, monkeypatch, caplog, followed):
    """Deleted, it is followed where the recorder makes it anew; cut likewise; where nobody does, that is said."""
    rows = list(rows_of(story_report()))
    box = black_box(tmp_path)
    follower = followed(box)
    box.path.unlink()
    assert not follower.look()
    box.write(replace(rows[0], time_s=time.time()))
    assert follower.look()
    assert len(follower.scene().steps) == 51
    os.truncate(box.path, 60_000)
    assert not follower.look()
    box.write(replace(rows[1], time_s=time.time() + 1))
    assert follower.look()
    assert follower.path.name == "rank00000-2.blackbox"
    follower.path.unlink()
    monkeypatch.setattr(_follow, "LOST_S", 0.0)
    with pytest.raises(UnreadableDump, match="deleted while it was watched"):
        follower.look()
    assert "black box deleted" in caplog.text


def test_a_file_that_vanishes(tmp_path, monkeypatch, capsys):
    """Exit code 2, and it says why."""
    monkeypatch.setattr(_follow, "LOST_S", 0.1)
    box = black_box(tmp_path)
    threading.Timer(0.2, box.path.unlink).start()
    assert cli.main(["watch", str(tmp_path), "-i", "0.02"]) == 2
    assert "deleted while it was watched" in capsys.readouterr().err


# -- in a pipe, as JSON, once --------------------------------------------------------------------------------------


def soon(monkeypatch):
    monkeypatch.setattr(_follow, "SETTLED_S", 0.2)
    monkeypatch.setattr(watch, "LINE_S", 0.05)


def writing(box, rows, pause_s=0.05):
    """A thread that goes on with a run and ends it."""

    def work():
        for row in rows:
            time.sleep(pause_s)
            box.write(replace(row, time_s=time.time()))
        box.tell(state="ended")

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_lines_in_a_pipe(tmp_path, monkeypatch, capsys):
    """Plain lines and then the report; no escape codes."""
    soon(monkeypatch)
    box = black_box(tmp_path, rows=20)
    thread = writing(box, list(rows_of(story_report()))[20:26])
    assert cli.main(["watch", str(tmp_path), "-i", "0.02"]) == 0
    thread.join()
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(lines) >= 3
    assert re.fullmatch(r"step 319  loss 1.\d+  10 steps/s  no trigger", lines[0])
    assert lines[-1].startswith("step 325")
    assert "the run ended" in out
    assert "\x1b" not in out


def test_json_lines(tmp_path, monkeypatch, capsys):
    """A line for each batch of news, strict, and one at the end."""
    soon(monkeypatch)
    box = black_box(tmp_path, rows=47, failures=(SPIKE,))
    thread = writing(box, list(rows_of(story_report()))[47:])
    assert cli.main(["watch", str(tmp_path), "-i", "0.02", "--json"]) == 0
    thread.join()
    *news, end = [json.loads(line, parse_constant=pytest.fail) for line in capsys.readouterr().out.splitlines()]
    steps = [line["step"] for line in news]
    assert steps == sorted(steps)
    assert len(news) >= 3
    assert news[0]["worst"]["layer"] == "blocks.3.attention.up"
    assert news[0]["worst"]["site"] in ("weight.grad", "output.grad")
    assert news[0]["worst"]["times_usual"] > 1000
    last = news[-1]
    assert last["scalars"] == {"loss": "NaN", "lr": 0.5}
    assert last["failures"][0]["trigger"] == "GradientNorm"
    assert (last["worst"]["site"], last["worst"]["nonfinite_since_step"]) == ("weight.grad", 349)
    assert end["state"] == "ended"
    assert end["failed"] is True
    assert end["report"] is None
    assert end["summary"].startswith("gradient norm of blocks.3")


def test_a_run_that_is_over(tmp_path, capsys):
    """Its report at once."""
    black_box(tmp_path, process=DEAD, rows=30)
    assert cli.main(["watch", str(tmp_path)]) == 0
    assert "the process died without a word" in capsys.readouterr().out
    assert cli.main(["watch", "--json", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["state"] == "died"


def test_once(tmp_path, capsys, monkeypatch):
    """One picture with all layers at the width of the terminal, or one line of JSON; exit code 2 where there is nothing."""
    black_box(tmp_path / "crashes", story_report(layers=70))
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["watch", "--once", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"blocks.{i}.attention.up" in out for i in range(70))
    assert max(map(len, out.splitlines())) <= 100
    assert "quit" not in out
    assert "\x1b" not in out
    monkeypatch.chdir(tmp_path)
    assert cli.main(["watch", "--once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 349
    for nothing in ("nowhere", "nowhere/rank00000.blackbox", "n" * 300):
        assert cli.main(["watch", "--once", nothing]) == 2
        assert "type:" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{}")
    assert cli.main(["watch", str(tmp_path / "x.json")]) == 2


def test_wrong_usage(capsys):
    """An interval that is none."""
    for interval in ("0", "x", "nan", "1e9"):
        with pytest.raises(SystemExit) as left:
            cli.main(["watch", "-i", interval])
        assert left.value.code == 2
        assert "is not from 0.01 to 3600 seconds" in capsys.readouterr().err


def test_without_torch(tmp_path):
    """With torch blocked, and for JSON without rich."""
    black_box(tmp_path, process=DEAD)
    code = """
        import sys
        sys.modules["torch"] = None
        from nobs import cli
        assert cli.main(["watch", "--json", sys.argv[1]]) == 0
        assert not {"rich", "matplotlib"} & set(sys.modules)
        sys.exit(cli.main(["watch", "--once", sys.argv[1]]) + cli.main(["watch", sys.argv[1]]))
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "output norms, in execution order" in done.stdout


# -- in a terminal -------------------------------------------------------------------------------------------------

ENTERED, LEFT = "\x1b[?1049h", "\x1b[?1049l"


class Terminal:
    """`nobs watch` in a pseudo terminal of a size, and all it has written."""

    def __init__(self, folder, width=100, height=30):
        self.ours, self.theirs = pty.openpty()
        self.before = termios.tcgetattr(self.theirs)
        self.text = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.resize(width, height)
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, "-m", "nobs", "watch", str(folder), "-i", "0.05"]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), self.theirs)
        # A shell has its background jobs ignore Ctrl-C, and what they start would inherit that.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=heed, **streams)

    def resize(self, width, height):
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def type(self, keys):
        self.text = ""
        os.write(self.ours, keys.encode())

    def until(self, pattern, timeout_s=20.0):
        """What was written since, up to a pattern."""
        end = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.text, re.DOTALL)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text[-3000:]!r}"
            self.read()
        return found

    def read(self):
        if select.select([self.ours], [], [], 0.05)[0]:
            self.text += self.decoder.decode(os.read(self.ours, 1 << 16))
            return True
        return False

    def ended(self, code=0):
        """It has ended, and the terminal is as it was."""
        end = time.monotonic() + 20
        while self.process.poll() is None or self.read():
            assert time.monotonic() < end, self.text[-3000:]
            self.read()
        assert self.process.returncode == code
        assert self.text.rindex(LEFT) > self.text.rfind(ENTERED)
        assert "\x1b[?25h" in self.text[self.text.rindex(LEFT) :]  # the cursor
        assert termios.tcgetattr(self.theirs) == self.before
        return self.text[self.text.rindex(LEFT) :]

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal():
    opened = []

    def make(*arguments, **settings):
        opened.append(Terminal(*arguments, **settings))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def test_keys_and_sizes_in_a_terminal(tmp_path, terminal):
    """A picture at once; keys and a new size change it; Ctrl-Z tidies up; q leaves, and the run goes on."""
    black_box(tmp_path, story_report(layers=50))
    watching = terminal(tmp_path)
    watching.until("step 349")
    watching.until("layers 1 to 1[0-9] of 50")
    watching.type("o")
    watching.until("gradient norms, in execution order")
    watching.type("s")
    watching.until("gradient norms, largest rise first")
    watching.type("\x1b[6~")
    watching.until(r"layers 1\d to \d\d of 50")
    watching.type(" ")
    watching.until(r"paused.*go on")
    watching.text = ""
    watching.resize(60, 12)
    watching.until(r"\x1b\[12;1H")
    assert not re.search(r"\x1b\[13;1H", watching.text)
    watching.type("\x1a")  # nobody is there to stop an orphaned group: it goes right on
    watching.until(re.escape(LEFT) + r".*" + re.escape(ENTERED) + r".*pause")
    watching.type("q")
    assert f"the run goes on; watch again: nobs watch {tmp_path}" in watching.ended()


def test_a_pause(tmp_path, terminal):
    """The picture stands still, whatever comes, until somebody goes on; that the run is over is said, and shown when they do."""
    rows = list(rows_of(story_report()))
    box = black_box(tmp_path, rows=20)
    watching = terminal(tmp_path)
    watching.until("step 319")
    watching.type(" ")
    watching.until("paused")
    box.write(rows[20])
    time.sleep(0.3)
    watching.type("o")
    watching.until("step 319.*gradient norms")
    watching.type(" ")
    watching.until("step 320")
    watching.type(" ")
    watching.until("paused")
    box.tell(state="ended")
    watching.until(r" ended .*paused")
    time.sleep(_follow.SETTLED_S)
    assert watching.process.poll() is None
    watching.type("q")
    assert "the run ended" in watching.ended()


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_terminal_in_order(how, code, tmp_path, terminal):
    """Ctrl-C and SIGTERM."""
    black_box(tmp_path)
    watching = terminal(tmp_path)
    watching.until("step 349")
    watching.process.send_signal(how)
    assert ("the run goes on" in watching.ended(code)) == (how == signal.SIGINT)


TRAINING = """
    import sys, time, warnings
    import torch, nobs
    sys.path.insert(0, sys.argv[1])
    from nets import Images, loss_of
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for how in sys.argv[3:]:
        model = nobs.instrument(Images())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nobs.Recorder(model, optimizer=optimizer, directory=f"{sys.argv[2]}/{how}") as recorder:
            for step in range(100_000 if how == "endless" else 40):
                loss = loss_of(model, model.batch())
                (loss * float("nan") if how == "fails" and step == 39 else loss).backward()
                optimizer.step()
                optimizer.zero_grad()
                recorder.step(loss)
                time.sleep(0.02)
    """


@contextmanager
def training(folder, *how):
    """A training process, which never outlives its test."""
    command = [sys.executable, "-c", textwrap.dedent(TRAINING), str(ROOT / "tests"), str(folder), *how]
    nothing = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **nothing)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_run_that_ends_and_one_that_is_killed(tmp_path, terminal):
    """From before the black box is there: the end of a run in a process that goes on, and SIGKILL in the next one."""
    first, second = terminal(tmp_path / "ends"), terminal(tmp_path / "endless")
    first.until("waiting for a black box below")
    second.until("waiting for a black box below")
    with training(tmp_path, "ends", "endless") as process:
        first.until("step [1-9]")
        first.until("conv1")
        assert "the run ended" in first.ended()
        second.until("step [1-9]")
        second.until("[0-9.]+ steps/s")
        assert process.poll() is None
        process.kill()
        report = second.ended()
    assert "the process died without a word" in report
    assert "conv1" in report


def test_a_run_that_fails(tmp_path, terminal):
    """By a trigger: the report is that of its dump."""
    watching = terminal(tmp_path, 200)
    with training(tmp_path, "fails"):
        watching.until("step [1-9]")
        report = watching.ended()
    assert "nobs: training failed" in report
    assert "step00000039/rank00000.json" in re.sub(r"\s", "", report)
