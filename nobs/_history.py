"""What was recorded: taps, rows and histories. Frozen, and free of torch.

A *tap* is one place of the model that is measured once a step. Its measurement is one *line* of eight float32. A *row* is
all lines of one step plus the step's scalars. A *history* is the rows of the last steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._columns import COLUMNS, DTYPES, ELEMENTS, FIRST, KINDS, NEGINF, OUTPUT, PARAMETER, PARAMETER_GRAD, STATISTICS, Floats, read
from ._names import safe_text
from ._order import execution_order
from .errors import UnknownLayer, explain


@dataclass(frozen=True)
class Tap:
    """One place of the model: `site` of `layer`, of one of the four KINDS."""

    layer: str
    layer_type: str
    site: str
    kind: str


@dataclass(frozen=True)
class TapTable:
    """The taps of a model in the order of their lines, and the ways to look them up."""

    taps: tuple[Tap, ...]

    def __len__(self) -> int:
        return len(self.taps)

    @cached_property
    def lines(self) -> Mapping[tuple[str, str], int]:
        """(layer, site) -> line."""
        return {(tap.layer, tap.site): i for i, tap in enumerate(self.taps)}

    @cached_property
    def of_kind(self) -> Mapping[str, NDArray[np.intp]]:
        """kind -> the lines of that kind, ascending."""
        return {kind: np.array([i for i, t in enumerate(self.taps) if t.kind == kind], dtype=np.intp) for kind in KINDS}

    @cached_property
    def gradients(self) -> NDArray[np.intp]:
        """For each parameter, in the order of `of_kind`, the line of its gradient; -1 where there is none."""
        taps = [self.taps[i] for i in self.of_kind[PARAMETER]]
        return np.array([self.lines.get((tap.layer, f"{tap.site}.grad"), -1) for tap in taps], dtype=np.intp)

    @cached_property
    def trained_layers(self) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """For each gradient of a parameter, in the order of `of_kind`: the parameter's line, the output's of its layer, and a
        number of the layer, from 0 on. -1 where there is no such line: a ParameterList has no output."""
        taps = [self.taps[i] for i in self.of_kind[PARAMETER_GRAD]]
        parameters = [self.lines.get((tap.layer, tap.site.removesuffix(".grad")), -1) for tap in taps]
        outputs = [self.lines.get((tap.layer, OUTPUT), -1) for tap in taps]
        numbers = {layer: i for i, layer in enumerate(dict.fromkeys(tap.layer for tap in taps))}
        of_layer = [numbers[tap.layer] for tap in taps]
        return np.array(parameters, np.intp), np.array(outputs, np.intp), np.array(of_layer, np.intp)

    @cached_property
    def _groups(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """How to sort gradients by layer, and where each layer then begins."""
        of_layer = self.trained_layers[2]
        order = np.argsort(of_layer, kind="stable")
        return order, np.flatnonzero(np.diff(of_layer[order], prepend=-1))

    def largest_of_layers(self, values: NDArray[Any]) -> NDArray[Any]:
        """Of one number for each gradient, in the order of `of_kind`, the largest of each layer."""
        order, begins = self._groups
        return np.fmax.reduceat(values[order], begins) if len(begins) else values[:0]

    def line(self, layer: str, site: str) -> int:
        """The line of a layer's site, or `UnknownLayer` naming what there is."""
        if (layer, site) in self.lines:
            return self.lines[layer, site]
        sites = [tap.site for tap in self.taps if tap.layer == layer]
        what = f"no site {site!r} in the layer {layer!r}" if sites else f"no layer {layer!r}"
        names = ", ".join(repr(name) for name in dict.fromkeys(tap.layer for tap in self.taps))
        there = f"one of the sites {sites}" if sites else f"one of {names[:200]}"
        type_this = "history.layers lists them in execution order"
        raise UnknownLayer(explain(f"looking up [{layer!r}, {site!r}, ...]", what, there, type_this))


def bad_counts(values: Floats, table: TapTable) -> Floats:
    """[..., taps]: the values of each line that are NaN or Inf where none may be; 0 where the tap did not run.

    -Inf is legal in outputs, where masks put it, and in parameters that have no gradient, which may be such masks.
    """
    values = np.asarray(values, dtype=np.float64)
    ran = np.isfinite(values[..., FIRST])
    outputs, parameters = table.of_kind[OUTPUT], table.of_kind[PARAMETER]
    trained = np.where(table.gradients >= 0, ran[..., table.gradients], False)
    with np.errstate(invalid="ignore"):  # a dump may hold any floats
        counts = STATISTICS["nonfinite"](values)
        counts[..., outputs] -= values[..., outputs, NEGINF]
        counts[..., parameters] -= np.where(trained, 0, values[..., parameters, NEGINF])
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
            values = self._kinds[kind, statistic] = read(self.values[self.table.of_kind[kind]], statistic)
            values.setflags(write=False)
        return self._kinds[kind, statistic]


def _three(key: object) -> tuple[str, str, str]:
    if not isinstance(key, tuple) or len(key) != 3:
        example = 'history["fc", "weight.grad", "norm"]'
        raise UnknownLayer(explain(f"looking up {key!r}", "no three names", "a layer, a site and a statistic", example))
    return key


@dataclass(frozen=True)
class Site:
    """What a site held: `dtype` by name (None: not known) and the number of `elements` (the most in any call)."""

    dtype: str | None
    elements: int


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

    `steps` int64 `[T]`; `times_s` float64 `[T]` (Unix time, NaN when read from JSON); `values` float32 `[T, taps, 8]`;
    `scalars[name]` float64 `[T]`, NaN where it was not given; `given[name]` bool `[T]`, which tells that NaN from a loss
    that was NaN; `batches` the text that named each batch.
    """

    steps: NDArray[np.int64]
    table: TapTable
    values: NDArray[np.float32]
    scalars: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    given: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    batches: tuple[str | None, ...] = ()

    @staticmethod
    def of(rows: Sequence[Row], table: TapTable) -> History:
        """Stack rows. Copies them: the ring goes on writing."""
        names = list(dict.fromkeys(name for row in rows for name in row.scalars))
        return History(
            steps=np.array([row.step for row in rows], dtype=np.int64),
            table=table,
            values=np.array([row.values for row in rows], dtype=np.float32).reshape(len(rows), len(table), len(COLUMNS)),
            scalars={n: np.array([row.scalars.get(n, np.nan) for row in rows], dtype=np.float64) for n in names},
            given={n: np.array([n in row.scalars for row in rows], dtype=np.bool_) for n in names},
            batches=tuple(None if row.batch is None else safe_text(row.batch) for row in rows),
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
        if not len(self.table):
            return ()
        groups: dict[str, list[int]] = {}
        for line, tap in enumerate(self.table.taps):
            groups.setdefault(tap.layer, []).append(line)
        names = list(groups)
        order = [names[i] for i in execution_order(np.stack([self._first_runs(lines) for lines in groups.values()], axis=1))]
        never = [name for name in names if name not in set(order)]
        return tuple(
            Layer(
                name,
                self.table.taps[groups[name][0]].layer_type,
                i if i < len(order) else None,
                self._sites(groups[name]),
            )
            for i, name in enumerate([*order, *never])
        )

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
                sites[self.table.taps[line].site] = Site(dtype, int(ran[:, ELEMENTS].max()))
        return sites
