"""The backward kernels of attention in the four forms of its forward kernel (attention.py).

One works on rows: the gradients of q and of the bias, and what the other needs of each row. One works on columns: the
gradients of k and v. As in the forward kernel, targets and pinned columns make a small tile of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._gaussian import bias_tile, store_theta_gradient
from ._tiles import (
    add_weighted,
    aligned,
    chunked_dots,
    exp,
    finite_or_zero,
    is_named,
    load_ids,
    load_key_bias,
    load_pieces,
    row_dots,
    slots_of,
    store_pieces,
)
from .attention import BIASED, PLAIN, REGULATED, STATISTICS


@triton.jit
def weights_and_gradient(
    logits,
    bias,
    products,
    target,
    pinned,
    lse,
    plain_lse,
    delta,
    pinned_delta,
    square,
    grad_square,
    FORM: tl.constexpr,
    SPECIAL: tl.constexpr,
    PINNED: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """What multiplies the values, and the gradient by the logits; zero where `logits` are -inf, as they must be for
    columns and rows that take no part.

    `products` are dO V^T; `bias`, `target` and `pinned` count only with SPECIAL, and the bias must be zero off the
    targets. `lse` is that of the biased logits or, for the statistics, of the rest; `plain_lse` that of all columns
    without bias. `delta` is the sum of weights times products over the columns that take their weight from the softmax
    of `lse`, `pinned_delta` over the pinned ones.
    """
    if FORM == STATISTICS:
        rest = logits
        if SPECIAL:
            rest = tl.where(target, float("-inf"), logits)
        weights = exp(rest - lse)
        grad = weights * (products - delta)
        if SQUARE:
            share = exp(logits - plain_lse)
            own = share
            if SPECIAL:
                own = tl.where(target, 0.0, share)
            grad += 2.0 * grad_square * share * (own - square)
    else:
        edited = logits
        if SPECIAL and FORM != PLAIN:
            edited = logits + bias
        weights = exp(edited - lse)
        if PINNED:
            plain = exp(logits - plain_lse)
            if SPECIAL:
                free_products = tl.where(pinned, 0.0, products)
                grad = weights * (free_products - delta) + plain * (products - free_products - pinned_delta)
                weights = tl.where(pinned, plain, weights)
            else:
                grad = weights * (products - delta) - plain * pinned_delta
        else:
            grad = weights * (products - delta)
    return weights, grad


@triton.jit
def _products(
    a1,
    a2,
    a_ptr,
    a_rows,
    a_inside,
    a_stride,
    b1,
    b2,
    b_ptr,
    b_rows,
    b_inside,
    b_stride,
    D: tl.constexpr,
    D2: tl.constexpr,
    CHUNKED: tl.constexpr,
):
    """a b^T of tiles that are loaded as a1, a2 and b1, b2; CHUNKED, as float32 has to be, reads them from memory."""
    if CHUNKED:
        out = chunked_dots(a_ptr, a_rows, a_inside, a_stride, b_ptr, b_rows, b_inside, b_stride, D)
    else:
        out = row_dots(a1, a2, b1, b2, D2)
    return out


@triton.jit
def _map_gradient(grad_maps_ptr, slots, rows, inside, M, TRANSPOSED: tl.constexpr):
    """The gradient by the maps of `slots`, zeros for slot -1: [BLOCK_M, COLUMNS] or transposed."""
    starts = slots.to(tl.int64) * M
    if TRANSPOSED:
        mask = (slots >= 0)[:, None] & inside[None, :]
        out = tl.load(grad_maps_ptr + starts[:, None] + rows[None, :], mask=mask, other=0.0)
    else:
        mask = inside[:, None] & (slots >= 0)[None, :]
        out = tl.load(grad_maps_ptr + starts[None, :] + rows[:, None], mask=mask, other=0.0)
    return out


# As in attention.py: ALIGN says what matters.
_SIZES = ["H", "M", "N", "T", "P", "width", "r_y", "r_x"]
_STRIDES = ["gb", "gh", "gm", "qb", "qh", "qm", "kb", "kh", "kn", "vb", "vh", "vn", "target", "pinned"]
_STRIDES += ["slot", "mb", "mh"]
_RUN_TIME = [*(f"stride_{name}" for name in _STRIDES), *_SIZES, "blocks", "splits"]


@triton.jit(do_not_specialize=_RUN_TIME)
def _attention_bwd_rows_kernel(
    grad_out_ptr,
    grad_lse_ptr,
    grad_logits_ptr,
    grad_pinned_ptr,
    grad_square_ptr,
    grad_maps_ptr,
    slot_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    target_ptr,
    pinned_ptr,
    bias_ptr,
    key_bias_ptr,
    lse_ptr,
    plain_lse_ptr,
    logits_ptr,
    square_ptr,
    delta_ptr,
    pinned_delta_ptr,
    dq_ptr,
    dbias_ptr,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_target,
    stride_pinned,
    stride_slot,
    stride_mb,
    stride_mh,
    H,
    M,
    N,
    T,
    P,
    scale,
    bias_scale,
    map_weight,
    width,
    r_y,
    r_x,
    start_y,
    step_y,
    rest_y,
    start_x,
    step_x,
    rest_x,
    FORM: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    COLUMNS: tl.constexpr,
    PINNED: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of what `dq_ptr`, `dbias_ptr` and `delta_ptr` ask for, all that belongs to a block of rows.

    `delta` is summed here, from the same products as the gradient: taken from the output, as usual, its rounding would
    be larger than the gradient of a row whose softmax is nearly one-hot. dbias is dS [B,H,T,M], or with the basis the
    block's part of dtheta: [blocks,B,H,T,r_y,r_x]. For the statistics, `plain_lse` is not given but written, for the
    kernel on columns.
    """
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    v_ptr += aligned(b * stride_vb + h * stride_vh, ALIGN)
    stride_qm = aligned(stride_qm, ALIGN)
    stride_kn = aligned(stride_kn, ALIGN)
    stride_vn = aligned(stride_vn, ALIGN)
    head = row.to(tl.int64) * M
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    CHUNKED: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    SQUARE: tl.constexpr = grad_square_ptr is not None

    q1, q2 = load_pieces(q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]
    if grad_out_ptr is not None:
        grad_out_ptr += aligned(b * stride_gb + h * stride_gh, ALIGN)
        stride_gm = aligned(stride_gm, ALIGN)
        g1, g2 = load_pieces(grad_out_ptr, rows, inside, stride_gm, D, D1, D2, DOT)

    if grad_maps_ptr is not None:
        grad_maps_ptr += b * stride_mb + h * stride_mh
        if slot_ptr is not None:
            slot_ptr += b * stride_slot

    given_lse = tl.load(lse_ptr + head + rows, mask=inside, other=0.0)
    lse = finite_or_zero(given_lse)
    plain_lse = lse
    square = lse
    grad_square = lse
    delta = tl.zeros([BLOCK_M], tl.float32)
    pinned_delta = delta
    if FORM != PLAIN:
        slots = tl.arange(0, COLUMNS)
        is_target = slots < T
        places = rows[:, None] + slots[None, :] * M  # [BLOCK_M, COLUMNS]
        ids = load_ids(target_ptr, pinned_ptr, b, stride_target, stride_pinned, T, P, COLUMNS)
        named = ids >= 0
        target = (named & is_target)[None, :]
        pinned = (named & (slots >= T))[None, :]
    if SQUARE:
        square = tl.load(square_ptr + head + rows, mask=inside, other=0.0)
        grad_square = tl.load(grad_square_ptr + head + rows, mask=inside, other=0.0)
        mask = inside[:, None] & is_target[None, :]
        given = tl.load(logits_ptr + head * T + places, mask=mask, other=float("-inf"))  # [BLOCK_M, COLUMNS]
        top = tl.maximum(given_lse, tl.max(given, 1))
        if key_bias_ptr is not None:
            top = finite_or_zero(top)
        plain_lse = top + tl.log(exp(given_lse - top) + tl.sum(exp(given - top[:, None]), 1))
        if key_bias_ptr is not None:
            plain_lse = finite_or_zero(plain_lse)
        tl.store(plain_lse_ptr + head + rows, plain_lse, mask=inside)
    elif PINNED:
        plain_lse = tl.load(plain_lse_ptr + head + rows, mask=inside, other=0.0)

    if grad_out_ptr is not None or grad_maps_ptr is not None:
        for start in range(0, N, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            valid = columns < N
            free = valid
            if FORM != PLAIN:
                free = valid & ~is_named(columns, ids)
            k1, k2 = load_pieces(k_ptr, columns, valid, stride_kn, D, D1, D2, DOT)  # [BLOCK_N, D1], [BLOCK_N, D2]
            if grad_out_ptr is not None:
                v1, v2 = load_pieces(v_ptr, columns, valid, stride_vn, D, D1, D2, DOT)
            logits = _products(
                q1, q2, q_ptr, rows, inside, stride_qm, k1, k2, k_ptr, columns, valid, stride_kn, D, D2, CHUNKED
            )
            products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if grad_out_ptr is not None:
                products = _products(
                    g1,
                    g2,
                    grad_out_ptr,
                    rows,
                    inside,
                    stride_gm,
                    v1,
                    v2,
                    v_ptr,
                    columns,
                    valid,
                    stride_vn,
                    D,
                    D2,
                    CHUNKED,
                )
            if grad_maps_ptr is not None:
                slots = slots_of(slot_ptr, columns, valid)
                products += map_weight * _map_gradient(grad_maps_ptr, slots, rows, inside, M, False)
            logits = tl.where(free[None, :], scale * logits, float("-inf"))
            if key_bias_ptr is not None:
                logits += load_key_bias(key_bias_ptr, b, N, columns, free)[None, :]
            weights = exp(logits - lse[:, None])
            delta += tl.sum(weights * products, 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + head + rows, mask=inside, other=0.0)

    if FORM != PLAIN:
        ks1, ks2 = load_pieces(k_ptr, ids, named, stride_kn, D, D1, D2, DOT)  # [COLUMNS, D1], [COLUMNS, D2]
        special = _products(
            q1, q2, q_ptr, rows, inside, stride_qm, ks1, ks2, k_ptr, ids, named, stride_kn, D, D2, CHUNKED
        )
        special = tl.where(named[None, :], scale * special, float("-inf"))  # [BLOCK_M, COLUMNS]
        if key_bias_ptr is not None:
            special += load_key_bias(key_bias_ptr, b, N, ids, named)[None, :]
        special_products = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
        bias = special_products
        if FORM == BIASED:
            bias = tl.load(bias_ptr + head * T + places, mask=inside[:, None] & target, other=0.0)
            bias *= bias_scale
        if FORM == REGULATED:
            theta_ptr = bias_ptr + row.to(tl.int64) * T * r_y * r_x
            maps = bias_tile(
                theta_ptr, rows, width, T, r_y, r_x, start_y, step_y, rest_y, start_x, step_x, rest_x, COLUMNS
            )
            bias = tl.where(target, bias_scale * tl.trans(maps), 0.0)
        if grad_out_ptr is not None:
            vs1, vs2 = load_pieces(v_ptr, ids, named, stride_vn, D, D1, D2, DOT)
            special_products = _products(
                g1, g2, grad_out_ptr, rows, inside, stride_gm, vs1, vs2, v_ptr, ids, named, stride_vn, D, D2, CHUNKED
            )
            sharing = target
            if FORM == STATISTICS:
                sharing = pinned
            share = exp(tl.where(sharing, special + bias, float("-inf")) - lse[:, None])
            delta += tl.sum(share * special_products, 1)
            if PINNED:
                kept = exp(tl.where(pinned, special, float("-inf")) - plain_lse[:, None])
                pinned_delta += tl.sum(kept * special_products, 1)

    if delta_ptr is not None:
        tl.store(delta_ptr + head + rows, delta, mask=inside)
        if PINNED:
            tl.store(pinned_delta_ptr + head + rows, pinned_delta, mask=inside)

    if dbias_ptr is not None:
        share = exp(tl.where(target, special + bias, float("-inf")) - lse[:, None])
        grad_bias = bias_scale * share * (special_products - delta[:, None])
        grad_bias = tl.where(target & inside[:, None], grad_bias, 0.0)
        if FORM == BIASED:
            tl.store(dbias_ptr + head * T + places, grad_bias, mask=inside[:, None] & is_target[None, :])
        else:
            part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + row
            store_theta_gradient(
                dbias_ptr + part * T * r_y * r_x,
                tl.trans(grad_bias),
                rows,
                width,
                T,
                r_y,
                r_x,
                start_y,
                step_y,
                rest_y,
                start_x,
                step_x,
                rest_x,
                COLUMNS,
            )

    if dq_ptr is not None:
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
        acc2 = acc1
        if D2 > 0:
            acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
        if FORM != PLAIN:
            special_grad = weights_and_gradient(
                special,
                bias,
                special_products,
                target,
                pinned,
                lse[:, None],
                plain_lse[:, None],
                delta[:, None],
                pinned_delta[:, None],
                square[:, None],
                grad_square[:, None],
                FORM,
                True,
                PINNED,
                SQUARE,
            )[1]
            if grad_logits_ptr is not None:
                special_grad += tl.load(grad_logits_ptr + head * T + places, mask=inside[:, None] & target, other=0.0)
            if grad_pinned_ptr is not None:
                base = head * P - T.to(tl.int64) * M
                special_grad += tl.load(grad_pinned_ptr + base + places, mask=inside[:, None] & pinned, other=0.0)
            acc1, acc2 = add_weighted(acc1, acc2, special_grad, ks1, ks2, D2, DOT)
        if grad_out_ptr is not None or grad_lse_ptr is not None or grad_maps_ptr is not None or SQUARE:
            for start in range(0, N, BLOCK_N):
                columns = start + tl.arange(0, BLOCK_N)
                valid = columns < N
                free = valid
                if FORM != PLAIN:
                    free = valid & ~is_named(columns, ids)
                k1, k2 = load_pieces(k_ptr, columns, valid, stride_kn, D, D1, D2, DOT)
                logits = _products(
                    q1, q2, q_ptr, rows, inside, stride_qm, k1, k2, k_ptr, columns, valid, stride_kn, D, D2, CHUNKED
                )
                logits = tl.where(free[None, :], scale * logits, float("-inf"))  # [BLOCK_M, BLOCK_N]
                if key_bias_ptr is not None:
                    logits += load_key_bias(key_bias_ptr, b, N, columns, free)[None, :]
                products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                if grad_out_ptr is not None:
                    v1, v2 = load_pieces(v_ptr, columns, valid, stride_vn, D, D1, D2, DOT)
                    products = _products(
                        g1,
                        g2,
                        grad_out_ptr,
                        rows,
                        inside,
                        stride_gm,
                        v1,
                        v2,
                        v_ptr,
                        columns,
                        valid,
                        stride_vn,
                        D,
                        D2,
                        CHUNKED,
                    )
                if grad_maps_ptr is not None:
                    slots = slots_of(slot_ptr, columns, valid)
                    products += map_weight * _map_gradient(grad_maps_ptr, slots, rows, inside, M, False)
                grad = weights_and_gradient(
                    logits,
                    None,
                    products,
                    None,
                    None,
                    lse[:, None],
                    plain_lse[:, None],
                    delta[:, None],
                    pinned_delta[:, None],
                    square[:, None],
                    grad_square[:, None],
                    FORM,
                    False,
                    PINNED,
                    SQUARE,
                )[1]
                acc1, acc2 = add_weighted(acc1, acc2, grad, k1, k2, D2, DOT)
        acc1 *= scale
        if D2 > 0:
            acc2 *= scale
        store_pieces(dq_ptr + head * D, acc1, acc2, rows, inside, D, D, D1, D2)


@triton.jit(do_not_specialize=_RUN_TIME)
def _attention_bwd_columns_kernel(
    grad_out_ptr,
    grad_logits_ptr,
    grad_pinned_ptr,
    grad_square_ptr,
    grad_maps_ptr,
    slot_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    target_ptr,
    pinned_ptr,
    bias_ptr,
    key_bias_ptr,
    lse_ptr,
    plain_lse_ptr,
    square_ptr,
    delta_ptr,
    pinned_delta_ptr,
    dk_ptr,
    dv_ptr,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_target,
    stride_pinned,
    stride_slot,
    stride_mb,
    stride_mh,
    H,
    M,
    N,
    T,
    P,
    splits,
    blocks,
    scale,
    bias_scale,
    map_weight,
    width,
    r_y,
    r_x,
    start_y,
    step_y,
    rest_y,
    start_x,
    step_x,
    rest_x,
    FORM: tl.constexpr,
    SPECIAL: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    COLUMNS: tl.constexpr,
    PINNED: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv, or one of them, of a tile of columns, summed over one of `splits` parts of the rows: [splits,B,H,N,d].

    The columns are the targets and pinned ones (SPECIAL), or all others. Tiles are transposed, rows of q last, so that
    weights and gradients multiply without a transposition.
    """
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    v_ptr += aligned(b * stride_vb + h * stride_vh, ALIGN)
    stride_qm = aligned(stride_qm, ALIGN)
    stride_kn = aligned(stride_kn, ALIGN)
    stride_vn = aligned(stride_vn, ALIGN)
    if grad_out_ptr is not None:
        grad_out_ptr += aligned(b * stride_gb + h * stride_gh, ALIGN)
        stride_gm = aligned(stride_gm, ALIGN)
    head = row.to(tl.int64) * M
    part = (split.to(tl.int64) * tl.num_programs(1) + row) * N * D
    CHUNKED: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    SQUARE: tl.constexpr = grad_square_ptr is not None
    DK: tl.constexpr = dk_ptr is not None

    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    target = None
    pinned = None
    if SPECIAL:
        slots = columns
        first = tile * BLOCK_N
        columns = load_ids(target_ptr + first, pinned_ptr, b, stride_target, stride_pinned, T - first, P, BLOCK_N)
        target = ((columns >= 0) & (slots < T))[:, None]
        pinned = ((columns >= 0) & (slots >= T))[:, None]
    elif FORM != PLAIN:
        ids = load_ids(target_ptr, pinned_ptr, b, stride_target, stride_pinned, T, P, COLUMNS)
        columns = tl.where(is_named(columns, ids), -1, columns)
    taken = (columns >= 0) & (columns < N)
    if grad_maps_ptr is not None:
        grad_maps_ptr += b * stride_mb + h * stride_mh
        if slot_ptr is not None:
            slot_ptr += b * stride_slot
        map_slots = slots_of(slot_ptr, columns, taken)
    if key_bias_ptr is not None:
        added = load_key_bias(key_bias_ptr, b, N, columns, taken)

    k1, k2 = load_pieces(k_ptr, columns, taken, stride_kn, D, D1, D2, DOT)  # [BLOCK_N, D1], [BLOCK_N, D2]
    if DK:
        if grad_out_ptr is not None:
            v1, v2 = load_pieces(v_ptr, columns, taken, stride_vn, D, D1, D2, DOT)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dk2 = dk1
        if D2 > 0:
            dk2 = tl.zeros([BLOCK_N, D2], tl.float32)
    if dv_ptr is not None:
        dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dv2 = dv1
        if D2 > 0:
            dv2 = tl.zeros([BLOCK_N, D2], tl.float32)

    last = tl.minimum((split + 1) * blocks, tl.cdiv(M, BLOCK_M))
    for block in range(split * blocks, last):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < M
        q1, q2 = load_pieces(q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]
        logits = _products(
            k1, k2, k_ptr, columns, taken, stride_kn, q1, q2, q_ptr, rows, inside, stride_qm, D, D2, CHUNKED
        )
        logits = tl.where(taken[:, None] & inside[None, :], scale * logits, float("-inf"))  # [BLOCK_N, BLOCK_M]
        if key_bias_ptr is not None:
            logits += added[:, None]
        lse = finite_or_zero(tl.load(lse_ptr + head + rows, mask=inside, other=0.0))
        plain_lse = lse
        delta = lse
        pinned_delta = lse
        square = lse
        grad_square = lse
        if SQUARE or PINNED:
            plain_lse = tl.load(plain_lse_ptr + head + rows, mask=inside, other=0.0)
        if DK:
            delta = tl.load(delta_ptr + head + rows, mask=inside, other=0.0)
            if PINNED:
                pinned_delta = tl.load(pinned_delta_ptr + head + rows, mask=inside, other=0.0)
            if SQUARE:
                square = tl.load(square_ptr + head + rows, mask=inside, other=0.0)
                grad_square = tl.load(grad_square_ptr + head + rows, mask=inside, other=0.0)
        products = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if grad_out_ptr is not None:
            g1, g2 = load_pieces(grad_out_ptr, rows, inside, stride_gm, D, D1, D2, DOT)
            if DK:
                products = _products(
                    v1,
                    v2,
                    v_ptr,
                    columns,
                    taken,
                    stride_vn,
                    g1,
                    g2,
                    grad_out_ptr,
                    rows,
                    inside,
                    stride_gm,
                    D,
                    D2,
                    CHUNKED,
                )
        if DK and grad_maps_ptr is not None:
            products += map_weight * _map_gradient(grad_maps_ptr, map_slots, rows, inside, M, True)
        bias = None
        if SPECIAL:
            places = rows[None, :] + slots[:, None] * M  # [BLOCK_N, BLOCK_M]
            if FORM == BIASED:
                bias = tl.load(bias_ptr + head * T + places, mask=target & inside[None, :], other=0.0)
                bias *= bias_scale
            if FORM == REGULATED:
                maps = bias_tile(
                    bias_ptr + (row.to(tl.int64) * T + first) * r_y * r_x,
                    rows,
                    width,
                    tl.minimum(T - first, BLOCK_N),
                    r_y,
                    r_x,
                    start_y,
                    step_y,
                    rest_y,
                    start_x,
                    step_x,
                    rest_x,
                    BLOCK_N,
                )
                bias = tl.where(target & inside[None, :], bias_scale * maps, 0.0)
        weights, grad = weights_and_gradient(
            logits,
            bias,
            products,
            target,
            pinned,
            lse[None, :],
            plain_lse[None, :],
            delta[None, :],
            pinned_delta[None, :],
            square[None, :],
            grad_square[None, :],
            FORM,
            SPECIAL,
            PINNED,
            SQUARE,
        )
        if DK:
            if SPECIAL and grad_logits_ptr is not None:
                grad += tl.load(grad_logits_ptr + head * T + places, mask=target & inside[None, :], other=0.0)
            if SPECIAL and grad_pinned_ptr is not None:
                base = head * P - T.to(tl.int64) * M
                grad += tl.load(grad_pinned_ptr + base + places, mask=pinned & inside[None, :], other=0.0)
            dk1, dk2 = add_weighted(dk1, dk2, grad, q1, q2, D2, DOT)
        if dv_ptr is not None:
            dv1, dv2 = add_weighted(dv1, dv2, weights, g1, g2, D2, DOT)

    if DK:
        dk1 *= scale
        if D2 > 0:
            dk2 *= scale
        store_pieces(dk_ptr + part, dk1, dk2, columns, taken, D, D, D1, D2)
    if dv_ptr is not None:
        store_pieces(dv_ptr + part, dv1, dv2, columns, taken, D, D, D1, D2)
