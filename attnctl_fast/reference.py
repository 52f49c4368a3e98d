"""The textbook: attention control written from the equations, in plain PyTorch, for any device and float dtype.

Nothing here is fast. These functions are the oracle of every other implementation; in float64 they are the truth that
errors are measured against. Notation: batch B, heads H, image tokens M, text tokens N, head width d, target tokens T.
Token ids are int64 tensors, [T] for all samples or [B,T] padded with -1. Half-precision inputs are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# A logsumexp of no columns that, unlike -inf, can be subtracted from itself.
NO_COLUMNS = -1e30


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _one_hot(ids: Tensor, batch: int, tokens: int) -> Tensor:
    """Return bool [B,T,N]: which column each id names; a padded id names none."""
    return ids.expand(batch, -1).unsqueeze(-1) == torch.arange(tokens, device=ids.device)


def _logits(q: Tensor, k: Tensor, scale: float, key_bias: Tensor | None = None) -> Tensor:
    """Return scale q k^T, with `key_bias` [B,N] added to the columns: -inf masks one."""
    logits = scale * (_wide(q) @ _wide(k).mT)
    return logits if key_bias is None else logits + key_bias[:, None, None, :]


def _softmax(logits: Tensor) -> Tensor:
    """Return the softmax over the last dimension, with zeros for a row whose logits are all -inf."""
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    return torch.where(empty, 0.0, torch.where(empty, 0.0, logits).softmax(-1))


def _joint_lse(rest_lse: Tensor, logits: Tensor) -> Tensor:
    """Return the logsumexp over the rest [B,H,M] and the targets [B,H,T,M]; where all are -inf, `NO_COLUMNS`."""
    return torch.cat([logits, rest_lse.clamp(min=NO_COLUMNS).unsqueeze(2)], 2).logsumexp(2)


def _normalise(logits: Tensor, lse: Tensor) -> Tensor:
    """Return the softmax, with zeros for a row whose logits are all -inf."""
    return torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1))


def attention(
    q: Tensor, k: Tensor, v: Tensor, excluded_ids: Tensor, scale: float, key_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T) v over the columns that are not excluded, and the logsumexp of each row's logits."""
    excluded = _one_hot(excluded_ids, k.shape[0], k.shape[2]).any(1)
    logits = _logits(q, k, scale, key_bias).masked_fill(excluded[:, None, None, :], -torch.inf)
    empty = (logits == -torch.inf).all(-1)
    lse = torch.where(empty, -torch.inf, torch.where(empty.unsqueeze(-1), 0.0, logits).logsumexp(-1))
    return _normalise(logits, lse) @ _wide(v), lse


