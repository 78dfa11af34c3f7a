"""What recording costs, side by side with what else there is: bare and watched steps in turn, medians of their paired ratios.

    python bench/overhead.py                                   # everything: hours on two cores
    python bench/overhead.py --workloads gpt,mlp300 --modes eager --dtypes float32 --tools none,nobs
    python bench/overhead.py --json FILE                       # the raw figures, with machine, versions and commit
    python bench/overhead.py --quick                           # toys and few pairs: does everything run?

One process; each cell makes two models with the same weights, one bare and one with the tool, and trains both, step by step
in turn, the order changing from pair to pair; four times over, as the memory that a model gets makes it faster or slower too.
On CUDA the headline is of blocks of steps without waiting in between, as there the host runs ahead of the device; single steps
are in the JSON. A tool that cannot run says why, and the rest goes on.

`+ms`: what a step gets slower by; `us/tap`: the same per tensor that the tool is to read; `x read`: the same over one `torch.sum`
of each of these tensors; `seen`: readings that it took in a step; `asks`: how often the host asked for a number that the
device has, on CUDA how often it waited for one; breaks and graphs: more than the bare model has; `+MB`: held and at the peak of
a step, on the device. Compile times: `bench/overhead_compile.py`.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from machine import installed, machine, save
from overhead_census import asks_of, graphs_of, held_bytes, peak_bytes, reads_of, step_call_waits
from overhead_loop import Attached, Job, Loop
from overhead_measure import BLOCK, compare, compare_blocks, cost_of, warm_up
from overhead_options import cells_parser, modes_of, scratch, silence
from overhead_tools import TOOLS, Tool
from overhead_workloads import Workload, make

HEADINGS = "  tool                      ratio    quartiles     +ms  us/tap x read seen  asks breaks graphs   +MB"


def cell(tool: Tool, build: Callable[[], Workload], mode: str, reads: dict, options: argparse.Namespace, folder: Path) -> dict:
    """One tool with one workload in one mode: all that is measured and counted."""
    rounds = [one_round(tool, build, mode, options, folder, number) for number in range(options.rounds)]
    found: dict[str, Any] = {**rounds[0], "steps": asdict(cost_of([one["steps"] for one in rounds], tool.period))}
    if "blocks" in rounds[0]:
        found["blocks"] = asdict(cost_of([one["blocks"] for one in rounds], BLOCK))
    return {**found, **_by_tap(found, found.pop("kinds"), reads, tool.period)}


def one_round(
    tool: Tool, build: Callable[[], Workload], mode: str, options: argparse.Namespace, folder: Path, number: int
) -> dict:
    """Both models made anew, in every other round the observed one first: which memory a model gets makes steps of it up to 5 %
    slower, with or without a tool. What is counted is counted in the first round."""
    device = torch.device(options.device)
    attached: list[Attached] = []

    def attach(job: Job) -> Attached:
        attached.append(tool.attach(job))
        return attached[0]

    def made(which: Callable[[Job], Attached] | None) -> tuple[Loop, dict]:
        torch._dynamo.reset()  # models of one class share their graphs: count them apart
        before = held_bytes(device)
        loop = Loop(build(), mode, which, folder)
        graphs = graphs_of(loop)
        seen = loop.tool.read() if which else 0
        return loop, {"graphs": asdict(graphs), "held_bytes": held_bytes(device) - before, "seen_alone": seen}

    try:
        both = [made(which) for which in (None, attach if tool.attach else None)[:: -1 if number % 2 else 1]]
        (bare, of_bare), (observed, of_observed) = both[:: -1 if number % 2 else 1]
        torch._dynamo.reset()  # and what Dynamo gave up because of a tool it may do again in the bare model
        warm_up((bare, observed), options.warm_up, options.seconds / 2)
        pairs, seconds = -(-options.pairs // options.rounds), options.seconds / options.rounds
        found: dict[str, Any] = {"steps": compare(bare, observed, pairs, seconds, tool.period)}
        if device.type == "cuda":
            found["blocks"] = compare_blocks(bare, observed, pairs, seconds)
        if number:
            return found
        for loop, fact in ((bare, of_bare), (observed, of_observed)):
            fact.update(asks=asks_of(loop, tool.period), peak_bytes=peak_bytes(loop))
        found["step_call_waits"] = step_call_waits(observed)  # last: who is refused may stop recording
        found.update(bare=of_bare, observed=of_observed, seen=observed.tool.read(), held_bytes_said=observed.tool.held_bytes)
        return {**found, "kinds": observed.tool.kinds}
    finally:
        for one in attached:
            one.close()


def headline(found: dict) -> dict:
    """The comparison that is printed: of blocks on CUDA, of single steps elsewhere."""
    return found.get("blocks", found["steps"])


def _by_tap(found: dict, kinds: Sequence[str], reads: dict, period: int) -> dict:
    """The cost of a tap, and how many reads of the tapped tensor it is; None for what reads nothing, or not every step."""
    taps, read_us = (sum(reads[kind][i] for kind in kinds) for i in (0, 1))
    if not taps or period > 1:
        return {"taps": taps, "tap_us": None, "tap_per_read": None}
    extra_us = headline(found)["extra_ms"] * 1e3
    return {"taps": taps, "tap_us": extra_us / taps, "tap_per_read": extra_us / read_us}


def line(name: str, found: dict) -> str:
    """One tool's line of the table."""
    if "error" in found:
        return f"  {name:25}{found['error']}"[:100]
    cost, bare, observed = headline(found), found["bare"], found["observed"]
    quartiles = "-".join(_short(quartile) for quartile in cost["quartiles"])
    by_tap = f"{found['tap_us']:8.4g}{found['tap_per_read']:7.3g}" if found["tap_us"] is not None else f"{'-':>8}{'-':>7}"
    breaks, graphs = (observed["graphs"][what] - bare["graphs"][what] for what in ("breaks", "graphs"))
    more_bytes = sum(observed[what] - bare[what] for what in ("held_bytes", "peak_bytes"))
    decimals = 2 if abs(more_bytes) < 1e8 else 0
    return (
        f"  {name:24}{_short(cost['ratio']):>7}{quartiles:>13}{cost['extra_ms']:8.2f}{by_tap}"
        f"{found['seen']:5}{observed['asks'] - bare['asks']:6.4g}{breaks:7}{graphs:7}{more_bytes / 1e6:6.{decimals}f}"
    )


