"""What a tool does to the time that compiling takes: cold, and with the caches of a run before.

    python bench/overhead_compile.py --workloads gpt --dtypes float32 --tools nobs,"hooks .item()"
    python bench/overhead_compile.py --repeats 3 --json FILE

Each figure is of a fresh process with an Inductor cache of its own: empty, and then once more with what the first has left there.
It is what the first three steps took longer than three later ones. Bare and watched processes take turns; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from machine import installed, machine, save
from overhead_census import graphs_of
from overhead_loop import Loop
from overhead_measure import time_s
from overhead_options import cells_parser, modes_of, scratch
from overhead_tools import TOOLS
from overhead_workloads import make

HEADINGS = f"  {'tool':26}{'cold s':>9}{'ratio':>8}{'warm s':>9}{'ratio':>8}{'graphs':>8}{'cached':>8}{'bypass':>8}"

LATER = 3
"""Steps that are compared with the first ones, which compile."""


def one(workload: str, mode: str, dtype: str, tool: str, device: str, quick: bool) -> dict:
    """In a process of its own: compile once. What it took, and what Dynamo and the cache of AOTAutograd say of it."""
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(make(workload, device, dtype, quick), mode, TOOLS[tool].attach, Path(folder))
        first: list = []
        took_s = _seconds(lambda: first.append(graphs_of(loop, LATER)))
        later_s = [time_s(loop) for _ in range(LATER)]
        loop.tool.close()
    return {"compile_s": took_s - LATER * float(np.median(later_s)), "step_s": min(later_s), **asdict(first[0])}


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_a_process(words: Sequence[str], cache: str) -> dict:
    """`one`, in a fresh process with this cache; `error` where it failed."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--one", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def compare(tool: str, words: Callable[[str], Sequence[str]], repeats: int) -> dict:
    """A tool against the bare model, cold and warm, in turn."""
    found: dict[str, list[dict]] = defaultdict(list)
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as bare, tempfile.TemporaryDirectory() as watched:
            for state in ("cold", "warm"):
                for who, cache in (("none", bare), (tool, watched)):
                    run = in_a_process(words(who), cache)
                    if "error" in run:
                        return run
                    found[f"{'bare' if who == 'none' else 'observed'}_{state}"].append(run)
    seconds = {name: float(np.median([run["compile_s"] for run in runs])) for name, runs in found.items()}
    ratios = {state: seconds[f"observed_{state}"] / seconds[f"bare_{state}"] for state in ("cold", "warm")}
    return {"compile_s": seconds, "ratios": ratios, "runs": found}


def line(tool: str, found: dict) -> str:
    """One tool's line of the table."""
    if "error" in found:
        return f"  {tool:27}{found['error']}"[:100]
    times = "".join(f"{found['compile_s'][f'observed_{state}']:9.1f}{found['ratios'][state]:8.2f}" for state in ("cold", "warm"))
    warm = found["runs"]["observed_warm"][-1]
    cache = [warm["cache"].get(f"autograd_cache_{what}", 0) for what in ("hit", "bypass")]
    return f"  {tool:26}{times}{warm['graphs']:8}{cache[0]:8}{cache[1]:8}"


def cells(options: argparse.Namespace, say: Callable[[str], None]) -> Iterator[dict]:
    """Every cell that was asked for, said as it is done. The bare model's own times are in each."""
    quick = ["--quick"] if options.quick else []
    for workload in options.workloads:
        for dtype in options.dtypes:
            for mode in options.modes:
                say(f"\n{workload}, {mode}, {dtype}\n{HEADINGS}")
                for tool in options.tools:
                    where = [workload, mode, dtype]
                    missing = TOOLS[tool].package is not None and installed(TOOLS[tool].package) is None
                    words = lambda who, where=where: [*where, who, options.device, *quick]  # noqa: E731
                    found = {"error": "not installed"} if missing else compare(tool, words, options.repeats)
                    say(line(tool, found))
                    yield {"workload": workload, "mode": mode, "dtype": dtype, "tool": tool, **found}


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["--one"]:
        print(json.dumps(one(*words[1:6], quick="--quick" in words)))
        return 0
    parser = cells_parser(__doc__, [mode for mode in modes_of("cuda") if mode != "eager"])
    parser.set_defaults(modes=["compiled"], tools=["nobs"])
    parser.add_argument("--repeats", type=int, default=1)
    options, about = parser.parse_args(words), machine()
    with scratch():
        done = list(cells(options, lambda text: print(text, flush=True)))
    save(options.json, about, device=options.device, cells=done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
