"""The example as a user runs it: a real failure on real images, and a dump that strict JSON reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nobs

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "mnist_failure.py"


def refuse(word):
    raise AssertionError(f"the token {word}")


def demo(tmp_path, *arguments, **environ):
    """Run the example in an empty folder; what it printed, and the dump as strict JSON."""
    script = [sys.executable, str(EXAMPLE), *arguments]
    done = subprocess.run(
        script, cwd=tmp_path, env={**os.environ, **environ}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("rank*.json")
    assert path.with_suffix(".png").stat().st_size > 10_000
    return done.stderr, json.loads(path.read_text(), parse_constant=refuse)


def test_the_failure_is_real(tmp_path):
    """Compiled, on real images where NOBS_MNIST names them: it trains well first, then blows up, and the rate is blamed."""
    text, data = demo(tmp_path, "--capacity", "400")
    assert data["run"]["compiled"]
    failed = data["failure"]["step"]
    assert 100 <= failed <= 400
    loss = np.array([np.nan if isinstance(v, str) else v for v in data["scalars"]["loss"]])
    real = "MNIST: 10000 images from" in text
    assert real == ("NOBS_MNIST" in os.environ)
    lowest = np.convolve(loss[:failed], np.ones(10) / 10, "valid").min() if real else loss[:failed].min()
    assert lowest < 0.6  # on drawn digits, which are harder, single steps are
    assert data["findings"][0]["cause"] == "learning_rate"
    assert data["findings"][0]["layer"] in text
    assert "nobs: training failed" in text
    assert f" step {failed}" in text  # "at" it, or "by" it where the loss has climbed


def test_without_warmup_it_fails_at_once(tmp_path):
    """--warmup 0 starts at a rate of 100."""
    _, data = demo(tmp_path, "--eager", "--warmup", "0")
    assert data["failure"]["step"] < 10


def test_without_data_it_draws_digits(tmp_path):
    """No files and no network: drawn digits, said so, and the same kind of failure."""
    text, data = demo(
        tmp_path,
        "--eager",
        "--data",
        str(tmp_path / "nothing"),
        https_proxy="http://127.0.0.1:9",
        http_proxy="http://127.0.0.1:9",
    )
    assert "drawn by this program" in " ".join(text.split())
    assert 100 <= data["failure"]["step"] <= 400


def test_without_a_compiler_it_trains_eagerly(tmp_path):
    """Where Inductor finds no C++ compiler the example says so."""
    text, data = demo(tmp_path, "--every", "2", PATH=str(tmp_path), CXX="")
    assert "no C++ compiler" in text
    assert not data["run"]["compiled"]
    assert data["run"]["every"] == 2


@pytest.mark.parametrize(
    ("example", "arguments", "says"),
    [
        ("mnist_failure.py", ["--lr", "nan"], "argument --lr"),
        ("mnist_failure.py", ["--warmup", "-5"], "argument --warmup"),
        ("mnist_failure.py", ["--device", "nosuch"], "argument --device: Expected one of cpu"),
        ("visualize_crash.py", ["missing"], "reading missing"),
    ],
)
def test_wrong_arguments(example, arguments, says, tmp_path):
    """Exit code 2 and the reason; no traceback."""
    script = [sys.executable, str(ROOT / "examples" / example), *arguments]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_visualize_crash(tmp_path):
    """The picture of a dump from the dump alone."""
    from samples import story_report

    from nobs import _codec

    path = _codec.save(story_report(), tmp_path / "rank00000.json")
    script = [sys.executable, str(ROOT / "examples" / "visualize_crash.py"), str(path)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split()[-1]).read_bytes().startswith(b"\x89PNG")
    assert nobs.load(path).failure.step == 349


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read(tmp_path, packed):
    """IDX pairs, gzipped or not; the t10k pair alone will do."""
    import gzip

    import mnist_data

    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    contents = {
        "t10k-images-idx3-ubyte": bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 28, 0, 0, 0, 28]) + images.tobytes(),
        "t10k-labels-idx1-ubyte": bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]),
    }
    for name, content in contents.items():
        path = tmp_path / (name + (".gz" if packed else ""))
        path.write_bytes(gzip.compress(content) if packed else content)
    said = []
    got, labels = mnist_data.load(tmp_path, said.append)
    assert got.shape == (3, 1, 28, 28)
    assert labels.tolist() == [7, 2, 1]
    assert ((got[:, 0] * 0.3081 + 0.1307) * 255).round().numpy().astype(np.uint8).tolist() == images.tolist()
    assert said == [f"MNIST: 3 images from {tmp_path}"]