def notes(found: dict) -> Iterator[str]:
    """What a line has no room for."""
    if "error" in found:
        return
    graphs, bare = found["observed"]["graphs"], found["bare"]["graphs"]
    if graphs["breaks"] > bare["breaks"]:
        yield f"breaks: {graphs['reason']}"
    if found["seen"] != found["observed"]["seen_alone"]:
        yield f"in its first steps, before the bare model ran too, it saw {found['observed']['seen_alone']}"
    if graphs["skipped_cudagraphs"] > bare["skipped_cudagraphs"]:
        yield f"ran without CUDA graphs: {graphs['skipped_cudagraphs']} graphs, of the bare model {bare['skipped_cudagraphs']}"
    if found.get("step_call_waits"):
        yield f"its call at the end of a step waits: {found['step_call_waits']}"
    if found["held_bytes_said"] is not None:
        held = found["observed"]["held_bytes"] - found["bare"]["held_bytes"]
        yield f"holds {held} bytes; its ring, as computed, {found['held_bytes_said']}"


def _short(ratio: float) -> str:
    """A ratio in five characters."""
    return f"{ratio:.3f}" if ratio < 9.9995 else f"{ratio:.2f}" if ratio < 99.995 else f"{ratio:.0f}"


def cells(options: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> Iterator[dict]:
    """Every cell that was asked for, said as it is done."""
    for workload in options.workloads:
        for dtype in options.dtypes:
            build = lambda workload=workload, dtype=dtype: make(workload, options.device, dtype, options.quick)  # noqa: E731
            try:
                reads = reads_of(build())
            except ImportError as error:
                say(f"\n{workload}, {dtype}: skipped: {error}")
                continue
            taps, read_us = (sum(kind[i] for kind in reads.values()) for i in (0, 1))
            for mode in options.modes:
                say(f"\n{workload}, {mode}, {dtype}: {taps} tensors to tap, {read_us / taps:.2f} us to read one\n{HEADINGS}")
                for name in options.tools:
                    where = {"workload": workload, "mode": mode, "dtype": dtype, "tool": name, "reads": reads}
                    found = {**where, **attempt(TOOLS[name], build, mode, reads, options, folder)}
                    say("\n".join([line(name, found), *(f"    {note}"[:100] for note in notes(found))]))
                    yield found


def attempt(tool: Tool, build: Callable[[], Workload], mode: str, reads: dict, options: argparse.Namespace, folder: Path) -> dict:
    """A cell, or why there is none."""
    if tool.package is not None and installed(tool.package) is None:
        return {"error": "not installed"}
    try:
        # By default a graph does not ask for hooks: a model with hooks would run the bare model's, and record nothing.
        with silence(), warnings.catch_warnings(), torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            warnings.simplefilter("ignore")
            return cell(tool, build, mode, reads, options, folder)
    except Exception as error:  # whatever a tool, or a compiler under it, may raise: the table says it
        said = next((text for text in str(error).splitlines() if text.strip()), "")
        return {"error": f"{type(error).__name__}: {said}", "traceback": traceback.format_exc()}
    finally:
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Lists are given with commas."""
    parser = cells_parser(__doc__, modes_of("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--pairs", type=int, default=100, help="pairs of steps (on CUDA also of blocks of 20) in a cell")
    parser.add_argument("--seconds", type=float, default=60, help="no more pairs in a cell when they have taken so long")
    parser.add_argument("--rounds", type=int, default=4, help="how often both models of a cell are made anew")
    parser.add_argument("--warm-up", type=int, default=30, help="steps before the first that counts, in half that time at most")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.warm_up, options.seconds, options.rounds = 6, 2, 5, 2
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options, about = parsed(arguments), machine()
    print(f"{about['gpu'] or about['processor']}, {about['threads']} threads, torch {about['torch']}, commit {about['commit']}")
    with scratch() as folder:
        done = list(cells(options, folder, lambda text: print(text, flush=True)))
    save(options.json, about, device=options.device, cells=done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
