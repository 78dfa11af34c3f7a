"""Several ranks under torchrun: who hears of a failure, who stops when, and what all of them leave behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import nobs
from nobs import _blackbox, cli

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

HERE = Path(__file__).parent
FAILS_AT = 12


def torchrun(ranks, program, *arguments, cwd):
    """Exit code, stdout and stderr of a program under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(program)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=cwd, env=environ, capture_output=True, text=True, timeout=150, check=False
    )
    return done.returncode, done.stdout, done.stderr


class Scene:
    """What a scene left: a word of each rank, and the folder of the run."""

    def __init__(self, folder, name, ranks):
        files = [folder / f"{name}-{rank}.json" for rank in range(ranks)]
        self.words = [json.loads(file.read_text()) if file.exists() else None for file in files]
        self.runs = list((folder / name).iterdir())

    @property
    def run(self):
        assert len(self.runs) == 1, "one folder for all ranks"
        return self.runs[0]

    def dumps(self):
        return {path.name[:9]: nobs.load(path) for path in sorted(self.run.rglob("rank*.json"))}

    def merged(self, capsys):
        assert cli.main(["merge", str(self.run), "--json"]) == 0
        return json.loads(capsys.readouterr().out)


def stopped_together(scene, ranks):
    """All raised, behind the same step, and only rank 0 printed; each has one dump of the same steps."""
    steps = {word["steps"] for word in scene.words}
    assert len(steps) == 1
    assert steps.pop() > FAILS_AT
    assert [word["error"] for word in scene.words] == ["TrainingFailure"] * ranks
    assert [bool(word["stderr"]) for word in scene.words] == [True] + [False] * (ranks - 1)
    dumps = scene.dumps()
    assert list(dumps) == [f"rank{rank:05d}" for rank in range(ranks)]
    assert {path.parent.name for path in scene.run.rglob("rank*.json")} == {f"step{FAILS_AT:08d}"}
    for report in dumps.values():
        assert report.history.steps.tolist() == list(range(FAILS_AT + 1))
        assert report.world_size == ranks


def check_nan_input(scene, ranks, capsys):
    stopped_together(scene, ranks)
    first = scene.merged(capsys)["first"]
    assert (first["rank"], first["layer"], first["site"], first["step"]) == (ranks - 1, "fc1", "output", FAILS_AT)
    assert f"on rank {ranks - 1}" in scene.words[0]["stderr"]


def check_seen_by_one(scene, ranks, capsys):
    stopped_together(scene, ranks)
    for rank, word in enumerate(scene.words[:-1]):
        assert word["message"] == f"rank {ranks - 1} failed: loss is Inf at step {FAILS_AT}"
        told = scene.dumps()[f"rank{rank:05d}"]
        assert (told.failure.trigger, told.failure.step, told.findings) == ("OtherRank", FAILS_AT, ())
    assert scene.merged(capsys)["first"]["rank"] == ranks - 1


def check_warned(scene, ranks, capsys):
    assert [word.get("error") for word in scene.words] == [None] * ranks
    assert [word["steps"] for word in scene.words] == [30] * ranks
    assert ["training failed on rank" in word["stderr"] for word in scene.words] == [True] + [False] * (ranks - 1)
    assert ["NobsWarning" in word["stderr"] for word in scene.words] == [True] * ranks
    assert len(scene.dumps()) == ranks
    assert scene.merged(capsys)["first"]["rank"] == ranks - 1


def check_hangs(scene, ranks, capsys):
    assert scene.run.parent.with_suffix(".seen").read_text() == "1"
    assert scene.words[1]["error"] == "ZeroDivisionError"
    assert scene.words[0]["message"] == "rank 1 failed: ZeroDivisionError: a bug of the user's"
    assert scene.words[0]["steps"] == FAILS_AT + 1, "at once, behind the step in which it hung"
    assert "nobs merge" in scene.words[0]["stderr"]


def check_ends_early(scene, ranks, capsys):
    assert [word.get("error") for word in scene.words] == ["TrainingFailure", None]
    assert [word["steps"] for word in scene.words] == [FAILS_AT + 1, 5]
    assert scene.words[0]["seconds"] < 8, "nobody waits for a rank that has ended"


