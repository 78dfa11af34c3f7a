"""What was recorded: rows and histories. Frozen, and free of torch.

A *row* is all lines of one step plus the step's scalars. A *history* is the rows of the last steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ._columns import COLUMNS, DTYPES, ELEMENTS, FIRST, NEGINF, OUTPUT, PARAMETER, STATISTICS, Floats, read
from ._names import safe_text
from ._order import execution_order
from ._readings import Readings
from ._table import Shard, TapTable
from .errors import UnknownLayer, explain


def bad_counts(values: Floats, table: TapTable) -> Floats:
    """[..., taps]: the values of each line that are NaN or Inf where none may be; 0 where the tap did not run.

    -Inf is legal in outputs, where masks put it, and in parameters that have no gradient, which may be such masks.
    """
    values = np.asarray(values, dtype=np.float64)
    ran = np.isfinite(values[..., FIRST])
    outputs, parameters = table.of_kind[OUTPUT], table.of_kind[PARAMETER]
    with np.errstate(invalid="ignore"):  # a dump may hold any floats
        counts = STATISTICS["nonfinite"](values)
        counts[..., outputs] -= values[..., outputs, NEGINF]
        counts[..., parameters] -= np.where(table.with_gradient(ran), 0, values[..., parameters, NEGINF])
    return np.where(ran, np.nan_to_num(counts), 0)


@dataclass(frozen=True)
class Row:
    """One step, as it arrived on the host.

    `values` is `[taps, 8]` float32, decoded and unscaled; `scalars` holds the loss, the learning rate and whatever else was
    given to `step`; `batch` is whatever named the batch.
    """

    step: int
    time_s: float
    scalars: Mapping[str, float]
    table: TapTable
    values: NDArray[np.float32]
    batch: object = None
    _kinds: dict[tuple[str, str], Floats] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getitem__(self, key: tuple[str, str, str]) -> float:
        """`row["fc", "weight.grad", "norm"]`; NaN where the tap did not run."""
        layer, site, statistic = _three(key)
        return float(read(self.values[self.table.line(layer, site)], statistic))

    def kind(self, kind: str, statistic: str) -> Floats:
        """One statistic of all taps of a kind, float64 `[lines]`, in the order of `table.of_kind[kind]`; read only.

        Kept, as several triggers ask for the same.
        """
        if (kind, statistic) not in self._kinds:
            values = self._kinds[kind, statistic] = read(self.values.take(self.table.of_kind[kind], axis=0), statistic)
            values.setflags(write=False)
        return self._kinds[kind, statistic]

    @cached_property
    def readings(self) -> Readings:
        """What the triggers of the house ask: arrays that they share, computed when first asked for."""
        return Readings(self.table, self.values)


def _three(key: object) -> tuple[str, str, str]:
    if not isinstance(key, tuple) or len(key) != 3:
        example = 'history["fc", "weight.grad", "norm"]'
        raise UnknownLayer(explain(f"looking up {key!r}", "no three names", "a layer, a site and a statistic", example))
    return key


@dataclass(frozen=True)
class Site:
    """What a site held: `dtype` by name (None: not known), the number of `elements` (the most in any call), and which part of
    the whole that is, where ranks share it (None: all of it)."""

    dtype: str | None
    elements: int
    shard: Shard | None = None


@dataclass(frozen=True)
class Layer:
    """A layer, its place in the order of execution (None: it never ran), and its sites."""

    name: str
    type: str
    order: int | None
    sites: Mapping[str, Site]


@dataclass(frozen=True, eq=False)
class History:
    """The last steps of every tap.

    `steps` int64 `[T]`; `times_s` float64 `[T]` (Unix time, NaN where not known); `values` float32 `[T, taps, 8]`;
    `scalars[name]` float64 `[T]`, NaN where it was not given; `given[name]` bool `[T]`, which tells that NaN from a loss
    that was NaN; `batches` the text that named each batch; `shards[layer, site]` which part of a parameter, or of its gradient,
    this rank holds, where others hold the rest.
    """

    steps: NDArray[np.int64]
    table: TapTable
    values: NDArray[np.float32]
    scalars: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    given: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    batches: tuple[str | None, ...] = ()
    times_s: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    shards: Mapping[tuple[str, str], Shard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.times_s) != len(self.steps):
            object.__setattr__(self, "times_s", np.full(len(self.steps), np.nan))

    @staticmethod
    def of(rows: Sequence[Row], table: TapTable, shards: Mapping[tuple[str, str], Shard] | None = None) -> History:
        """Stack rows. Copies them: the ring goes on writing."""
        names = list(dict.fromkeys(name for row in rows for name in row.scalars))
        return History(
            steps=np.array([row.step for row in rows], dtype=np.int64),
            table=table,
            values=np.array([row.values for row in rows], dtype=np.float32).reshape(len(rows), len(table), len(COLUMNS)),
            scalars={n: np.array([row.scalars.get(n, np.nan) for row in rows], dtype=np.float64) for n in names},
            given={n: np.array([n in row.scalars for row in rows], dtype=np.bool_) for n in names},
            batches=tuple(None if row.batch is None else safe_text(row.batch) for row in rows),
            times_s=np.array([row.time_s for row in rows], dtype=np.float64),
            shards=dict(shards or {}),
        )

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"<nobs.History of {len(self)} steps of {len(self.table)} taps>"

    def __getitem__(self, key: tuple[str, str, str]) -> Floats:
        """`history["blocks.0.up", "output.grad", "norm"]`: float64 `[T]` over `steps`, NaN where the tap did not run.

        Raises:
            UnknownLayer: no such layer, site or statistic.
        """
        layer, site, statistic = _three(key)
        if not len(self.table):  # under NOBS_DISABLE=1, where a script must go on as it is
            return np.empty(0)
        return read(self.values[:, self.table.line(layer, site)], statistic)

    def rows(self) -> Iterator[Row]:
        """The rows, one by one, as triggers are shown them; where no time is known it is 0."""
        for i, (step, time_s) in enumerate(zip(self.steps.tolist(), np.nan_to_num(self.times_s).tolist(), strict=True)):
            scalars = {name: float(self.scalars[name][i]) for name, given in self.given.items() if given[i]}
            yield Row(step, time_s, scalars, self.table, self.values[i], self.batches[i] if self.batches else None)

    def only(self, layers: Sequence[str]) -> History:
        """The same steps of some layers."""
        wanted = set(layers)
        lines = [i for i, tap in enumerate(self.table.taps) if tap.layer in wanted]
        return replace(self, table=TapTable(tuple(self.table.taps[i] for i in lines)), values=self.values[:, lines])

    def where(self, there: NDArray[np.bool_]) -> History:
        """Some of the rows: bool `[T]`."""
        return replace(
            self,
            steps=self.steps[there],
            values=self.values[there],
            scalars={name: column[there] for name, column in self.scalars.items()},
            given={name: column[there] for name, column in self.given.items()},
            batches=tuple(batch for batch, kept in zip(self.batches, there, strict=False) if kept),
            times_s=self.times_s[there],
        )

    def row_of(self, step: int | None) -> int | None:
        """The place of a step in `steps`, the last where a run went back to a checkpoint; None where it is not there."""
        if step is None:
            return None
        rows = np.flatnonzero(self.steps == step)
        return int(rows[-1]) if rows.size else None

    def kind(self, kind: str, statistic: str) -> Floats:
        """One statistic of all taps of a kind: float64 `[T, lines]`, in the order of `table.of_kind[kind]`."""
        return read(self.values[:, self.table.of_kind[kind]], statistic)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers in execution order; those that never ran come last, in the order of registration."""
        groups = self.table.of_layer
        return tuple(
            Layer(name, self.table.taps[groups[name][0]].layer_type, place, self._sites(groups[name]))
            for name, place in self.order.items()
        )

    @cached_property
    def order(self) -> Mapping[str, int | None]:
        """Layer -> its place, in the same order; None for one that never ran. Costs less than `layers`, which knows all sites."""
        if not len(self.table):
            return {}
        groups = self.table.of_layer
        names = list(groups)
        ran = execution_order(np.stack([self._first_runs(lines) for lines in groups.values()], axis=1))
        places: dict[str, int | None] = {names[i]: place for place, i in enumerate(ran)}
        return places | {name: None for name in names if name not in places}

    def _first_runs(self, lines: list[int]) -> Floats:
        """When the output of a layer first ran, by step."""
        outputs = [line for line in lines if self.table.taps[line].kind == OUTPUT]
        return self.values[:, outputs[0], FIRST] if outputs else np.full(len(self), np.inf)

    def _sites(self, lines: list[int]) -> dict[str, Site]:
        """The sites that ran."""
        sites = {}
        for line in lines:
            ran = self.values[np.isfinite(self.values[:, line, FIRST]), line]
            if len(ran):
                code = round(float(ran[-1, FIRST] % 1) * 16)
                dtype = DTYPES[code] if 0 < code < len(DTYPES) else None
                tap = self.table.taps[line]
                sites[tap.site] = Site(dtype, int(ran[:, ELEMENTS].max()), self.shards.get((tap.layer, tap.site)))
        return sites
