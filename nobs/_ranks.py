"""What all ranks of a run have written, merged: who was first, who differs, and norms of the whole. Frozen, and free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ._columns import Floats
from ._schema import Failure, Report

STATES = {
    "failed": "failed",
    "called": "stopped",
    "exception": "exception",
    "sigterm": "SIGTERM",
    "killed": "died",
    "ended": "ended",
    "running": "running",
    "unknown": "lives, or died",
    "unreadable": "unreadable",
    "missing": "missing",
}
"""How a rank stands, and how that is said: "called" is one that stopped because another had failed."""


@dataclass(frozen=True)
class Wrong:
    """What was not finite first on a rank, in its first step with such a value.

    Attributes:
        layer: None where it is the loss.
        own: an output, an output's gradient or the loss, which no reduction has touched.
        phase: 0 parameters, 1 forward, 2 the loss, 3 backward.
        came_in: nothing that ran before it in its phase was finite on this rank: it may have come from another one.
        place: within the phase, in the order of computation.
        whole: all of the tensor lies on this rank.
    """

    step: int
    layer: str | None
    site: str
    own: bool
    phase: int
    came_in: bool
    place: float
    whole: bool


@dataclass(frozen=True)
class Word:
    """What a rank has to say.

    Attributes:
        file: where it was read; None for a rank that wrote nothing.
        state: one of STATES.
        last_step: of its newest row; None without one.
        failure: what its own triggers saw, or were told by nobody else.
        exception: what ended it, or why its file cannot be read.
        loss, gradient, output: at the decisive step: the loss, the norm of all gradients on this rank, that of the output of the
            layer that the report names; None where it was not recorded.
        wrong: what was not finite first on it, if that was at the decisive step.
    """

    rank: int
    file: str | None
    state: str
    first_step: int | None = None
    last_step: int | None = None
    failure: Failure | None = None
    exception: str | None = None
    loss: float | None = None
    gradient: float | None = None
    output: float | None = None
    wrong: Wrong | None = None


@dataclass(frozen=True)
class First:
    """Where it began: rank (None: of several, nobody can tell of which), layer, site and step, and the sentence that says why.

    `ranks` are those that had it in that step.
    """

    rank: int | None
    ranks: tuple[int, ...]
    layer: str | None
    site: str | None
    step: int | None
    why: str


@dataclass(frozen=True, eq=False)
class Norms:
    """Norms of the whole, over `steps`: each float64 `[T]`, NaN where a part is not known.

    Attributes:
        sites: of each parameter, and gradient of one, that ranks share, by layer and site.
        gradient: of all gradients of all parameters together, as `clip_grad_norm_` would find it.
    """

    steps: tuple[int, ...]
    sites: Mapping[tuple[str, str], Floats]
    gradient: Floats


@dataclass(frozen=True)
class Apart:
    """Copies of a parameter, or of a part of one, that differ: since which step, and on which ranks, the fewer ones."""

    layer: str
    site: str
    step: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Ranks:
    """A run of several ranks.

    Attributes:
        step: the one of which the words' numbers are: the decisive one, or the last that all have where nothing failed.
        words: one of each rank, missing ones too.
        late: the ranks that stopped, or are, at least two steps behind the furthest.
        first: None where nothing failed.
        report: of the rank that was first, else of the lowest.
        file: where that was read.
        apart: copies of parameters that differ.
    """

    world_size: int
    step: int | None
    words: tuple[Word, ...]
    late: tuple[int, ...]
    first: First | None
    report: Report
    file: str
    norms: Norms
    apart: tuple[Apart, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks that wrote nothing."""
        return tuple(word.rank for word in self.words if word.state == "missing")


def folded(ranks: Iterable[int]) -> str:
    """Rank numbers in few words: "0-3, 5, 7-1023"."""
    spans: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in spans)


def named(ranks: Iterable[int]) -> str:
    """ "rank 1", "ranks 0, 2-7"."""
    there = set(ranks)
    return f"rank{'s' if len(there) != 1 else ''} {folded(there)}"
