"""One tensor in, one line of eight float32 out, and the fold of two lines: the arithmetic of a tap.

Every column is kept so that the maximum of two lines is their fold: `zeros` and `first`, which fold by minimum, are
stored negated until the host decodes them. The maximum is idempotent, so a layer that runs a second time under activation
checkpointing changes nothing, and micro-batches combine to the worst of the step.

Here it is said in torch's operations, twice, tested to agree with each other and with the kernels, which are faster
(`_kernels`). `_in_graph` has no branch on data and never waits for the device: it is what a graph holds where there is no
kernel. `_on_host`, for CPU tensors where no compiler was found, counts non-finite values only where the sum of squares says
there are any.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental import symbolic_shapes

from ._columns import COLUMNS, DTYPES, FIRST, ZEROS

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SIGNS = np.ones(len(COLUMNS), dtype=np.float32)
_SIGNS[[ZEROS, FIRST]] = -1

_CHUNK = 1 << 15
"""Elements summed in float32 at a time. Longer plain float32 sums drift: 1e-4 off at a million equal elements."""

_ROUNDED = {torch.float16: (65520.0, 2.0**-25), torch.bfloat16: (3.3961775292304957e38, 0.0)}
"""Half dtype -> from where on its rounding gives infinity, and up to where it gives zero; for other dtypes infinity and 0.

Inductor keeps a half value unrounded as long as it stays in registers, and there is where it is measured. What the user
finds in memory is its rounding: 70000 in float16 is infinite.
"""

_TINY, _LIFT = 1e-30, 2.0**70
"""Squares that sum to less may have lost bits in float32, or all: so gradients vanish. Lifted, values that small keep them."""

surely = getattr(symbolic_shapes, "guard_or_false", bool)
"""Whether a condition on sizes holds; False where a size is data (rows chosen by a mask), on which no graph may branch."""


def blank(lines: int, device: torch.device | str) -> Tensor:
    """Lines of taps that did not run, `[lines, 8]` float32: what `fold` starts from."""
    values = torch.zeros(lines, len(COLUMNS), dtype=torch.float32, device=device)
    values[:, ZEROS] = -1
    values[:, FIRST] = -math.inf
    return values


def decode(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lines as the device keeps them -> lines as COLUMNS describes them. Copies."""
    return values * _SIGNS


def measurable(x: Tensor) -> bool:
    """Whether a tensor has a norm: strided, floating or complex, of at least 16 bits (float8 has no arithmetic)."""
    dtype = x.dtype
    number = (dtype.is_floating_point or dtype.is_complex) and dtype.itemsize > 1
    return number and x.layout == torch.strided and not x.is_nested


def measure(x: Tensor, clock: Tensor | float = 1) -> Tensor:
    """The line of a tensor, `[8]` float32 on its device, ready to fold.

    Args:
        x: any strided floating or complex tensor; a complex one counts each part, so a number is two elements.
        clock: the step's clock, `[1]` float32; or a number to stand for it, where there is no place in the order.

    Cost: about one read of `x`. Eager on CPU reads it three times; elsewhere no host sync.
    """
    x = x.detach()  # the line is a reading: no gradient may flow through it, nor keep the graph alive
    x = x.clone() if x._is_zerotensor() else x  # zeros by agreement, without memory
    if x.device.type != "cpu":
        return measure_in_graph(x, clock)
    ran = -_dtype_code(x) - float(clock)
    x = _real(x.resolve_conj()).resolve_neg()  # in memory `z.conj()` is z, and `z.conj().imag` has the sign of z's
    return torch.tensor([*_on_host(x), x.numel(), ran], dtype=torch.float32, device="cpu")  # whatever the default device is


def measure_in_graph(x: Tensor, clock: Tensor | float = 1) -> Tensor:
    """The same as `measure`, with nothing that depends on values."""
    code = -_dtype_code(x)
    x = x.detach()
    x = _real(x.clone() if x.is_complex() else x)  # a copy is conjugated, where `resolve_conj` leaves no trace in a graph
    elements = x.new_full((), x.numel(), dtype=torch.float32)
    first = code - clock.reshape(()) if isinstance(clock, Tensor) else x.new_full((), code - clock, dtype=torch.float32)
    return torch.cat([_in_graph(x), torch.stack([elements, first])])


