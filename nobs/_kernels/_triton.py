"""The Triton kernels themselves; only imported where there is a Triton.

The fast pass adds up squares in float32, a lane at a time, and the lanes in float64; for the rest it looks at the bits:
without the sign, bits order as the numbers do, with infinity and then NaN on top. Where that says that a value is not finite,
or that squares may have left the range of float32, the program reads its part once more, in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

_TINY = tl.constexpr(1e-30)
_INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def _fast(x, begin, end, STEP, BLOCK: tl.constexpr):
    """Squares (float64), bits of the largest size and zeros of x[begin:end], read in strides of STEP."""
    squares = tl.zeros([BLOCK], tl.float32)
    top = tl.zeros([BLOCK], tl.int32)
    zeros = tl.zeros([BLOCK], tl.int32)
    lanes = tl.arange(0, BLOCK)
    start = begin
    while start + BLOCK <= end:
        v = tl.load(x + start + lanes).to(tl.float32)
        size = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        squares += v * v
        top = tl.maximum(top, size)
        zeros += tl.where(size == 0, 1, 0)
        start += STEP
    if start < end:
        there = lanes < end - start
        v = tl.load(x + start + lanes, mask=there, other=0.0).to(tl.float32)
        size = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        squares += v * v
        top = tl.maximum(top, size)
        zeros += tl.where(there & (size == 0), 1, 0)
    return tl.sum(squares.to(tl.float64)), tl.max(top), tl.sum(zeros).to(tl.float64)


@triton.jit
def _slow(x, begin, end, STEP, BLOCK: tl.constexpr):
    """Squares and largest of the finite values, and how many are NaN, Inf and -Inf: five float64."""
    squares = tl.zeros([BLOCK], tl.float64)
    top = tl.zeros([BLOCK], tl.float64)
    nan = tl.zeros([BLOCK], tl.int32)
    posinf = tl.zeros([BLOCK], tl.int32)
    neginf = tl.zeros([BLOCK], tl.int32)
    lanes = tl.arange(0, BLOCK)
    start = begin
    while start < end:
        v = tl.load(x + start + lanes, mask=lanes < end - start, other=0.0).to(tl.float32)
        finite = tl.where(tl.abs(v) < float("inf"), v, 0.0).to(tl.float64)
        squares += finite * finite
        top = tl.maximum(top, tl.abs(finite))
        nan += tl.where(v != v, 1, 0)
        posinf += tl.where(v == float("inf"), 1, 0)
        neginf += tl.where(v == -float("inf"), 1, 0)
        start += STEP
    return (
        tl.sum(squares),
        tl.max(top),
        tl.sum(nan).to(tl.float64),
        tl.sum(posinf).to(tl.float64),
        tl.sum(neginf).to(tl.float64),
    )


@triton.jit
def _take(x, begin, end, STEP, BLOCK: tl.constexpr):
    """Squares, largest, nan, posinf, neginf and zeros of x[begin:end], read in strides of STEP: six float64."""
    squares, bits, zeros = _fast(x, begin, end, STEP, BLOCK)
    top = bits.to(tl.float32, bitcast=True).to(tl.float64)
    nan = squares * 0
    posinf = squares * 0
    neginf = squares * 0
    if (bits >= _INFINITE) | (squares == float("inf")) | ((squares < _TINY) & (bits > 0)):
        squares, top, nan, posinf, neginf = _slow(x, begin, end, STEP, BLOCK)
    return squares, top, nan, posinf, neginf, zeros


@triton.jit
def _leave(sums, ROOM, squares, top, nan, posinf, neginf, zeros):
    """Six partial sums into a program's place in the scratch, `[6, ROOM]` float64."""
    tl.store(sums, squares)
    tl.store(sums + ROOM, top)
    tl.store(sums + 2 * ROOM, nan)
    tl.store(sums + 3 * ROOM, posinf)
    tl.store(sums + 4 * ROOM, neginf)
    tl.store(sums + 5 * ROOM, zeros)


