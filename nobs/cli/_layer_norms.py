"""From the lines of a row to one norm a layer, forward and backward: a look at each row as it comes, and at no row twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .._columns import FIRST, OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD, Floats, read
from .._history import Row, bad_counts
from .._table import TapTable
from ..render._scene import SIDES

_NORMS_OF = {SIDES[0]: (OUTPUT, PARAMETER), SIDES[1]: (PARAMETER_GRAD, OUTPUT_GRAD)}
"""side -> the kinds whose largest norm counts, of those that a layer has the first."""
_BAD_OF = {SIDES[0]: (PARAMETER, OUTPUT), SIDES[1]: (OUTPUT_GRAD, PARAMETER_GRAD)}
"""side -> the kinds in which all must be finite."""


@dataclass(frozen=True, eq=False)
class LayerNorms:
    """A row, by layer: when each one's output first ran, and for each side its norm and whether not all was finite."""

    clocks: Floats
    norms: Mapping[str, Floats]
    bad: Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class _Groups:
    """The lines of some layers: those of the layer `owners[i]` begin at `begins[i]` of `lines`."""

    lines: NDArray[np.intp]
    begins: NDArray[np.intp]
    owners: NDArray[np.intp]

    @staticmethod
    def of(groups: Sequence[Sequence[int]]) -> _Groups:
        """The lines of each layer, some of which may have none."""
        owners = [layer for layer, lines in enumerate(groups) if lines]
        begins = np.cumsum([0, *(len(groups[layer]) for layer in owners)])[:-1]
        return _Groups(np.array([line for lines in groups for line in lines], np.intp), begins, np.array(owners, np.intp))

    def largest(self, values: NDArray[np.generic], without: NDArray[np.generic]) -> NDArray[np.generic]:
        """Of one value a line the largest of each layer; NaN counts as none, and without lines it is as in `without`."""
        if len(self.owners):
            without[self.owners] = np.fmax.reduceat(values[self.lines], self.begins)
        return without


@dataclass(frozen=True)
class LayerLines:
    """Which lines of a table belong to which layer."""

    table: TapTable

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The layers in the order of registration."""
        return tuple(self.table.of_layer)

    @cached_property
    def types(self) -> tuple[str, ...]:
        """What the layers are."""
        return tuple(self.table.taps[lines[0]].layer_type for lines in self.table.of_layer.values())

    def of_kinds(self, layer: str, kinds: Sequence[str]) -> list[int]:
        """The lines of a layer that are of some kinds."""
        return [line for line in self.table.of_layer[layer] if self.table.taps[line].kind in kinds]

    @cached_property
    def _norms(self) -> Mapping[str, _Groups]:
        return {
            side: _Groups.of(
                [next((lines for kind in kinds if (lines := self.of_kinds(name, [kind]))), []) for name in self.names]
            )
            for side, kinds in _NORMS_OF.items()
        }

    @cached_property
    def _bad(self) -> Mapping[str, _Groups]:
        return {side: _Groups.of([self.of_kinds(name, kinds) for name in self.names]) for side, kinds in _BAD_OF.items()}

    @cached_property
    def _outputs(self) -> _Groups:
        return _Groups.of([self.of_kinds(name, [OUTPUT])[:1] for name in self.names])

    def norms_of(self, row: Row) -> LayerNorms:
        """The norms of a row by layer, in the order of `names`."""
        norms, bad = read(row.values, "norm"), bad_counts(row.values, self.table) > 0
        count = len(self.names)
        return LayerNorms(
            self._outputs.largest(row.values[:, FIRST], np.full(count, np.inf)).astype(np.float64),
            {side: groups.largest(norms, np.full(count, np.nan)).astype(np.float64) for side, groups in self._norms.items()},
            {side: groups.largest(bad, np.zeros(count, np.bool_)).astype(np.bool_) for side, groups in self._bad.items()},
        )

    def site(self, row: Row, layer: str, side: str) -> str:
        """The site that a side of a layer is about: a bad one if there is one, else that with the largest norm."""
        bad = bad_counts(row.values, self.table) > 0
        norms = np.nan_to_num(read(row.values, "norm"), nan=-1.0, posinf=np.inf)
        lines = [line for kind in _NORMS_OF[side] for line in self.of_kinds(layer, [kind])]
        line = max(lines, key=lambda line: (bad[line], norms[line]))
        return self.table.taps[line].site
