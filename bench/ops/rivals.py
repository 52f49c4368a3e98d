"""The rivals: stock PyTorch at its best, and attention regulation's inner loop as it was published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnctl_fast import reference
from attnctl_fast.ops.gaussian_bias import axis_basis, basis_axes
from attnctl_fast.ops.smooth_maps import check_smoothing

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
Compile = Callable[[Any], Any]


def backends(device: torch.device) -> tuple[str, ...]:
    """Those of `SDPA` that the device may have."""
    return tuple(SDPA) if device.type == "cuda" else ("flash", "math")


def uncompiled(function: Any) -> Any:
    """Stands for torch.compile where nothing is compiled."""
    return function


def compiler(wanted: bool) -> Compile:
    """torch.compile that remembers nothing, if `wanted`, else `uncompiled`."""
    if not wanted:
        return uncompiled
    torch.compiler.reset()
    return partial(torch.compile, dynamic=False)


def axes(grid: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """The default basis along y [height, r_y] and x [width, r_x]."""
    axis_y, axis_x, sigma_y, sigma_x = basis_axes(grid, None, "official")
    return axis_basis(grid[0], axis_y, sigma_y, like), axis_basis(grid[1], axis_x, sigma_x, like)


def span(theta: Tensor, basis: tuple[Tensor, Tensor]) -> Tensor:
    """S [.., M] of theta [.., r_y, r_x]."""
    return (basis[0] @ (theta @ basis[1].mT)).flatten(-2)


def sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    with sdpa_kernel(SDPA[backend]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sdpa_pair(backend: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and softmax_m(l^T) Q, which is attention of the keys to the queries."""
    return sdpa(backend, q, k, v), sdpa(backend, k, q, q)


def published_context_gradient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the logits in memory, and a transposed copy of them."""
    logits = q.shape[-1] ** -0.5 * (q @ k.mT)
    return logits.softmax(-1) @ v, logits.mT.contiguous().softmax(-1) @ q


def kept_energy(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Both energies of a context [B], with the logits in memory."""
    square = k.float().square().sum((1, 3))
    return -full_logits(q, k).logsumexp(2).sum((1, 2)), (square / 2).logsumexp(-1)


