"""Tiles of queries, keys and values. A head of any width is two pieces of powers of two, so that 40, 80 and 160 columns
do not fill tiles of 64, 128 and 256; the second piece may be absent (D2 = 0), and then stands for the first."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NO_COLUMNS = tl.constexpr(-1e30)


@triton.jit
def aligned(offset, ALIGN: tl.constexpr):
    """`offset`, a multiple of ALIGN as the host knows, so that the compiler sees it: heads of 40 or 80 elements are
    then read by wide loads. (Hints on arguments, `tl.multiple_of`, do not reach it.)"""
    return offset // ALIGN * ALIGN


@triton.jit
def load_piece(ptr, rows, inside, stride, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr):
    """Columns START.. of `rows` that are `inside`, zeros elsewhere: [ROWS, WIDTH]."""
    columns = START + tl.arange(0, WIDTH)
    mask = inside[:, None] & (columns < D)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def load_pieces(ptr, rows, inside, stride, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DOT: tl.constexpr):
    first = load_piece(ptr, rows, inside, stride, D, 0, D1, DOT)
    second = first
    if D2 > 0:
        second = load_piece(ptr, rows, inside, stride, D, D1, D2, DOT)
    return first, second


@triton.jit
def store_piece(ptr, tile, rows, inside, stride, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    columns = START + tl.arange(0, WIDTH)
    mask = inside[:, None] & (columns < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + columns[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_pieces(ptr, first, second, rows, inside, stride, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    store_piece(ptr, first, rows, inside, stride, D, 0, D1)
    if D2 > 0:
        store_piece(ptr, second, rows, inside, stride, D, D1, D2)


@triton.jit
def row_dots(a1, a2, b1, b2, D2: tl.constexpr, added=None):
    """a b^T, summed over both pieces of the head, and what is `added`: [ROWS_A, ROWS_B]."""
    out = tl.dot(a1, tl.trans(b1), added, input_precision="ieee")
    if D2 > 0:
        out = tl.dot(a2, tl.trans(b2), out, input_precision="ieee")
    return out


@triton.jit
def chunked_dots(
    a_ptr,
    a_rows,
    a_inside,
    a_stride,
    b_ptr,
    b_rows,
    b_inside,
    b_stride,
    D: tl.constexpr,
):
    """The same of rows in memory, 16 columns at a time: float32 is multiplied without matrix units on NVIDIA, and whole
    heads of it spill."""
    out = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    for start in range(0, D, 16):
        columns = start + tl.arange(0, 16)
        in_head = (columns < D)[None, :]
        a = tl.load(a_ptr + a_rows[:, None] * a_stride + columns[None, :], a_inside[:, None] & in_head, other=0.0)
        b = tl.load(b_ptr + b_rows[:, None] * b_stride + columns[None, :], b_inside[:, None] & in_head, other=0.0)
        out = tl.dot(a, tl.trans(b), out, input_precision="ieee")
    return out


@triton.jit
def row_products(
    a1,
    a2,
    a_ptr,
    a_rows,
    a_inside,
    a_stride,
    b_ptr,
    b_rows,
    b_inside,
    b_stride,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DOT: tl.constexpr,
):
    """a b^T of rows a, which are loaded as a1 and a2 unless they are float32, and rows b in memory."""
    if a_ptr.dtype.element_ty == tl.float32:
        out = chunked_dots(a_ptr, a_rows, a_inside, a_stride, b_ptr, b_rows, b_inside, b_stride, D)
    else:
        b1, b2 = load_pieces(b_ptr, b_rows, b_inside, b_stride, D, D1, D2, DOT)
        out = row_dots(a1, a2, b1, b2, D2)
    return out


@triton.jit
def add_weighted(acc1, acc2, weights, x1, x2, D2: tl.constexpr, DOT: tl.constexpr):
    """acc + weights x, for both pieces of x [COLUMNS, D1] and [COLUMNS, D2]."""
    weights = weights.to(DOT)
    acc1 = tl.dot(weights, x1, acc1, input_precision="ieee")
    if D2 > 0:
        acc2 = tl.dot(weights, x2, acc2, input_precision="ieee")
    return acc1, acc2


@triton.jit
def add_scaled(acc1, acc2, weights, x1, x2, D2: tl.constexpr, DOT: tl.constexpr):
    """The same as `add_weighted`, for weights of any size: a probability among thousands, times a gradient, may be less
    than float16 holds."""
    if DOT.is_fp16():
        size = tl.max(tl.abs(weights), 1)
        size = tl.where(size == 0.0, 1.0, size)[:, None]
        share = (weights / size).to(DOT)
        acc1 += size * tl.dot(share, x1)
        if D2 > 0:
            acc2 += size * tl.dot(share, x2)
    else:
        acc1, acc2 = add_weighted(acc1, acc2, weights, x1, x2, D2, DOT)
    return acc1, acc2


@triton.jit
def load_ids(target_ptr, pinned_ptr, b, stride_target, stride_pinned, T, P, COLUMNS: tl.constexpr):
    """The ids of the targets (slots 0..T-1) and pinned tokens (T..T+P-1), -1 for padded and unused slots: [COLUMNS]."""
    slots = tl.arange(0, COLUMNS)
    targets = tl.load(target_ptr + b * stride_target + slots, mask=slots < T, other=-1)
    pinned = tl.load(pinned_ptr + b * stride_pinned + slots - T, mask=(slots >= T) & (slots < T + P), other=-1)
    return tl.maximum(targets, pinned).to(tl.int32)


@triton.jit
def is_named(columns, ids):
    """Whether `ids` [COLUMNS] names each of `columns` [N]: bool [N]."""
    return tl.sum((columns[:, None] == ids[None, :]).to(tl.int32), 1) > 0


@triton.jit
def slots_of(slot_ptr, columns, taken):
    """Which map each of `columns` is, -1 for none; without a table, every column that is `taken` is its own."""
    slots = tl.where(taken, columns, -1)
    if slot_ptr is not None:
        slots = tl.load(slot_ptr + columns, mask=taken, other=-1)
    return slots


@triton.jit
def exp(x):
    """exp(x) for softmaxes, 0 below 1e-38. NVIDIA's unit takes powers of 2 alone; `tl.exp` adds three instructions
    that only keep denormal results."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def load_key_bias(ptr, b, N, columns, taken):
    """What is added to the logits of `columns`, from [B,N] float32; zeros where they are not `taken`."""
    return tl.load(ptr + b * N + columns, mask=taken, other=0.0)


@triton.jit
def one_if_zero(total):
    """A row's sum of weights as what to divide by: all of them are 0 where every column is masked."""
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def rest_of(lse):
    """The logsumexp of the rest as a number: where the rest has no columns and no target is real, -inf would be
    subtracted from itself."""
    return tl.maximum(lse, NO_COLUMNS, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finite_or_zero(maximum):
    """A row's maximum as what to subtract: -inf, of a row without columns, would give NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def store_maps(maps_ptr, tile, slots, rows, inside, M):
    """Store `tile` [COLUMNS, BLOCK_M] into the maps of `slots`, none for -1; `slots` of very many are int64."""
    places = slots[:, None] * M + rows[None, :]
    tl.store(maps_ptr + places, tile, mask=(slots >= 0)[:, None] & inside[None, :])