def check_far_apart(scene, ranks, capsys):
    assert [word["error"] for word in scene.words] == ["TrainingFailure"] * 2
    assert scene.words[1]["steps"] == FAILS_AT + 1
    assert FAILS_AT + 11 < scene.words[0]["steps"] < 2000


def check_healthy(scene, ranks, capsys):
    assert [(word["stderr"], word["report"], word.get("error")) for word in scene.words] == [("", None, None)] * ranks
    assert sorted(path.name for path in scene.run.iterdir()) == [f"rank{rank:05d}.blackbox" for rank in range(ranks)]
    assert cli.main(["check", str(scene.run)]) == 0
    capsys.readouterr()


def check_named(scene, ranks, capsys):
    assert sorted(path.name for path in scene.run.iterdir()) == [f"rank{rank:05d}.blackbox" for rank in range(ranks)]
    assert scene.run.name.startswith("1970-01-01T")


def check_never_starts(scene, ranks, capsys):
    assert scene.words[0]["error"] == "TrainingFailure"
    assert scene.words[0]["seconds"] < 8, "nobody waits for a rank that was never there"
    assert scene.merged(capsys)["missing"] == [ranks - 1]


CHECKS = {
    "nan_input": check_nan_input,
    "seen_by_one": check_seen_by_one,
    "warned": check_warned,
    "hangs": check_hangs,
    "ends_early": check_ends_early,
    "far_apart": check_far_apart,
    "healthy": check_healthy,
    "named": check_named,
    "never_starts": check_never_starts,
}


@pytest.mark.parametrize(("ranks", "names"), [(2, list(CHECKS)), (4, ["nan_input", "seen_by_one"])])
def test_scenes(tmp_path, capsys, ranks, names):
    """What becomes of each rank where one fails: one launch for all scenes, as a launch takes seconds."""
    code, _, stderr = torchrun(ranks, HERE / "ranks.py", tmp_path, *names, cwd=tmp_path)
    assert code == 0, stderr[-4000:]
    for name in names:
        CHECKS[name](Scene(tmp_path, name, ranks), ranks, capsys)


def test_an_exception_on_one_rank(tmp_path, capsys):
    """Its process ends, and the launcher ends the others; the merged report says whose exception it was, and prints on rank 0."""
    code, _, _ = torchrun(2, HERE / "ranks.py", tmp_path, "raises", cwd=tmp_path)
    assert code != 0
    scene = Scene(tmp_path, "raises", 2)
    assert list(scene.dumps()) == ["rank00000", "rank00001"]
    assert scene.dumps()["rank00001"].exception == "ZeroDivisionError: a bug of the user's"
    assert scene.merged(capsys)["first"]["rank"] == 1


def test_a_rank_is_killed_in_the_middle_of_a_step(tmp_path, capsys):
    """It says nothing; its black box ends a step early, the others end by a closed connection, and all is found in the boxes."""
    begun = time.monotonic()
    code, _, _ = torchrun(2, HERE / "ranks.py", tmp_path, "killed", cwd=tmp_path)
    assert code != 0
    assert time.monotonic() - begun < 60, "a dead rank holds nobody"
    run = Scene(tmp_path, "killed", 2).run
    box = _blackbox.read(run / "rank00001.blackbox")
    assert (box.alive, box.history.steps[-1]) == (False, FAILS_AT - 1)
    merged = Scene(tmp_path, "killed", 2).merged(capsys)
    assert (merged["first"]["rank"], merged["ranks"][1]["state"]) == (1, "killed")
    for dump in run.rglob("step*/*"):
        dump.unlink()
    assert Scene(tmp_path, "killed", 2).merged(capsys)["first"]["rank"] == 1, "from the black boxes alone"


def test_the_example_ends_in_the_merged_report(tmp_path):
    """One command, and what rank 0 prints names rank, layer and step."""
    code, _, stderr = torchrun(2, HERE.parent / "examples" / "ddp_failure.py", cwd=tmp_path)
    assert code == 0, stderr[-3000:]
    assert "training failed on rank 1 of 2" in stderr
    assert "conv1 (Conv2d), output, at step 40" in stderr