def sdpa_each(backend: str, q: Tensor, ks: Sequence[Tensor], vs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Attention to every context, and their weighted mean."""
    total = sum(weights)
    out = sdpa(backend, q, ks[0], vs[0]) * (weights[0] / total)
    for k, v, weight in zip(ks[1:], vs[1:], weights[1:], strict=True):
        out = torch.add(out, sdpa(backend, q, k, v), alpha=weight / total)
    return out


def sdpa_guided(
    backend: str, compile: Compile, guidance: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, *negative: Tensor
) -> Tensor:
    """Attention to both texts, and the released code's guidance of the heads' outputs side by side."""

    def guide(positive: Tensor, away: Tensor) -> Tensor:
        positive, away = (x.transpose(1, 2).flatten(2) for x in (positive, away))
        extended = positive * guidance["scale"] - away * (guidance["scale"] - 1)
        sizes = [torch.norm(x, p=guidance["norm"], dim=-1, keepdim=True) for x in (positive, extended)]
        ratio = sizes[1] / sizes[0]
        bounded = extended * torch.clamp(ratio, max=guidance["tau"]) / ratio
        out = bounded * guidance["alpha"] + positive * (1 - guidance["alpha"])
        return out.unflatten(2, (q.shape[1], -1)).transpose(1, 2)

    return compile(guide)(sdpa(backend, q, k, v), sdpa(backend, q, *negative))


def sorted_entmax_attention(q: Tensor, k: Tensor, v: Tensor, weight: float) -> Tensor:
    """As published: both probabilities in memory, the entmax by sorting every row."""
    logits = q.shape[-1] ** -0.5 * (q @ k.mT)
    dense = logits.softmax(-1)
    return (dense + weight * (reference.entmax(logits) - dense)) @ v


def published_region_attention(
    q: Tensor, k: Tensor, v: Tensor, row_regions: Tensor, column_regions: Tensor, weight: Tensor
) -> Tensor:
    """With the logits, the masks and both pulls in memory."""
    logits = q.shape[-1] ** -0.5 * (q @ k.mT)
    shared = ((row_regions[:, :, None] & column_regions[:, None, :]) != 0).unsqueeze(1)
    high, low = logits.amax(-1, keepdim=True), logits.amin(-1, keepdim=True)
    share = weight[:, None, :, None].to(logits.dtype)
    logits += shared * share * (high - logits)
    logits -= ~shared * share * (logits - low)
    return logits.softmax(-1) @ v


def flex_regions(
    compile: Compile, row_regions: Tensor, column_regions: Tensor, weight: Tensor
) -> Callable[..., Tensor]:
    """FlexAttention whose score function pulls to the rows' extremes, as a function of (q, k, v). The extremes are
    those of logits in memory: it cannot return a minimum, and a maximum only on a GPU."""
    attend, extremes = compile(flex_attention), compile(lambda q, k: torch.aminmax(q @ k.mT, dim=-1))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        low, high = (q.shape[-1] ** -0.5 * x.float() for x in extremes(q, k))

        def score(logit: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            shared = (row_regions[b, m] & column_regions[b, n]) != 0
            return logit + weight[b, m] * (torch.where(shared, high[b, h, m], low[b, h, m]) - logit)

        return attend(q, k, v, score_mod=score)

    return run


def seen_by_groups(row_groups: Tensor, column_groups: Tensor, allowed: Tensor) -> Tensor:
    """Which column every row sees: bool [B,M,N]."""
    return allowed[row_groups[:, :, None], column_groups[:, None, :]]


def flex_grouped(compile: Compile, row_groups: Tensor, column_groups: Tensor, allowed: Tensor) -> Callable[..., Tensor]:
    """FlexAttention between groups, with its block mask made once, as a function of (q, k, v)."""

    def seen(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return allowed[row_groups[b, m], column_groups[b, n]]

    (batch, rows), columns = row_groups.shape, column_groups.shape[1]
    mask = create_block_mask(seen, batch, None, rows, columns, device=row_groups.device)
    attend = compile(flex_attention)
    return lambda q, k, v: attend(q, k, v, block_mask=mask)


class Columns(NamedTuple):
    """What a prompt's targets give once: their ids [T], one-hot columns [N,T] in the dtype of k, and which target each
    text token is, or -1 [N]."""

    ids: Tensor
    one_hot: Tensor
    slots: Tensor

    @classmethod
    def of(cls, target_ids: Tensor, k: Tensor) -> Columns:
        named = torch.arange(k.shape[2], device=k.device)[:, None] == target_ids
        slots = torch.where(named.any(1), named.int().argmax(1), -1)
        return cls(target_ids, named.to(k.dtype), slots)


def kept_maps(q: Tensor, k: Tensor, v: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention and the head mean of its maps [B,n,M] as published: all probabilities in memory; None: every token."""
    probabilities = (q.shape[-1] ** -0.5 * (q @ k.mT)).softmax(-1)
    maps = probabilities if token_ids is None else probabilities.index_select(3, token_ids)
    return probabilities @ v, maps.float().mean(1).mT


def one_hot_maps(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, one_hot: Tensor
) -> tuple[Tensor, Tensor]:
    """The same from any attention: values [v, one-hot] give the maps beside the output. Fused backends want q, k and v
    alike, and their width a multiple of 8."""
    width, count = q.shape[3], one_hot.shape[1]
    spare = -(width + count) % 8
    values = F.pad(torch.cat([v, one_hot.expand(*v.shape[:2], -1, -1)], 3), (0, spare))
    # The backends scale by the width that they see.
    scale = ((width + count + spare) / width) ** 0.5
    out = attend(F.pad(scale * q, (0, count + spare)), F.pad(k, (0, count + spare)), values)
    return out[..., :width], out[..., width : width + count].float().mean(1).mT


def one_hot_columns(attend: Callable[..., Tensor], q: Tensor, k: Tensor, one_hot: Tensor) -> Tensor:
    """The head mean of the maps [B,n,M] from any attention to one-hot columns as values, which the heads are padded to
    where there are more columns than their width."""
    width, count = q.shape[3], one_hot.shape[1]
    spare = max(width, count + -count % 8) - width
    if spare:
        # The backends scale by the width that they see.
        q, k = F.pad(((width + spare) / width) ** 0.5 * q, (0, spare)), F.pad(k, (0, spare))
    values = F.pad(one_hot, (0, width + spare - count)).expand(*k.shape[:2], -1, -1)
    return attend(q, k, values)[..., :count].float().mean(1).mT


def columns_by_exp(q: Tensor, k: Tensor, lse: Tensor, token_ids: Tensor) -> Tensor:
    """The same from the logsumexp, with the maps of all heads in memory."""
    logits = q.shape[-1] ** -0.5 * (k.index_select(2, token_ids).float() @ q.float().mT)
    return torch.exp(logits - lse.unsqueeze(2)).mean(1)


def masked_sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, columns: Columns) -> Tensor:
    """The bias scattered into a mask [B,H,M,N] of zeros. Fused backends want its rows aligned, so they are padded."""
    tokens = k.shape[2]
    mask = q.new_zeros(*q.shape[:3], -(-tokens // 8) * 8)
    mask = mask.index_copy(3, columns.ids, bias.mT.to(q.dtype))
    return sdpa(backend, q, k, v, mask[..., :tokens])


def low_rank_sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, columns: Columns) -> Tensor:
    """softmax(scale q k^T + S) as one product: q' = [q, S / scale], k' = [k, one-hot], a multiple of 8 columns."""
    width, targets = q.shape[3], bias.shape[2]
    spare = -(width + targets) % 8
    scale = width**-0.5
    wide_q = F.pad(torch.cat([q, (bias.mT / scale).to(q.dtype)], 3), (0, spare))
    wide_k = F.pad(torch.cat([k, columns.one_hot.expand(*k.shape[:2], -1, -1)], 3), (0, spare))
    with sdpa_kernel(SDPA[backend]):
        out = F.scaled_dot_product_attention(wide_q, wide_k, F.pad(v, (0, targets + spare)), scale=scale)
    return out[..., :width]


def flex(compile: Compile) -> Callable[..., Tensor]:
    """FlexAttention whose score function reads the bias, as a function of (q, k, v, bias, columns)."""
    attend = compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, columns: Columns) -> Tensor:
        def score(logit: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            slot = columns.slots[n]
            return torch.where(slot >= 0, logit + bias[b, h, slot.clamp(min=0), m], logit)

        return attend(q, k, v, score_mod=score)

    return run


def published(
    q: Tensor, k: Tensor, target_ids: Tensor, theta: Tensor, basis: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """(losses [steps,B,H], bias) of the inner loop as published: full logits, autograd, a host sync in every step."""
    bias, _, losses = reference.regulate_full_logits(full_logits(q, k), target_ids, theta, basis, steps=steps)
    return losses, bias


def published_without_sync(
    q: Tensor, k: Tensor, target_ids: Tensor, theta: Tensor, basis: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """The same with the best step chosen on the device."""
    logits, maps = full_logits(q, k), basis.flatten(0, 1).flatten(-2)
    share = min(1.0, 0.2 * len(target_ids)) / len(target_ids)
    current, losses = theta, []
    best, lowest = logits.new_zeros(*theta.shape[:3], logits.shape[2]), logits.new_full((), torch.inf)
    with torch.enable_grad():
        for _ in range(steps):
            current = current.detach().requires_grad_()
            bias = (current.flatten(-2).unsqueeze(-1) * maps).sum(-2)
            edited = logits.index_add(3, target_ids, bias.mT)
            found = edited.softmax(-1).index_select(3, target_ids)
            loss = (torch.quantile(found, 0.9, dim=-2) - 0.9).square().mean(-1)
            loss = loss + 80.0 * (found.mean(-2) - share).square().mean(-1)
            loss = loss + 0.09 * current.square().mean((-1, -2, -3))
            total = loss.detach().mean()
            best = torch.where(total < lowest, bias.detach(), best)
            lowest = torch.minimum(total, lowest)
            losses.append(loss.detach())
            (gradient,) = torch.autograd.grad(loss.sum(), current)
            current = current - 100.0 * gradient
    return torch.stack(losses), best


def full_logits(q: Tensor, k: Tensor) -> Tensor:
    return (q.float() @ k.float().mT) * q.shape[3] ** -0.5


def statistics_loop(
    grid: tuple[int, int],
    basis: tuple[Tensor, Tensor],
    steps: int,
    compile: Compile,
    *,
    step_size: float = 100.0,
    quantile: float = 0.9,
    level: float = 0.9,
    mass: float | None = None,
    mass_weight: float = 80.0,
    penalty: float = 0.09,
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(losses [steps,B,H], bias) from (logits [B,H,T,M], rest_lse [B,H,M], theta): the closed forms of one step of the
    official objective in plain PyTorch, compiled, in a loop. `basis`: from `axes`; the rest as for `ops.regulate`."""

    def step(theta: Tensor, logits: Tensor, rest: Tensor, basis_y: Tensor, basis_x: Tensor) -> tuple[Tensor, Tensor]:
        count, size = logits.shape[2:]
        position = quantile * (size - 1)
        rank, fraction = int(position), position - int(position)
        edited = torch.cat([logits + span(theta, (basis_y, basis_x)), rest.unsqueeze(2)], 2)
        maps = edited.softmax(2)[:, :, :count]
        values, places = maps.topk(size - rank)
        lower, upper = values[..., -1], values[..., max(-2, -values.shape[-1])]
        share = min(1.0, 0.2 * count) / count if mass is None else mass
        above, off = torch.lerp(lower, upper, fraction) - level, maps.mean(3) - share
        loss = (above**2 + mass_weight * off**2).mean(2) + penalty * theta.square().mean((-1, -2, -3))
        slope = (2 * mass_weight / (count * size) * off).unsqueeze(-1).expand_as(maps)
        slopes = torch.stack([above * (1 - fraction), above * fraction], -1) * (2 / count)
        at = torch.stack([places[..., -1], places[..., max(-2, -values.shape[-1])]], -1)
        slope = slope.scatter_add(3, at, slopes) * maps
        slope = slope - slope.sum(2, keepdim=True) * maps
        gradient = basis_y.mT @ slope.unflatten(3, grid) @ basis_x
        shrink = 1 - step_size * 2 * penalty / (count * theta.shape[3] * theta.shape[4])
        return theta * shrink - step_size * gradient, loss

    fused = compile(step)

    def run(logits: Tensor, rest_lse: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        thetas, losses = [theta], []
        for _ in range(steps):
            following, loss = fused(thetas[-1], logits, rest_lse, *basis)
            thetas.append(following)
            losses.append(loss)
        history = torch.stack(losses)
        kept = torch.stack(thetas[:-1])[history.mean(2).argmin(0), torch.arange(len(theta), device=theta.device)]
        return history, span(kept, basis)

    return run


def published_similarity_loss(maps: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
    """T-SAM's loss [B] with loops over samples and pairs: both maps of every pair are smoothed, then compared."""
    taps = torch.tensor(check_smoothing(grid, maps.shape[2], 0.5, 3)[1], dtype=maps.dtype, device=maps.device)
    kernel = torch.outer(taps, taps)[None, None]

    def smoothed(one: Tensor) -> Tensor:
        return F.conv2d(F.pad(one.view(1, 1, *grid), (1, 1, 1, 1), mode="reflect"), kernel).flatten()

    losses = []
    for sample, expected in zip(maps, text, strict=True):
        similarity = torch.eye(len(sample), dtype=maps.dtype, device=maps.device)
        for i in range(len(sample)):
            for j in range(i):
                similarity[i, j] = F.cosine_similarity(smoothed(sample[i]), smoothed(sample[j]), dim=0)
        loss = maps.new_zeros(())
        for i in range(1, len(sample)):
            loss = loss + 0.2 * i * (1 - F.cosine_similarity(expected[i, :i], similarity[i, :i], dim=0))
        losses.append(loss)
    return torch.stack(losses)


def convolved(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps [B,n,M] smoothed by one convolution."""
    taps = torch.tensor(check_smoothing(grid, maps.shape[2], 0.5, 3)[1], dtype=maps.dtype, device=maps.device)
    padded = F.pad(maps.reshape(-1, 1, *grid), (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, torch.outer(taps, taps)[None, None]).view(maps.shape)


def plain_similarity(maps: Tensor) -> Tensor:
    """The cosines [B,n,n] between maps by one product."""
    unit = F.normalize(maps, dim=-1)
    return unit @ unit.mT


def plain_similarity_loss(maps: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
    """T-SAM's loss by one convolution, one product of all maps and masked rows, left to autograd."""
    similarity = plain_similarity(convolved(maps, grid)).tril(-1)
    weight = 0.2 * torch.arange(1, maps.shape[1], dtype=maps.dtype, device=maps.device)
    cosines = F.cosine_similarity(text.tril(-1)[:, 1:], similarity[:, 1:], dim=-1)
    return (weight * (1 - cosines)).sum(-1)
