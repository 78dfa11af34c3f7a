"""Where a model is measured: its taps, in the order of their lines. Frozen, and free of torch.

A *tap* is one place of the model that is measured once a step. Its measurement is one *line* of eight float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._columns import KINDS, OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD
from .errors import UnknownLayer, explain


@dataclass(frozen=True)
class Tap:
    """One place of the model: `site` of `layer`, of one of the four KINDS."""

    layer: str
    layer_type: str
    site: str
    kind: str


@dataclass(frozen=True)
class Shard:
    """Which part of a tensor that is spread over ranks this rank holds: part `index` of `of` that do not overlap.

    Ranks with the same index hold the same part. An `addend` is not a part but one term of a sum, which is not made yet: of it
    no norm of the whole follows. A tensor without a shard is whole on its rank.
    """

    index: int
    of: int
    addend: bool = False


WHOLE = Shard(0, 1)


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
    def of_layer(self) -> Mapping[str, list[int]]:
        """layer -> its lines, ascending; layers in the order of registration."""
        lines: dict[str, list[int]] = {}
        for line, tap in enumerate(self.taps):
            lines.setdefault(tap.layer, []).append(line)
        return lines

    @cached_property
    def of_kind(self) -> Mapping[str, NDArray[np.intp]]:
        """kind -> the lines of that kind, ascending."""
        return {kind: np.array([i for i, t in enumerate(self.taps) if t.kind == kind], dtype=np.intp) for kind in KINDS}

    @cached_property
    def judged(self) -> NDArray[np.intp]:
        """The lines whose norms triggers judge: outputs, gradients of parameters, parameters."""
        return np.concatenate([self.of_kind[kind] for kind in (OUTPUT, PARAMETER_GRAD, PARAMETER)])

    @cached_property
    def are_gradients(self) -> NDArray[np.bool_]:
        """Bool `[taps]`: which lines are gradients, of outputs or of parameters."""
        return np.array([tap.kind in (OUTPUT_GRAD, PARAMETER_GRAD) for tap in self.taps], dtype=np.bool_)

    @cached_property
    def gradients(self) -> NDArray[np.intp]:
        """For each parameter, in the order of `of_kind`, the line of its gradient; -1 where there is none."""
        taps = [self.taps[i] for i in self.of_kind[PARAMETER]]
        return np.array([self.lines.get((tap.layer, f"{tap.site}.grad"), -1) for tap in taps], dtype=np.intp)

    def with_gradient(self, ran: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Of which taps ran, `[..., taps]`: which parameters have a gradient, in the order of `of_kind`."""
        return np.where(self.gradients >= 0, ran[..., self.gradients], False)

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

    @cached_property
    def _columns(self) -> NDArray[np.intp] | None:
        """The gradients of each layer, `[most, layers]`, where a layer with fewer has its first again; None where one has so many
        more than the others that this would be long."""
        order, begins = self._groups
        counts = np.diff(begins, append=len(order))
        rounds = np.arange(counts.max(initial=0))[:, None]
        few = rounds.size * counts.size <= 4 * order.size
        return order[begins + np.where(rounds < counts, rounds, 0)] if few else None

    def largest_of_layers(self, values: NDArray[Any]) -> NDArray[Any]:
        """Of one number for each gradient, in the order of `of_kind`, the largest of each layer; NaN where all are."""
        if self._columns is not None and len(values):  # as a rule: it takes a third of the time
            largest: NDArray[Any] = np.fmax.reduce(values[self._columns], axis=0)
            return largest
        order, begins = self._groups
        return np.fmax.reduceat(values[order], begins) if len(begins) else values[:0]

    @cached_property
    def patterns(self) -> list[tuple[bytes, Any]]:
        """How the last steps ran: a place for what `_readings` knows of them."""
        return []

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
