"""The merged report as strict JSON, as `_codec` writes that of one rank."""

from __future__ import annotations

import json
from typing import Any

from .._codec import facts, number, plain_failure
from .._columns import Floats
from .._ranks import Ranks, Word

FORMAT, VERSION = "nobs.ranks", 1


def dumps(ranks: Ranks) -> str:
    """The merged report as JSON text, one line a top-level key."""
    parts = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in _plain(ranks).items())
    return "{" + ",\n ".join(parts) + "}\n"


def _plain(ranks: Ranks) -> dict[str, Any]:
    sites: dict[str, dict[str, list[Any]]] = {}
    for (layer, site), norms in ranks.norms.sites.items():
        sites.setdefault(layer, {})[site] = _column(norms)
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "world_size": ranks.world_size,
        "step": ranks.step,
        "first": ranks.first and vars(ranks.first),
        "missing": ranks.missing,
        "late": ranks.late,
        "notes": ranks.notes,
        "ranks": [_word(word) for word in ranks.words],
        "apart": [vars(apart) for apart in ranks.apart],
        "norms": {"steps": ranks.norms.steps, "gradient": _column(ranks.norms.gradient), "sites": sites},
        "file": ranks.file,
        "report": facts(ranks.report),
    }


def _word(word: Word) -> dict[str, Any]:
    numbers = {name: number(getattr(word, name)) for name in ("loss", "gradient", "output")}
    failure = word.failure and plain_failure(word.failure)
    return {**vars(word), **numbers, "failure": failure, "wrong": word.wrong and vars(word.wrong)}


def _column(values: Floats) -> list[float | str | None]:
    return [number(float(value)) for value in values]
