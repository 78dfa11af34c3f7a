"""The benches of cost: toys through every part of them, and the sanity of what they write."""

import json
import os
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"

EAGER = ("--modes", "eager", "--dtypes", "float32")


@pytest.fixture
def bench(monkeypatch):
    """Import a bench by name, as a script beside it would."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield __import__
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def run(bench, tmp_path, capsys):
    """Run a bench as its command does: what it wrote as JSON, and what it printed."""

    def ran(name, *words):
        assert bench(name).main([*words, "--quick", "--device", "cpu", "--json", str(tmp_path / "figures.json")]) == 0
        return json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out

    return ran


def test_a_table_of_costs(run):
    """Each tool of our own has a line; nobs saw all that could be tapped, and what reads nothing says so."""
    tools = ("none", "nobs", "nobs every=10", "nobs outputs", "hooks .item()", "_foreach_norm", "identity", "detect_anomaly")
    figures, printed = run("overhead", "--workloads", "gpt", *EAGER, "--tools", ",".join(tools))
    assert figures["machine"]["torch"]
    assert isinstance(figures["machine"]["dirty"], bool)
    by_tool = {cell["tool"]: cell for cell in figures["cells"]}
    assert tuple(by_tool) == tools
    for name, cell in by_tool.items():
        assert "error" not in cell, cell
        cost = cell["steps"]
        assert cost["quartiles"][0] <= cost["ratio"] <= cost["quartiles"][1], name
        assert cost["bare_ms"] > 0
        assert cell["bare"]["graphs"]["graphs"] == 0
        assert f"\n  {name} " in printed
    assert max(len(line) for line in printed.splitlines()) <= 100
    taps = sum(number for number, _ in by_tool["nobs"]["reads"].values())
    assert by_tool["nobs"]["seen"] == by_tool["nobs every=10"]["seen"] == by_tool["nobs"]["taps"] == taps
    assert 0 < by_tool["nobs outputs"]["seen"] < taps
    assert by_tool["identity"]["seen"] == by_tool["none"]["seen"] == by_tool["detect_anomaly"]["seen"] == 0
    asks = {name: cell["observed"]["asks"] - cell["bare"]["asks"] for name, cell in by_tool.items()}
    assert asks["hooks .item()"] == by_tool["hooks .item()"]["seen"] + 1  # and the loss
    assert asks["_foreach_norm"] == asks["none"] == 0
    assert by_tool["nobs every=10"]["steps"]["steps"] == 10


def test_the_memory_of_nobs_is_what_its_formula_says(run):
    """What it holds on the device is the ring and little else, and a step's peak is no higher than without."""
    cell = run("overhead", "--workloads", "mlp300", *EAGER, "--tools", "nobs")[0]["cells"][0]
    held = cell["observed"]["held_bytes"] - cell["bare"]["held_bytes"]
    assert cell["held_bytes_said"] <= held < 1.1 * cell["held_bytes_said"]


def test_a_tool_that_fails_or_is_missing_says_why_and_the_rest_goes_on(run, bench, monkeypatch):
    """One that raises, one that is not installed, and one that works behind them."""

    def broken(job):
        raise RuntimeError("no such hook")

    tools = bench("overhead_tools")
    monkeypatch.setitem(tools.TOOLS, "_foreach_norm", tools.Tool(broken, ""))
    monkeypatch.setitem(tools.TOOLS, "identity", tools.Tool(broken, "", package="no-such-package"))
    names = ("_foreach_norm", "identity", "none")
    figures, printed = run("overhead", "--workloads", "gpt", *EAGER, "--tools", ",".join(names))
    assert [cell.get("error") for cell in figures["cells"]] == ["RuntimeError: no such hook", "not installed", None]
    assert "RuntimeError: no such hook" in printed


def test_a_table_of_growth(run):
    """More layers are more taps, and memory is as computed; `recorder.step` is timed by itself."""
    figures, _ = run("scaling", "--vary", "layers", "capacity")
    layers = [row for row in figures["rows"] if row["varied"] == "layers"]
    assert [row["taps"] for row in layers] == [6 * row["layers"] for row in layers]
    for row in figures["rows"]:
        step = row["recorder_step_us"]
        assert 0 < step["median"] <= step["p99"]
        assert step["median"] < 1e3 * row["cost"]["observed_ms"]
        assert row["held_bytes"] >= row["held_bytes_said"]


def test_the_time_of_compiling(bench):
    """An eager loop compiles nothing, and its first steps count no graph."""
    compiled = bench("overhead_compile")
    found = compiled.one("gpt", "eager", "float32", "nobs", "cpu", quick=True)
    assert found["graphs"] == found["breaks"] == 0
    assert found["compile_s"] < 5
    runs = {f"{who}_{state}": [found] for who in ("bare", "observed") for state in ("cold", "warm")}
    seconds = dict.fromkeys(runs, 2.0)
    assert "2.0    1.00" in compiled.line("nobs", {"compile_s": seconds, "ratios": {"cold": 1.0, "warm": 1.0}, "runs": runs})


def test_nothing_is_left_behind(bench, tmp_path, monkeypatch):
    """All that a bench and its tools write goes into a folder that is gone with it, and the environment is as before."""
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with bench("overhead_options").scratch() as folder:
        (folder / "left").write_text("")
        assert folder.is_dir()
    assert not folder.exists()
    assert not {"TMPDIR", "TORCHINDUCTOR_CACHE_DIR"} & set(os.environ)
