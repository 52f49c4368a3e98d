"""The energies whose descent is a Bayesian context update."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._impl import resolve
from .._validate import check_key_bias, check_qkv, check_scale, wide_dtype
from ._heads import Grouped
from ._library import may_hold_map, without_autocast
from .attention import attention
from .context_update import flat_keys


class ContextEnergy(NamedTuple):
    """The two energies of a cross-attention layer.

    Attributes:
        attention: (alpha/2) sum_n ||k_n||^2 - sum_n logsumexp_m(l_mn), all heads together, `[B]`.
        context: logsumexp_n(||k_n||^2 / 2), `[B]`.
    """

    attention: Tensor
    context: Tensor


@without_autocast
def _logsumexp(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the logsumexp over the image tokens, [B,H,N], with the logits in memory."""
    wide = wide_dtype(q.dtype)
    return ((scale * k.to(wide)) @ q.to(wide).mT).logsumexp(-1)


def context_energy(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    alpha: float = 0.0,
    impl: str | None = None,
) -> ContextEnergy:
    """Compute the energies E(Q; K) and E(K) of a cross-attention layer (arXiv 2306.09869).

    A step of `context_update` with small gammas lowers their weighted sum, which is what they are for: to watch it over
    layers and steps. Differentiable.

    Args:
        q: queries `[B,H,M,d]`.
        k: keys `[B,H,N,d]`, of the dtype and device of q.
        scale: factor of the logits l, 1/sqrt(d) by default.
        key_bias: added to the scaled logits, `[B,N]`: as for `attention`. The logsumexp of a masked column is left out,
            as the update of one is zero; norms of keys know no mask, as in `context_update`.
        alpha: weight of the squared norm.
        impl: as for `attention`, which does the work but for small maps on a CPU.

    Returns:
        `ContextEnergy(attention, context)` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: as `attention`.
    """
    heads = Grouped(q, k) if check_qkv(q, k, k) else None
    key_bias = check_key_bias(key_bias, k)
    queries, keys = (q, k) if heads is None else (heads.queries(q), heads.keys(k))
    if resolve(impl, q.device) == "eager" and may_hold_map(queries, keys):
        lse = _logsumexp(queries, keys, check_scale(scale, q.shape[3]))
    else:
        # Whatever the values; detached, for torch.compile takes no tensor twice.
        _, lse = attention(keys, queries, queries.detach(), scale=scale, return_lse=True, impl=impl)
    lse = lse if heads is None else heads.whole(lse)
    if key_bias is not None:
        masked = key_bias.isneginf()
        # A column's bias, the same for all image tokens, is a summand of its logsumexp.
        lse = (lse + key_bias.masked_fill(masked, 0.0).unsqueeze(1)).masked_fill(masked.unsqueeze(1), 0.0)
    square = flat_keys(k).square().sum(-1)
    return ContextEnergy(alpha / 2 * square.sum(-1) - lse.sum((1, 2)), (square / 2).logsumexp(-1))