def attention_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_ids: Tensor | None,
    per_head: bool,
    scale: float,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return softmax(l) v, and the columns of softmax(l) that `token_ids` names, all for None.

    The columns are [B,H,n,M], or [B,n,M] as their mean over the heads; zeros for a padded token (MATH.md section 4).
    """
    probabilities = _softmax(_logits(q, k, scale, key_bias))
    maps = probabilities.mT
    if token_ids is not None:
        ids = token_ids.expand(k.shape[0], -1)
        rows = ids.clamp(min=0)[:, None, :, None].expand(-1, maps.shape[1], -1, maps.shape[3])
        maps = maps.gather(2, rows).masked_fill((ids < 0)[:, None, :, None], 0.0)
    return probabilities @ _wide(v), maps.contiguous() if per_head else maps.mean(1)


def maps_from_lse(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    token_ids: Tensor,
    per_head: bool,
    scale: float,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Return exp(l - lse) of the columns that `token_ids` names, [B,H,n,M], or [B,n,M] as their mean over the heads.

    Zeros for a padded token, and for a row whose lse is -inf (MATH.md section 6).
    """
    ids = token_ids.expand(k.shape[0], -1)
    columns = ids.clamp(min=0)
    chosen = k.gather(2, columns[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
    logits = _logits(q, chosen, scale, None if key_bias is None else key_bias.gather(1, columns)).mT
    empty, padded = (lse == -torch.inf).unsqueeze(2), (ids < 0)[:, None, :, None]
    maps = torch.exp((logits - torch.where(empty, 0.0, lse.unsqueeze(2))).masked_fill(empty | padded, -torch.inf))
    return maps if per_head else maps.mean(1)


def attention_with_context_gradient(
    q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, scale: float, key_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return softmax(l) v, and softmax over image tokens of l^T times the weighted queries (MATH.md section 2).

    The latter is zeros for a masked column; nothing else of a column's bias changes that softmax.
    """
    logits, queries = _logits(q, k, scale), _wide(q)
    if query_weight is not None:
        queries = queries * query_weight[:, None, :, None]
    update = logits.mT.softmax(-1) @ queries
    if key_bias is not None:
        update = update.masked_fill((key_bias == -torch.inf)[:, None, :, None], 0.0)
    return _softmax(_logits(q, k, scale, key_bias)) @ _wide(v), update


def composed_attention(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    shares: Sequence[float],
    scale: float,
    key_biases: Sequence[Tensor | None],
) -> Tensor:
    """Return the attention to every context, summed by their shares (MATH.md section 2, CACAO)."""
    contexts = zip(ks, vs, shares, key_biases, strict=True)
    return sum(w * (_softmax(_logits(q, k, scale, bias)) @ _wide(v)) for k, v, w, bias in contexts)  # type: ignore[return-value]


def guided(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float | Tensor, norm: int) -> Tensor:
    """Return attention moved away from the negative one, its norm over all heads' features bounded (arXiv 2505.21179).

    Where that norm is 0 it is within any bound (MATH.md section 7).
    """
    extended = scale * positive - (scale - 1) * negative
    size, own = (torch.linalg.vector_norm(x, norm, (1, 3), keepdim=True) for x in (extended, positive))
    within = size <= tau * own
    bounded = extended * torch.where(within, 1.0, tau * own / torch.where(within, 1.0, size))
    return alpha * bounded + (1 - alpha) * positive


def normalized_guidance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_negative: Tensor,
    v_negative: Tensor,
    scale: float,
    tau: float,
    alpha: float | Tensor,
    norm: int,
    softmax_scale: float,
    key_biases: Sequence[Tensor | None],
    shared: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return the `guided` attention of two texts; each softmax is also over what gave `shared` and its logsumexp."""
    found = []
    for keys, values, bias in ((k, v, key_biases[0]), (k_negative, v_negative, key_biases[1])):
        logits, values = _logits(q, keys, softmax_scale, bias), _wide(values)
        if shared is None:
            found.append(_softmax(logits) @ values)
            continue
        weights = _softmax(torch.cat([logits, shared[1].unsqueeze(-1)], -1))
        found.append(weights[..., :-1] @ values + weights[..., -1:] * _wide(shared[0]))
    positive, negative = found
    return guided(positive, negative, scale, tau, alpha, norm)


def entmax(logits: Tensor) -> Tensor:
    """Return the 1.5-entmax over the last dimension, by sorting; zeros for a row whose logits are all -inf.

    Its support are the k largest for the last k at which the threshold, of which the squares above it add up to one,
    is below all of them (arXiv 1905.05702).
    """
    highest = logits.amax(-1, keepdim=True)
    empty = highest == -torch.inf
    # What lies 2 below the largest has no part in it.
    half = ((logits - torch.where(empty, 0.0, highest)) / 2).clamp(min=-2.0)
    ordered = half.sort(-1, descending=True).values
    count = torch.arange(1, half.shape[-1] + 1, dtype=half.dtype, device=half.device)
    mean, square = ordered.cumsum(-1) / count, ordered.square().cumsum(-1) / count
    spread = (1 - count * (square - mean.square())) / count
    thresholds = mean - torch.where(spread > 0, spread, 0.0).sqrt()
    size = (thresholds <= ordered).sum(-1, keepdim=True)
    above = (half - thresholds.gather(-1, (size - 1).clamp(min=0))).clamp(min=0.0)
    return torch.where(empty, 0.0, above.square())


def entmax_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: float | Tensor, scale: float, key_bias: Tensor | None = None
) -> Tensor:
    """Return attention by softmax, moved towards that by `entmax` and beyond (arXiv 2503.07677)."""
    logits = _logits(q, k, scale, key_bias)
    dense, sparse = _softmax(logits), entmax(logits)
    return (dense + weight * (sparse - dense)) @ _wide(v)


def region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_regions: Tensor,
    column_regions: Tensor,
    weight: Tensor,
    scale: float,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Return attention whose logits are pulled to their row's extremes (arXiv 2308.12964).

    They are pulled to the maximum where row and column share a region, to the minimum elsewhere; masked columns are
    neither, and stay masked.
    """
    masked = torch.zeros(k.shape[0], 1, 1, k.shape[2], dtype=torch.bool, device=k.device)
    if key_bias is not None:
        masked = (key_bias == -torch.inf)[:, None, None, :]
        key_bias = key_bias.masked_fill(key_bias == -torch.inf, 0.0)
    logits = _logits(q, k, scale, key_bias)
    shared = (row_regions[:, None, :, None] & column_regions[:, None, None, :]) != 0
    # Where nothing is left there are no extremes, and nobody sees these.
    left_out = masked & ~masked.all(-1, keepdim=True)
    above = logits.masked_fill(left_out, -torch.inf).amax(-1, keepdim=True) - logits
    below = logits - logits.masked_fill(left_out, torch.inf).amin(-1, keepdim=True)
    moved = logits + weight[:, None, :, None] * torch.where(shared, above, -below)
    return _softmax(moved.masked_fill(masked, -torch.inf)) @ _wide(v)


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_groups: Tensor,
    column_groups: Tensor,
    allowed: Tensor,
    scale: float,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention of every row to the columns of the groups that its own may see (MATH.md section 10).

    With it the logsumexp of each row's logits: -inf, and an output of zeros, where there is no such column.
    """
    seen = allowed[row_groups[:, :, None], column_groups[:, None, :]].unsqueeze(1)
    logits = _logits(q, k, scale, key_bias).masked_fill(~seen, -torch.inf)
    empty = (logits == -torch.inf).all(-1)
    lse = torch.where(empty, -torch.inf, torch.where(empty.unsqueeze(-1), 0.0, logits).logsumexp(-1))
    return _normalise(logits, lse) @ _wide(v), lse


def target_logits(q: Tensor, k: Tensor, target_ids: Tensor, scale: float, key_bias: Tensor | None = None) -> Tensor:
    """Return the target columns of the logits, one map per token: [B,H,T,M]; -inf for a padded target."""
    logits = _logits(q, k, scale, key_bias).mT
    ids = target_ids.expand(k.shape[0], -1)
    rows = ids.clamp(min=0)[:, None, :, None].expand(-1, logits.shape[1], -1, logits.shape[3])
    return logits.gather(2, rows).masked_fill((ids < 0)[:, None, :, None], -torch.inf)


def rest_square(q: Tensor, k: Tensor, target_ids: Tensor, scale: float, key_bias: Tensor | None = None) -> Tensor:
    """Return c_m, the sum of squared probabilities over the columns that are not targets.

    It is [B,H,M] (MATH.md section 1).
    """
    probabilities = _softmax(_logits(q, k, scale, key_bias))
    targets = _one_hot(target_ids, k.shape[0], k.shape[2]).any(1)
    return probabilities.masked_fill(targets[:, None, None, :], 0.0).square().sum(-1)


def gaussian_basis(axis_y: Tensor, axis_x: Tensor, sigma_y: float, sigma_x: float, grid: tuple[int, int]) -> Tensor:
    """Return one Gaussian map per pair of centres: [r_y, r_x, height, width] (arXiv 2403.06381, Eq. 10)."""
    y = torch.arange(grid[0], dtype=axis_y.dtype, device=axis_y.device)[:, None]
    x = torch.arange(grid[1], dtype=axis_x.dtype, device=axis_x.device)[None, :]
    rows = []
    for centre_y in axis_y:
        row = []
        for centre_x in axis_x:
            distance = (y - centre_y) ** 2 / (2 * sigma_y**2) + (x - centre_x) ** 2 / (2 * sigma_x**2)
            row.append(torch.exp(-distance))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def gaussian_bias(theta: Tensor, basis: Tensor) -> Tensor:
    """Return S = sum over centres of theta times the Gaussian maps: [B,H,T,M]."""
    maps = theta.new_zeros(*theta.shape[:3], *basis.shape[2:])
    for i in range(basis.shape[0]):
        for j in range(basis.shape[1]):
            maps = maps + theta[..., i, j, None, None] * basis[i, j]
    return maps.flatten(-2)


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    scale: float,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Return attention with `bias` [B,H,T,M] added to the scaled logits of the target columns.

    Pinned columns keep their unbiased probabilities, and rows are not renormalised.
    """
    logits = _logits(q, k, scale, key_bias)
    columns = _one_hot(target_ids, k.shape[0], k.shape[2])
    biased = logits
    for t in range(bias.shape[2]):
        biased = torch.where(columns[:, t][:, None, None, :], biased + bias[:, :, t].unsqueeze(-1), biased)
    pinned = _one_hot(pinned_ids, k.shape[0], k.shape[2]).any(1)[:, None, None, :]
    probabilities = torch.where(pinned, _softmax(logits), _softmax(biased))
    return (probabilities @ _wide(v)).to(v.dtype)


def merge_targets(
    rest_out: Tensor,
    rest_lse: Tensor,
    logits: Tensor,
    pinned_logits: Tensor,
    v: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
) -> Tensor:
    """Return (e^R O_rest + sum_t e^z_t V_t) / Z plus (A - A') V for every pinned column (MATH.md section 1)."""
    padded = (target_ids.expand(v.shape[0], -1) < 0)[:, None, :, None]
    z = torch.where(padded, -torch.inf, logits + bias)
    plain_lse, lse = _joint_lse(rest_lse, logits), _joint_lse(rest_lse, z)
    columns = _one_hot(target_ids, v.shape[0], v.shape[2]).to(logits.dtype)
    pins = _one_hot(pinned_ids, v.shape[0], v.shape[2]).to(logits.dtype)
    out = torch.exp(rest_lse.clamp(min=NO_COLUMNS) - lse).unsqueeze(-1) * _wide(rest_out)
    out = out + torch.exp(z - lse.unsqueeze(2)).mT @ (columns[:, None] @ _wide(v))
    restored = torch.exp(pinned_logits - plain_lse.unsqueeze(2)) - torch.exp(pinned_logits - lse.unsqueeze(2))
    return (out + restored.mT @ (pins[:, None] @ _wide(v))).to(v.dtype)


def regulation_loss(
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    bias: Tensor,
    theta: Tensor | None,
    objective: str,
    quantile: float,
    level: float,
    mass: float | None,
    mass_weight: float,
    penalty: float,
) -> Tensor:
    """Return the objective of attention regulation per batch and head, [B,H].

    See arXiv 2403.06381, Eq. 11-15, and MATH.md section 1.

    `bias` is what is added to the scaled logits. `official` adds penalty * mean theta^2, `paper` penalty * ||A' - A||.
    """
    padded = (logits == -torch.inf).all(-1)
    real = (~padded).to(logits.dtype)
    count = real.sum(-1).clamp(min=1)
    z = torch.where(padded.unsqueeze(-1), -torch.inf, logits + bias)
    lse = _joint_lse(rest_lse, z)
    edited = torch.exp(z - lse.unsqueeze(2))
    high = torch.quantile(edited, quantile, dim=-1)
    share = (0.2 * count).clamp(max=1.0) / count if mass is None else torch.full_like(count, mass)
    loss = (real * (high - level) ** 2).sum(-1) / count
    loss = loss + mass_weight * (real * (edited.mean(-1) - share.unsqueeze(-1)) ** 2).sum(-1) / count
    if objective == "paper":
        assert rest_square is not None
        plain_lse = _joint_lse(rest_lse, logits)
        plain = torch.exp(logits - plain_lse.unsqueeze(2))
        rho = torch.exp(plain_lse - lse)
        square = ((rho - 1) ** 2 * rest_square).sum(-1) + (edited - plain).square().sum((-1, -2))
        distance = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
        return loss + penalty * distance
    if theta is None:
        return loss
    theta = torch.where(padded[..., None, None], 0.0, theta)
    return loss + penalty * theta.square().mean((-1, -2)).sum(-1) / count


def keep_best(losses: Tensor, select: str) -> Tensor:
    """Return the step with the lowest loss over the heads of each sample, or over the whole batch: int64 [B]."""
    total = losses.mean(-1)
    if select == "batch":
        total = total.mean(-1, keepdim=True).expand_as(total)
    return torch.where(total.isnan(), torch.inf, total).argmin(0)


def regulate(
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    theta: Tensor,
    previous: Tensor | None,
    basis: Tensor,
    bias_scale: float,
    ema: float,
    strength: float,
    objective: str,
    steps: int,
    step_size: float,
    select: str,
    quantile: float,
    level: float,
    mass: float | None,
    mass_weight: float,
    penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Descend on theta by autograd; return (bias, theta) of the best step and the losses of all: [steps,B,H].

    The bias is averaged with that of `previous`, or of the initial theta, and multiplied by `strength`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        square = None if rest_square is None else rest_square.detach().clone()
        fixed = logits.detach().clone(), rest_lse.detach().clone(), square
        padded = (logits == -torch.inf).all(-1)[..., None, None]
        before = torch.where(padded, 0.0, theta if previous is None else previous)
        current, basis = torch.where(padded, 0.0, theta.detach()).clone(), basis.detach().clone()
        thetas, losses = [], []
        for _ in range(steps):
            current.requires_grad_()
            bias = bias_scale * gaussian_bias(current, basis)
            loss = regulation_loss(*fixed, bias, current, objective, quantile, level, mass, mass_weight, penalty)
            (gradient,) = torch.autograd.grad(loss.sum(), current)
            thetas.append(current.detach())
            losses.append(loss.detach())
            current = (current - step_size * gradient).detach()
    history = torch.stack(losses)
    kept = torch.stack(thetas)[keep_best(history, select), torch.arange(theta.shape[0], device=theta.device)]
    average = gaussian_bias(kept, basis)
    if ema > 0:
        average = (1 - ema) * average + ema * gaussian_bias(before, basis)
    return strength * bias_scale * average, kept, history


def regulate_full_logits(
    logits: Tensor,
    target_ids: Tensor,
    theta: Tensor,
    basis: Tensor,
    *,
    steps: int = 20,
    step_size: float = 100.0,
    quantile: float = 0.9,
    level: float = 0.9,
    mass_weight: float = 80.0,
    penalty: float = 0.09,
) -> tuple[Tensor, Tensor, Tensor]:
    """Descend on the official objective as published.

    Every step adds S to the full logits [B,H,M,N], takes their softmax and differentiates through it. `regulate` must
    equal it, and it is the baseline of the operation benchmarks.

    Returns (bias [B,H,T,M], theta, losses [steps,B,H]); `target_ids` [T]; the best step is that of the whole batch.
    """
    targets = len(target_ids)
    share = min(1.0, 0.2 * targets) / targets
    maps = basis.flatten(0, 1).flatten(-2)
    current = theta.detach()
    best, best_loss, history = None, torch.inf, []
    with torch.enable_grad():
        for _ in range(steps):
            current = current.requires_grad_()
            bias = (current.flatten(-2).unsqueeze(-1) * maps).sum(-2)
            edited = logits.clone()
            edited[..., target_ids] = edited[..., target_ids] + bias.mT
            attention_map = edited.softmax(-1)[..., target_ids]
            loss = (torch.quantile(attention_map, quantile, dim=-2) - level).square().mean(-1)
            loss = loss + mass_weight * (attention_map.mean(-2) - share).square().mean(-1)
            loss = loss + penalty * current.square().mean((-1, -2, -3))
            if loss.mean() < best_loss:
                best, best_loss = (bias.detach(), current.detach()), loss.mean().item()
            (gradient,) = torch.autograd.grad(loss.sum(), current)
            history.append(loss.detach())
            current = (current - step_size * gradient).detach()
    if best is None:
        raise ValueError("every loss is NaN; the logits hold NaN or inf")
    return *best, torch.stack(history)


def smooth_maps(maps: Tensor, grid: Sequence[int], taps: Sequence[float]) -> Tensor:
    """Convolve every map with `taps` along both axes of the grid, its border reflected (MATH.md section 3)."""
    maps, radius = _wide(maps), len(taps) // 2
    kernel = torch.tensor(taps, dtype=maps.dtype, device=maps.device)
    padded = F.pad(maps.reshape(-1, 1, *grid), [radius] * 4, mode="reflect")
    return F.conv2d(padded, torch.outer(kernel, kernel)[None, None]).reshape(maps.shape)


def _unit(x: Tensor) -> Tensor:
    """Return x over its norm along the last dimension; zeros, whose gradient is zero, where it is all zeros."""
    square = x.square().sum(-1, keepdim=True)
    return torch.where(square == 0, 0.0, x / torch.where(square == 0, 1.0, square).sqrt())


def map_similarity(maps: Tensor) -> Tensor:
    """Return the cosines of the angles between maps, [B,n,n]."""
    unit = _unit(_wide(maps))
    return unit @ unit.mT


def similarity_loss(
    maps: Tensor,
    text_similarity: Tensor,
    lengths: Tensor | None,
    grid: Sequence[int],
    taps: Sequence[float],
    variant: str,
    weight: float,
) -> Tensor:
    """Return T-SAM's loss [B], row by row (MATH.md section 3).

    `cosine` leaves the diagonal out, the others put a 1 there and divide by the row's sum.
    """
    batch, tokens = maps.shape[:2]
    lengths = torch.full((batch,), tokens, device=maps.device) if lengths is None else lengths
    real = torch.arange(tokens, device=maps.device) < lengths[:, None]
    similarity = map_similarity(torch.where(real[..., None], smooth_maps(maps, grid, taps), 0.0))
    text = torch.where(real[..., None], text_similarity, 0.0)
    loss = similarity[:, 0, :0].sum(1)
    for i in range(1, tokens):
        if variant == "cosine":
            ours, theirs, share = similarity[:, i, :i], text[:, i, :i], torch.full_like(loss, i)
        else:
            ours = torch.cat([similarity[:, i, :i], torch.ones_like(loss)[:, None]], 1)
            total = ours.sum(1, keepdim=True)
            ours = torch.where(total != 0, ours / torch.where(total != 0, total, 1.0), 0.0)
            theirs, share = text[:, i, : i + 1], (i + 1) / lengths.clamp(min=1).to(loss.dtype)
        cosine = (_unit(theirs) * _unit(ours)).sum(1)
        distance = (theirs - ours).abs().sum(1) if variant == "absolute" else 1 - cosine
        loss = loss + torch.where(real[:, i], weight * share * distance, 0.0)
    return loss