def fold(line: Tensor, measured: Tensor) -> None:
    """Fold a measurement into a line, in place: the line is a fixed slot that a captured graph writes to."""
    line.copy_(torch.maximum(line, measured))


def code_of(dtype: torch.dtype) -> int:
    """The place of a dtype in DTYPES; 0 for any that is not there."""
    name = str(dtype).removeprefix("torch.")
    return DTYPES.index(name) if name in DTYPES else 0


def _dtype_code(x: Tensor) -> float:
    return code_of(x.dtype) / 16


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _in_graph(x: Tensor) -> Tensor:
    """norm, absmax, nan, posinf, neginf, -zeros: six reductions in one pass, `[6]` float32."""
    if surely(x.numel() == 0):
        return x.new_zeros(6, dtype=torch.float32)
    if x.dim() == 0:
        x = x.reshape(1)
    top, least = _ROUNDED.get(x.dtype, (math.inf, 0.0))
    dims = _row_dims(x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Comparisons, not isnan and isfinite: Inductor vectorises them, and a whole tap costs half.
    finite = torch.where(x.abs() < top, x, 0)
    norm = _norm(finite, dims)
    masks = (x != x, x >= top, x <= -top, x.abs() <= least)
    counts = [mask.sum(dims or None, dtype=torch.float32).sum() for mask in masks]
    # With no finite value there is no norm; NaN outlasts any fold, as the worst that the step saw.
    elements, peaks = x.numel(), finite.abs()
    if not surely(elements > 0):  # a size that is data may turn out to be zero, of which there is no mean and no maximum
        elements, peaks = torch.sym_max(elements, 1), torch.cat([peaks.flatten(), peaks.new_zeros(1)])  # type: ignore[no-untyped-call]
        dims = ()
    norm = torch.where(counts[0] + counts[1] + counts[2] < elements, norm, math.nan)
    absmax = peaks.amax(dims).amax()
    return torch.stack([norm.float(), absmax.float(), *counts[:3], -counts[3] / elements])


def _norm(finite: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The norm, `[]`; the squares summed over `dims` in float32, or all of them in float64."""
    wide = _widest(finite)
    if not dims:
        return finite.to(wide).square().sum().sqrt()
    lifted = finite * _LIFT
    plain, tiny = ((part * part).sum(dims).sum(dtype=wide) for part in (finite, lifted))
    return torch.where(plain < _TINY, tiny.sqrt() / _LIFT, plain.sqrt())


def _row_dims(x: Tensor) -> tuple[int, ...]:
    """The trailing dimensions to sum first, in float32; () when a row would be too long, or the tensor has no rows.

    Two stages keep the sum exact to 1e-6 at any size and, in a CPU kernel, cost a third less than one stage in float64.
    """
    if x.dim() < 2 or x.dtype == torch.float64:
        return ()
    dims = tuple(range(2, x.dim())) if x.dim() > 3 else (x.dim() - 1,)
    return dims if surely(math.prod([x.shape[d] for d in dims]) <= _CHUNK) else ()


def _widest(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def _on_host(x: Tensor) -> tuple[float, float, float, float, float, float]:
    """The same six of a CPU tensor, as Python floats: reading them waits for nothing."""
    if x.numel() == 0:
        return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if not x.is_contiguous():  # the order of elements does not matter: a dense tensor is flattened without a copy
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    flat = x.reshape(-1)
    squares = nan = posinf = neginf = zeros = 0.0
    for part in torch.split(flat, _CHUNK):  # a chunk stays in the cache from the first pass to the second
        # Not dot: as fast, but on one thread it adds up in a straight line, and is 1e-5 off where all elements are equal.
        squares += float((part * part).sum())
        # NumPy's, without a branch an element: torch.count_nonzero takes 25 times as long where half the values are zero.
        zeros += np.count_nonzero(part.numpy() == 0)
    if not math.isfinite(squares):
        nan, posinf, neginf = (float(torch.count_nonzero(m)) for m in (flat.isnan(), flat == math.inf, flat == -math.inf))
        flat = torch.where(flat.abs() < math.inf, flat, 0)
        squares = float(flat.double().square().sum()) if nan + posinf + neginf < x.numel() else math.nan
    low, high = torch.aminmax(flat)
    absmax = max(-float(low), float(high), 0.0)
    if absmax > 0 and squares < _TINY:
        squares = float(flat.double().square().sum())
    return math.sqrt(squares), absmax, nan, posinf, neginf, -zeros / x.numel()
