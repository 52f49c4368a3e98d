"""The backward kernel of attention to a context that is one tile of columns, as prompts are, and of its maps: one pass
over the queries gives all three gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from ._tiles import (
    LOG2_E,
    add_weighted,
    aligned,
    finite_or_zero,
    load_key_bias,
    load_pieces,
    row_dots,
    slots_of,
    store_piece,
    store_pieces,
)

_STRIDES = ["gb", "gh", "gm", "qb", "qh", "qm", "kb", "kh", "kn", "vb", "vh", "vn", "slot", "mb", "mh"]


@triton.jit(do_not_specialize=[*(f"stride_{name}" for name in _STRIDES), "H", "M", "N", "tiles"])
def _attention_bwd_short_kernel(
    grad_out_ptr,
    grad_lse_ptr,
    grad_maps_ptr,
    slot_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    key_bias_ptr,
    lse_ptr,
    dq_ptr,
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
    stride_slot,
    stride_mb,
    stride_mh,
    H,
    M,
    N,
    tiles,
    scale,
    map_weight,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    N1: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dq of one of several parts of the rows, `tiles` tiles, and the part's sums dk and dv, [parts,B,H,N,d]: those
    whose pointers are there.

    `delta`, a row's sum of weights times products, is summed here, as in _attention_gradients.py. Tiles are transposed:
    all products then have the text's or the head's many rows for the warps to share.
    """
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    stride_qm = aligned(stride_qm, ALIGN)
    head = row.to(tl.int64) * M
    part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + row) * N * D

    columns = tl.arange(0, N1)
    taken = columns < N
    # Once, into shared memory, where matrix units find them.
    k1, k2 = load_pieces(k_ptr, columns, taken, aligned(stride_kn, ALIGN), D, D1, D2, DOT)  # [N1, D1], [N1, D2]
    if grad_out_ptr is not None:
        grad_out_ptr += aligned(b * stride_gb + h * stride_gh, ALIGN)
        stride_gm = aligned(stride_gm, ALIGN)
        v_ptr += aligned(b * stride_vb + h * stride_vh, ALIGN)
        v1, v2 = load_pieces(v_ptr, columns, taken, aligned(stride_vn, ALIGN), D, D1, D2, DOT)
    if grad_maps_ptr is not None:
        grad_maps_ptr += b * stride_mb + h * stride_mh
        if slot_ptr is not None:
            slot_ptr += b * stride_slot
        slots = slots_of(slot_ptr, columns, taken)
    if key_bias_ptr is not None:
        added = load_key_bias(key_bias_ptr, b, N, columns, taken) * LOG2_E
    dk1 = tl.zeros([N1, D1], tl.float32)
    dk2 = tl.zeros([N1, D2 if D2 > 0 else 16], tl.float32)
    dv1, dv2 = dk1, dk2

    first = tl.program_id(0) * tiles
    # What is the same for every tile is mostly offsets, which would fill the registers.
    for tile in tl.range(first, tl.minimum(first + tiles, tl.cdiv(M, BLOCK_M)), disable_licm=True):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < M
        q1, q2 = load_pieces(q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]
        # Beyond the last row +inf: a large bias of a key would give weights there that half precision does not hold.
        lse = tl.load(lse_ptr + head + rows, mask=inside, other=float("inf")) * LOG2_E
        logits = row_dots(k1, k2, q1, q2, D2) * (scale * LOG2_E)
        if key_bias_ptr is not None:
            logits += added[:, None]
            lse = finite_or_zero(lse)
        weights = tl.exp2(logits - lse[None, :])
        weights = tl.where(taken[:, None], weights, 0.0)  # [N1, BLOCK_M]
        products = tl.zeros([N1, BLOCK_M], tl.float32)
        if grad_maps_ptr is not None:
            mask = (slots >= 0)[:, None] & inside[None, :]
            grad_maps = tl.load(grad_maps_ptr + slots[:, None] * M + rows[None, :], mask=mask, other=0.0)
            products = map_weight * grad_maps
        if grad_out_ptr is not None:
            g1, g2 = load_pieces(grad_out_ptr, rows, inside, stride_gm, D, D1, D2, DOT)
            products = row_dots(v1, v2, g1, g2, D2, products)
        if dv_ptr is not None:
            dv1, dv2 = add_weighted(dv1, dv2, weights, g1, g2, D2, DOT)
        delta = tl.sum(weights * products, 0)
        if grad_lse_ptr is not None:
            delta -= tl.load(grad_lse_ptr + head + rows, mask=inside, other=0.0)
        grad = (weights * (products - delta[None, :])).to(DOT)
        if dq_ptr is not None:
            store_piece(dq_ptr + head * D, tl.trans(tl.dot(tl.trans(k1), grad)) * scale, rows, inside, D, D, 0, D1)
            if D2 > 0:
                store_piece(dq_ptr + head * D, tl.trans(tl.dot(tl.trans(k2), grad)) * scale, rows, inside, D, D, D1, D2)
        if dk_ptr is not None:
            dk1, dk2 = add_weighted(dk1, dk2, grad, q1, q2, D2, DOT)

    if dk_ptr is not None:
        store_pieces(dk_ptr + part, dk1 * scale, dk2 * scale, columns, taken, D, D, D1, D2)
    if dv_ptr is not None:
        store_pieces(dv_ptr + part, dv1, dv2, columns, taken, D, D, D1, D2)
