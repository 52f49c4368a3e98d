"""Attention pulled by regions: the released form in memory, and sets of regions."""

import torch

from tests.support.numerics import DEVICE


def full_maps(q, k, v, shared, weight):
    """The released code's two sums, `shared` [B,1,M,N] and `weight` [B,1,M,1] in memory. Half-precision logits would be
    judged by the rounding of what is added to them, so they are in float32."""
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    logits = q.shape[-1] ** -0.5 * (q @ k.mT)
    low, high = logits.amin(-1, keepdim=True), logits.amax(-1, keepdim=True)
    shared, weight = shared.to(q.dtype), weight.to(q.dtype)
    raised = shared * weight * (high - logits)
    lowered = (1 - shared) * weight * (logits - low)
    return ((logits + raised - lowered).softmax(-1) @ v).to(dtype)


def regions(m, n, batch=2, seed=5):
    """Row and column sets, some empty, some of several bits, one of the highest bit; and whether they meet."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randint(0, 8, (batch, side), generator=generator, dtype=torch.int32) for side in (m, n))
    rows[:, m // 2], columns[:, n // 2] = -(2**31), -(2**31) + 1
    shared = torch.zeros(batch, m, n, dtype=torch.bool)
    for bit in range(32):
        shared |= ((rows >> bit) & 1).bool()[:, :, None] & ((columns >> bit) & 1).bool()[:, None, :]
    return rows.to(DEVICE), columns.to(DEVICE), shared.unsqueeze(1).to(DEVICE)