@triton.jit
def _write(line, fresh, squares, top, nan, posinf, neginf, zeros, count, first):
    """The line of a tensor out of its sums (float64 scalars), folded into what stands there."""
    elements = count + squares * 0
    norm = tl.where((nan + posinf + neginf >= elements) & (elements > 0), float("nan"), tl.sqrt(squares))
    share = tl.where(elements > 0, -zeros / tl.maximum(elements, 1.0), 0.0)
    place = tl.arange(0, 8)
    m = tl.where(place == 0, norm, first + squares * 0)
    m = tl.where(place == 1, top, m)
    m = tl.where(place == 2, nan, m)
    m = tl.where(place == 3, posinf, m)
    m = tl.where(place == 4, neginf, m)
    m = tl.where(place == 5, share, m)
    m = tl.where(place == 6, elements, m).to(tl.float32)
    before = tl.load(line + place)
    folded = tl.where((m != m) | (before != before), float("nan"), tl.maximum(before, m))
    tl.store(line + place, tl.where(fresh != 0, m, folded))


@triton.jit(do_not_specialize=["count", "code"])
def fold(x, count, line, clock, sums, done, code, CLOCK: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr):
    """One tensor into its line. Up to MOST programs share it in strides; the last one to be done finishes."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    begin = program.to(tl.int64) * BLOCK
    squares, top, nan, posinf, neginf, zeros = _take(x, begin, count, programs.to(tl.int64) * BLOCK, BLOCK)
    last = True
    if MOST > 1:
        _leave(sums + program, MOST, squares, top, nan, posinf, neginf, zeros)
        tl.debug_barrier()  # all of this program's stores before its word that it is done
        last = tl.atomic_add(done, 1, sem="acq_rel") == programs - 1
    if last:
        if MOST > 1:
            tl.store(done, 0)
            at = sums + tl.arange(0, MOST)
            there = tl.arange(0, MOST) < programs
            squares = tl.sum(tl.load(at, mask=there, other=0.0, volatile=True))
            top = tl.max(tl.load(at + MOST, mask=there, other=0.0, volatile=True))
            nan = tl.sum(tl.load(at + 2 * MOST, mask=there, other=0.0, volatile=True))
            posinf = tl.sum(tl.load(at + 3 * MOST, mask=there, other=0.0, volatile=True))
            neginf = tl.sum(tl.load(at + 4 * MOST, mask=there, other=0.0, volatile=True))
            zeros = tl.sum(tl.load(at + 5 * MOST, mask=there, other=0.0, volatile=True))
        first = squares * 0 - 1
        if CLOCK:
            now = tl.load(clock) + 1
            tl.store(clock, now)
            first = squares * 0 - now
        _write(line, 0, squares, top, nan, posinf, neginf, zeros, count, first - code)


@triton.jit(do_not_specialize=["room"])
def read_all(places, counts, chunks, begins, sums, room, like, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk of one of many tensors: its sums into the scratch."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + program)
    x = tl.load(places + tensor).to(like.dtype)
    begin = (program - tl.load(begins + tensor)).to(tl.int64) * CHUNK
    end = tl.minimum(begin + CHUNK, tl.load(counts + tensor))
    squares, top, nan, posinf, neginf, zeros = _take(x, begin, end, BLOCK, BLOCK)
    _leave(sums + program, room, squares, top, nan, posinf, neginf, zeros)


@triton.jit(do_not_specialize=["room", "code"])
def fold_all(row, counts, begins, sums, room, lines, firsts, fresh, code, BLOCK: tl.constexpr):
    """The sums of one tensor's chunks into its line."""
    tensor = tl.program_id(0)
    begin, end = tl.load(begins + tensor), tl.load(begins + tensor + 1)
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    top = tl.zeros([BLOCK], tl.float64)
    nan = tl.zeros([BLOCK], tl.float64)
    posinf = tl.zeros([BLOCK], tl.float64)
    neginf = tl.zeros([BLOCK], tl.float64)
    zeros = tl.zeros([BLOCK], tl.float64)
    start = begin
    while start < end:
        at = sums + start + lanes
        there = lanes < end - start
        squares += tl.load(at, mask=there, other=0.0)
        top = tl.maximum(top, tl.load(at + room, mask=there, other=0.0))
        nan += tl.load(at + 2 * room, mask=there, other=0.0)
        posinf += tl.load(at + 3 * room, mask=there, other=0.0)
        neginf += tl.load(at + 4 * room, mask=there, other=0.0)
        zeros += tl.load(at + 5 * room, mask=there, other=0.0)
        start += BLOCK
    _write(
        row + tl.load(lines + tensor) * 8,
        tl.load(fresh + tensor),
        tl.sum(squares),
        tl.max(top),
        tl.sum(nan),
        tl.sum(posinf),
        tl.sum(neginf),
        tl.sum(zeros),
        tl.load(counts + tensor),
        -tl.load(firsts + tensor) - code,
    )
