"""Exact order statistics of maps that stay in registers.

Non-negative floats order as their bits do, as integers. So the element of a given rank is found by counting: every
round counts the elements below CUTS cuts through the interval of bits that holds it, and keeps one part. Rounds end as
soon as a cut falls between the two elements that a quantile interpolates, after three to six for numbers that differ.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Just above the bits of 1.0, by what rounding may add to a probability.
_ABOVE_ONE = tl.constexpr(0x3F800040)
# The first cuts lie an octave apart: nearly all quantiles of attention lie in the highest ones.
_OCTAVE = tl.constexpr(1 << 23)
_LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _is_less(a, b):
    """1 where a < b, integers less than 2^31 apart, by the difference's sign: LLVM would make a vector of bits of a sum
    of comparisons, which costs a stack frame."""
    return ((a - b).to(tl.uint32) >> 31).to(tl.int32)


@triton.jit
def _pair(bits, cut, step):
    """Whether `bits` [CELLS, T] lie below two cuts, in two halves of a word that add up to 2^16 - 1 elements."""
    return _is_less(bits, cut) + (_is_less(bits, cut - step) << 16)


@triton.jit
def _count(bits, cut, step, CUTS: tl.constexpr):
    """How many elements of every column lie below cut, cut - step, .. [T]: pairs of counts [T, CUTS // 2]."""
    tl.static_assert(CUTS == 4 or CUTS == 8)
    cut, step = cut[None, :], step[None, :]
    pairs = tl.join(_pair(bits, cut, step), _pair(bits, cut - 2 * step, step))
    if CUTS == 8:
        cut -= 4 * step
        pairs = tl.join(pairs, tl.join(_pair(bits, cut, step), _pair(bits, cut - 2 * step, step)))
    return tl.sum(tl.reshape(pairs, [bits.shape[0], bits.shape[1], CUTS // 2]), 0)


@triton.jit
def _ends(first, second):
    """The largest of every column of two tiles [CELLS, T], and the first row that holds it: (first, its row, second,
    its row), all [T]. Value and row are one number, so that it is one reduction."""
    backwards = ~tl.arange(0, first.shape[0]) & _LARGEST
    largest = tl.max((tl.join(first, second).to(tl.int64) << 32) + backwards[:, None, None], 0)  # [T, 2]
    values, rows = tl.split((largest >> 32).to(tl.int32)), tl.split(~largest.to(tl.int32) & _LARGEST)
    return values[0], rows[0], values[1], rows[1]


@triton.jit
def order_statistics(maps, real, rank, CUTS: tl.constexpr):
    """The elements of `rank` and `rank + 1`, counted upwards from 0, of every column of `maps` [CELLS, T], and the
    first row that holds each: (lower, upper, lower_at, upper_at), all [T].

    `maps` holds floats from 0 to 1. After the last rank comes the last once more. A column that is not `real` [T], or
    that holds NaN, gets numbers without meaning.
    """
    CELLS: tl.constexpr = maps.shape[0]
    bits = maps.to(tl.int32, bitcast=True) & _LARGEST
    # The element lies in low <= bits < high; `below` elements, more than rank, lie below high.
    high = tl.where(real, _ABOVE_ONE, 1)
    low = tl.zeros_like(high)
    below = low + CELLS
    step = low + _OCTAVE
    widest = CELLS - 1 - rank  # of the intervals; zero ends the search
    while widest > 0:
        pairs = _count(bits, high - step, step, CUTS)
        even, odd = pairs & 0xFFFF, pairs >> 16
        above = tl.sum(_is_less(rank, even) + _is_less(rank, odd), 1)  # [T]
        even, odd = tl.where(even > rank, even, CELLS), tl.where(odd > rank, odd, CELLS)
        below = tl.minimum(below, tl.min(tl.minimum(even, odd), 1))
        low = tl.where(above == CUTS, low, tl.maximum(low, high - (above + 1) * step))
        high -= above * step
        step = (high - low + CUTS) // (CUTS + 1)
        widest = tl.max(tl.where(below == rank + 1, 0, high - low - 1), 0)

    # The highest below `high`, and the lowest from there on, which its complement makes a highest as well.
    is_below = bits < high[None, :]
    lower, lower_at, following, following_at = _ends(tl.where(is_below, bits, -1), tl.where(is_below, ~_LARGEST, ~bits))
    alike = (below > rank + 1) | (rank + 1 == CELLS)
    upper, upper_at = tl.where(alike, lower, ~following), tl.where(alike, lower_at, following_at)
    return lower.to(tl.float32, bitcast=True), upper.to(tl.float32, bitcast=True), lower_at, upper_at
