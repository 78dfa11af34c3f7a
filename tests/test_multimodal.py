"""The example with two towers, as a user runs it: both end in NaN, and the report names the layer of the one that began it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nobs

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "multimodal_failure.py"
PLANTED = "text.pool"


def crash(tmp_path, *arguments, **environ):
    """Run the example in an empty folder; what it printed, and the report that it left."""
    script = [sys.executable, str(EXAMPLE), *arguments]
    done = subprocess.run(
        script, cwd=tmp_path, env={**os.environ, **environ}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "crashes").rglob("rank*.json")
    return done.stderr, nobs.load(path)


def accuse(report):
    """The first finding is the planted fault, in the step in which the loss went."""
    first = report.findings[0]
    assert (first.cause, first.layer, first.site) == ("nonfinite_forward", PLANTED, "output")
    assert first.step == report.failure.step >= 62  # the captions before are sound


@pytest.mark.parametrize("seed", ["0", "1"])
def test_the_report_names_the_tower_and_the_layer(tmp_path, seed):
    """An empty caption: the pooling layer of the text tower, though all of both towers is NaN by then."""
    text, report = crash(tmp_path, "--eager", "--seed", seed)
    accuse(report)
    first_image = 64 * report.failure.step
    for words in (PLANTED, "nonfinite_forward", f"images {first_image} to {first_image + 63}"):
        assert words in text
    layers = {tap.layer for tap in report.history.table.taps}
    assert {name.split(".")[0] for name in layers} == {"image", "text"}
    for layer in layers:
        count = report.history[layer, "weight.grad" if layer != PLANTED else "query.grad", "nonfinite"]
        assert count[-1] > 0, layer
        assert not count[:-1].any(), layer


def test_it_trains_before(tmp_path):
    """On drawn digits, without files and a network: the loss has fallen by more than a third when the caption comes."""
    nowhere = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    text, report = crash(tmp_path, "--eager", "--data", str(tmp_path / "nothing"), **nowhere)
    assert "drawn by this program" in " ".join(text.split())
    accuse(report)
    loss = report.history.scalars["loss"]
    assert np.median(loss[-11:-1]) < 0.65 * loss[0]
