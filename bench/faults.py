"""Is the culprit named? Faults planted into real training, and healthy runs that look odd, through nobs and three other tools.

    python bench/faults.py                       # 468 faults, 330 healthy runs: half an hour on two cores
    python bench/faults.py --cases 2 --seeds 2 --peers 0     # a look
    python bench/faults.py --json FILE           # every outcome, with machine and versions
    NOBS_MNIST=DIR python bench/faults.py        # on real images

A fault counts only if the run departs from its fault-free twin (see `fault_score`). Which fault has which cause: `fault_table`.
Prints, per fault, how many were detected, after how many steps and how many before the loss shows it, and how often layer,
site and cause were right; false alarms per kind of healthy run; the calibration of the confidences; the worst misses.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fault_healthy import HEALTHY
from fault_healthy import train as train_healthy
from fault_peers import PEERS, Alarm, all_peers
from fault_runs import Case, cases, train
from fault_score import Outcome, departs, judged, record, score
from fault_table import FAULTS, nothing
from machine import machine


def twin_of(case: Case, longest: int) -> Case:
    """The case whose fault-free run serves: of all cases that differ in nothing but the fault, as long as the longest."""
    return replace(case, layer=None, at=case.at + longest - case.steps)


def run_faults(group: Sequence[Case], peers: frozenset[str]) -> list[tuple[Outcome | None, dict[str, Alarm | None]]]:
    """All cases that share a twin; None for those that do not depart from it."""
    torch.set_num_threads(1)
    twin = record(partial(train, twin_of(group[0], max(case.steps for case in group)), faulty=False))
    done: list[tuple[Outcome | None, dict[str, Alarm | None]]] = []
    for case in group:
        faulty = record(partial(train, case, faulty=True))
        if not departs(case, faulty, twin):
            done.append((None, {}))
            continue
        eager = replace(case, compiled=False)
        alarms = all_peers(lambda recording, eager=eager: train(eager, recording), faulty.losses) if case.name in peers else {}
        done.append((score(case, faulty, twin), alarms))
    return done


def run_healthy(kind: str, seed: int, peers: bool) -> tuple[str, int, str | None, dict[str, Alarm | None]]:
    """One healthy run, and the message of the alarm, if there was one."""
    torch.set_num_threads(1)
    run = record(lambda recording: train_healthy(kind, seed, recording))
    failure, _ = judged(run)
    alarms = all_peers(lambda recording: train_healthy(kind, seed, recording), run.losses) if peers else {}
    return kind, seed, None if failure is None else f"{failure.trigger}: {failure.message}", alarms


def grouped(all_cases: Iterable[Case]) -> list[list[Case]]:
    """By twin; those of a compiled model in one group, as compiling takes longest, and these first."""
    groups: dict[tuple[object, ...], list[Case]] = defaultdict(list)
    for case in all_cases:
        quiet = "" if case.of.before is nothing else case.fault
        groups[case.model, case.optimizer, case.dtype, case.compiled, case.seed, quiet].append(case)
    return sorted(groups.values(), key=lambda group: (not group[0].compiled, group[0].model))


def percent(values: Iterable[bool | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):6.1%}" if known else "     -"


def median(values: Iterable[int | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.median(known):5.0f}" if known else "    -"


COLUMNS: tuple[tuple[str, Callable[[list[Outcome]], str]], ...] = (
    ("n", lambda rows: f"{len(rows):4}"),
    ("found", lambda rows: percent(row.detected for row in rows)),
    ("delay", lambda rows: median(row.delay for row in rows)),
    ("lead", lambda rows: median(row.lead for row in rows)),
    ("layer", lambda rows: percent(row.layer_first for row in rows)),
    ("top 3", lambda rows: percent(row.layer_top3 for row in rows)),
    ("site", lambda rows: percent(row.site_right for row in rows)),
    ("cause", lambda rows: percent(row.cause_right for row in rows)),
)


def print_faults(outcomes: list[Outcome]) -> None:
    print(f"{'fault':32}" + "".join(f"{name:>8}" for name, _ in COLUMNS) + "  cause in the table")
    groups = {name: [row for row in outcomes if row.case.fault == name] for name in FAULTS}
    for name, rows in (*groups.items(), ("all", outcomes)):
        causes = " or ".join(FAULTS[name].causes) if name in FAULTS else ""
        if rows:
            print(f"{name:32}" + "".join(f"{show(rows):>8}" for _, show in COLUMNS) + f"  {causes}")
    print("delay and lead: medians in steps; lead counts up to where the loss shows it; layer, site: where there is a guilty one")


def print_peers(faults: list[tuple[Outcome, dict[str, Alarm | None]]], healthy: list[Any]) -> None:
    """The three tools beside nobs: on the cases and the healthy runs that went through all four."""
    faults, healthy = [pair for pair in faults if pair[1]], [run for run in healthy if run[3]]
    rows = [row for row, _ in faults]
    print(f"\nthe same {len(rows)} faults and {len(healthy)} healthy runs through other tools")
    print(f"{'tool':26}{'found':>8}{'layer':>8}{'cause':>8}{'false alarms in healthy runs':>32}")
    cells = (percent(r.detected for r in rows), percent(r.layer_first for r in rows), percent(r.cause_right for r in rows))
    false = sum(alarm is not None for _, _, alarm, _ in healthy)
    print(f"{'nobs':26}" + "".join(f"{cell:>8}" for cell in cells) + _alarms(false, len(healthy)))
    for name in PEERS:
        alarms = [(row.case, said[name]) for row, said in faults]
        found = [alarm is not None and alarm.step >= case.at for case, alarm in alarms]
        layers = [bool(a and a.step >= c.at and a.names(c.layer)) for c, a in alarms if c.layer is not None]
        false = sum(said[name] is not None for _, _, _, said in healthy)
        print(f"{name:26}{percent(found):>8}{percent(layers):>8}{'-':>8}" + _alarms(false, len(healthy)))


def _alarms(false: int, of: int) -> str:
    return f"{false:>20} of {of} ({false / max(1, of):.1%})"


def print_healthy(healthy: list[Any]) -> None:
    false = [(kind, seed, alarm) for kind, seed, alarm, _ in healthy if alarm]
    print(f"\nhealthy runs: {len(healthy)} of {len({kind for kind, *_ in healthy})} kinds; false alarms: {len(false)}")
    for kind, seed, alarm in false:
        print(f"  {kind} #{seed}: {alarm}")


def calibration(outcomes: list[Outcome]) -> dict[str, tuple[int, int]]:
    """rule -> (right, said): as `nobs/diagnosis/calibration.py` holds it."""
    counts: dict[str, list[bool]] = defaultdict(list)
    for row in outcomes:
        if row.rule is not None and row.detected:
            counts[row.rule].append(row.right)
    return {rule: (sum(right), len(right)) for rule, right in sorted(counts.items())}


def print_calibration(outcomes: list[Outcome]) -> None:
    print("\nconfidence as printed in reports, and how often cause and layer were right")
    said = [row for row in outcomes if row.confidence is not None and row.detected]
    for low, high in ((0.0, 0.5), (0.5, 0.8), (0.8, 0.9), (0.9, 0.95), (0.95, 1.01)):
        rows = [row for row in said if low <= (row.confidence or 0) < high]
        if rows:
            right = [row.right for row in rows]
            mean = np.mean([row.confidence for row in rows])
            print(f"  {low:.2f} to {min(high, 1):.2f}: {len(rows):4} findings, said {mean:6.1%}, right {np.mean(right):6.1%}")


def print_misses(outcomes: list[Outcome], most: int) -> None:
    missed = [row for row in outcomes if not (row.detected and row.right)]
    print(f"\nmisses: {len(missed)}")
    for row in missed[:most]:
        said = f"{row.cause} in {row.layer} by {row.rule} ({row.evidence[:160]})" if row.cause else "nothing"
        print(f"  {row.case.name}\n    {row.trigger or 'not detected'}: {said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=12, help="of each fault (12)")
    parser.add_argument("--seed", type=int, default=0, help="draws layers, steps and the rest of the cases (0)")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each healthy kind (10)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="cases and kinds whose name holds this text")
    parser.add_argument("--peers", type=int, default=4, help="of each fault and healthy kind so many through the other tools (4)")
    parser.add_argument("--calibrate", action="store_true", help="print the table of nobs/diagnosis/calibration.py")
    parser.add_argument("--json", type=Path, help="write every outcome there")
    options = parser.parse_args()
    chosen = [case for case in cases(options.cases, options.seed) if options.only in case.name]
    peers = frozenset(case.name for case in cases(options.peers, options.seed))
    kinds = [kind for kind in HEALTHY if options.only in kind]
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        faults = [pool.submit(run_faults, group, peers) for group in grouped(chosen)]
        odd = [pool.submit(run_healthy, kind, seed, seed < options.peers) for kind in kinds for seed in range(options.seeds)]
        told = [pair for job in faults for pair in job.result()]
        healthy = [job.result() for job in odd]
    scored = [(row, alarms) for row, alarms in told if row is not None]
    outcomes = [row for row, _ in scored]
    print(f"{len(told)} cases, of which {len(outcomes)} depart from their twins; torch {torch.__version__}\n")
    print_faults(outcomes)
    print_healthy(healthy)
    print_peers(scored, healthy)
    print_calibration(outcomes)
    print_misses(outcomes, 10)
    if options.calibrate:
        print("\nCOUNTS = " + json.dumps(calibration(outcomes), indent=4))
    if options.json:
        dump = {
            "machine": machine(),
            "faults": [{**asdict(row), "peers": _plain(alarms)} for row, alarms in scored],
            "healthy": [{"kind": k, "seed": s, "alarm": a, "peers": _plain(alarms)} for k, s, a, alarms in healthy],
        }
        options.json.write_text(json.dumps(dump, indent=1, default=str) + "\n")
    return 0


def _plain(alarms: dict[str, Alarm | None]) -> dict[str, int | None]:
    """Of each peer the step at which it stopped."""
    return {name: None if alarm is None else alarm.step for name, alarm in alarms.items()}


if __name__ == "__main__":
    sys.exit(main())
