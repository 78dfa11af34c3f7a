"""What is new of a run, in a line: for a log, and for a program."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._codec import number, plain_failure
from .._names import printable
from .._schema import Report
from ..render._scene import Scene
from ._follow import Follower


def plain_line(scene: Scene) -> str:
    """`step 1234  loss 0.123  3.4 steps/s  no trigger`."""
    parts = [f"step {scene.steps[-1]}" if len(scene.steps) else "no step yet"]
    scalars = _last_scalars(scene)
    if "loss" in scalars:
        loss = number(scalars["loss"])
        parts.append(f"loss {loss}" if isinstance(loss, str) else f"loss {loss:.4g}")
    if scene.steps_per_s is not None:
        parts.append(f"{scene.steps_per_s:.3g} steps/s")
    if scene.failures:
        last = scene.failures[-1]
        parts.append(f"{printable(last.trigger)} at step {last.step}: {printable(last.message)}")
    else:
        parts.append("no trigger")
    if scene.state != "running":
        parts.append(f"silent for {scene.quiet_s} s" if scene.state == "silent" else scene.state)
    return "  ".join(parts)


def json_line(follower: Follower, scene: Scene) -> dict[str, Any]:
    """The same and more, as JSON can hold it; what is not finite is a string."""
    return {
        "step": int(scene.steps[-1]) if len(scene.steps) else None,
        "time_s": number(follower.last_time_s),
        "scalars": {name: number(value) for name, value in _last_scalars(scene).items()},
        "steps_per_s": number(scene.steps_per_s),
        "state": scene.state,
        "failures": [plain_failure(failure) for failure in scene.failures],
        "worst": _worst(follower, scene),
    }


def json_end(follower: Follower, report: Report) -> dict[str, Any]:
    """The last line: how it ended, the dump that the run made of it, and what the report says."""
    dump = follower.dump()
    return {
        "state": follower.state,
        "report": None if dump is None else str(dump),
        "summary": report.summary(),
        "failed": report.failed,
    }


def _last_scalars(scene: Scene) -> dict[str, float]:
    """Those of the last step."""
    return {name: float(values[-1]) for name, values in scene.scalars.items() if scene.given[name][-1]}


def _worst(follower: Follower, scene: Scene) -> dict[str, Any] | None:
    """The layer to look at: its norm, how many times its median that is, and since which step it is not finite."""
    worst = scene.worst
    if worst is None:
        return None
    norms = scene.sides[worst.side]
    row = norms.last[worst.layer]
    return {
        "layer": scene.layers[worst.layer],
        "site": follower.worst_site(worst.layer, worst.side),
        "norm": None if np.isnan(norms.values[row, worst.layer]) else number(float(norms.values[row, worst.layer])),
        "times_usual": None if worst.since is not None else number(float(np.float64(10.0) ** norms.last_rises[worst.layer])),
        "nonfinite_since_step": worst.since,
    }
