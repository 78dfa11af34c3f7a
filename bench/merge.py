"""What `nobs merge` takes for many ranks: seconds, and memory beyond that of an empty process.

    python bench/merge.py                          # 10, 100 and 1,000 ranks: 2.2 GB of disk, given back at the end
    python bench/merge.py --ranks 10 --json FILE

Each black box holds 100 steps of 150 layers, 600 taps, of shards. Some outputs of the last rank, and all gradients of every
rank, have NaN from one step on, so that there is something to be looked at on each. Each number of ranks is merged in a process
of its own; the black boxes lie in the system's cache, as they were just written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import machine, save

from nobs._blackbox import Header, Status, this_process
from nobs._blackbox._writer import BoxFile
from nobs._columns import COLUMNS, KINDS, NAN
from nobs._history import Row
from nobs._merge import merge
from nobs._table import Shard, Tap, TapTable

LAYERS, STEPS, BORN = 150, 100, 97
SITES = ("output", "output.grad", "weight", "weight.grad")
TABLE = TapTable(tuple(Tap(f"blocks.{i}", "Linear", *pair) for i in range(LAYERS) for pair in zip(SITES, KINDS, strict=True)))


def write(folder: Path, rank: int, ranks: int) -> None:
    """The black box of a rank, whose parameters are shards."""
    shards = {(tap.layer, tap.site): Shard(rank, ranks) for tap in TABLE.taps if tap.site.startswith("weight")}
    known = "0.1.0", "2026-01-01T00:00:00Z", rank, ranks, {"torch": "2.13.0"}, STEPS, TABLE, ()
    file = BoxFile(folder, Header(*known, replace(this_process(), started="0"), shards), False)
    values = np.ones((len(TABLE), len(COLUMNS)), dtype=np.float32) + np.random.default_rng(rank).random((len(TABLE), 1)).astype(
        "f4"
    )
    values[:, 2:6] = 0
    values[:, -1] = 1 + np.arange(len(TABLE)) // 4
    for step in range(STEPS):
        row = values.copy()
        row[TABLE.of_kind["parameter.grad"], NAN] = 5 * (step >= BORN)
        row[TABLE.of_kind["output"][LAYERS // 2 :], NAN] = 5 * (step >= BORN and rank == ranks - 1)
        file.write(Row(step, 1.7e9 + step, {"loss": 2.0}, TABLE, row))
    file.tell(Status("failed"))
    file.close()


def measure(folder: Path) -> dict:
    """Seconds and megabytes of one merge, in this process."""
    before_mb = _most_mb()
    begin = time.perf_counter()
    merged = merge(folder)
    took_s = time.perf_counter() - begin
    assert merged.first is not None
    return {
        "ranks": len(merged.words),
        "first": [merged.first.rank, merged.first.layer, merged.first.step],
        "s": round(took_s, 2),
        "ms_a_rank": round(1000 * took_s / len(merged.words), 1),
        "memory_mb": round(_most_mb() - before_mb, 1),
        "box_mb": round((folder / "rank00000.blackbox").stat().st_size / 1e6, 2),
    }


def _most_mb() -> float:
    """The most memory that this process has had, by Linux's own count: `ru_maxrss` begins with what its parent had."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measure(options.folder)))
        return 0
    about, taken = machine(), []
    print(" ranks        s   ms a rank   MB more   first")
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory(prefix="nobs-merge-") as made:
            for rank in range(ranks):
                write(Path(made), rank, ranks)
            again = [sys.executable, __file__, "--folder", made]
            done = subprocess.run(again, capture_output=True, text=True, check=True)
        taken.append(json.loads(done.stdout))
        print("{ranks:6} {s:8} {ms_a_rank:11} {memory_mb:9}   {first}".format(**taken[-1]), flush=True)
    save(options.json, about, merges=taken)
    return 0


if __name__ == "__main__":
    sys.exit(main())
