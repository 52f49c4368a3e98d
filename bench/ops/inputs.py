"""Inputs of the operations: of any sizes, awkward where that is asked for, the same on every device."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnctl_fast import ops
from attnctl_fast.ops import TargetStatistics

# Other inputs for the same cases: `make test-processors` runs the tests with several.
SEED = int(os.environ.get("ATTNCTL_TEST_SEED", "0"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GRIDS = {24: (4, 6), 63: (7, 9), 240: (12, 20)}
STATISTICS = TargetStatistics._fields
MAP_TOKENS = 7
Ids = tuple[tuple[int, ...], ...]
Tensors = dict[str, Tensor]


@functools.cache
def default_device() -> torch.device:
    """Where cases lie that name no device: on the GPU, unless there is none or the kernels are interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + 1000 * SEED)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | None = None) -> Tensor:
    """Numbers from [0, 1), the same on every device."""
    made = torch.rand(shape, dtype=torch.float64, generator=seeded(seed))
    return made.to(device or default_device(), dtype)


def randn(
    *shape: int, dtype: torch.dtype, seed: int, strided: bool = False, device: torch.device | None = None
) -> Tensor:
    """[B,H,M,d] normal numbers, rounded to dtype, the same on every device; strided: a view of [B,M,H*d]."""
    generator, device = seeded(seed), device or default_device()
    if not strided:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    batch, heads, tokens, width = shape
    flat = torch.randn(batch, tokens, heads * width, generator=generator, dtype=torch.float64).to(device, dtype)
    return flat.unflatten(-1, (heads, width)).transpose(1, 2)


def attention_inputs(
    batch: int,
    heads: int,
    image_tokens: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    sharp: float = 1.0,
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    q = randn(batch, heads, image_tokens, width, dtype=dtype, seed=1, **how)
    k = (sharp * randn(batch, heads, tokens, width, dtype=torch.float64, seed=2, **how)).to(dtype)
    return q, k, randn(batch, heads, tokens, width, dtype=dtype, seed=3, **how)


def qkv(t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    return t["q"], t["k"], t["v"]


def fenced(x: Tensor) -> Tensor:
    """`x` as a view into storage that is NaN all around it, so that a read out of bounds shows; ids among zeros."""
    around = x.new_full([side + 2 for side in x.shape], torch.nan if x.is_floating_point() else 0)
    inner = around[tuple(slice(1, -1) for _ in x.shape)]
    inner.copy_(x)
    return inner


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    keys: how many heads k and v have, each for as many of q's; None for as many as q.
    ids: one row for all samples, or one per sample.
    raised: the amplitude of the bias.
    strided: as a layer's projections give them, else fenced in by NaN.
    keyed: with a key_bias that masks some columns of every sample, and all of the last one of three.
    map_tokens: of the operations on maps; if ragged, the samples of a batch have fewer and fewer.
    more: what an operation returns on request too.
    on: a device instead of the default one.
    """

    m: int = 64
    n: int = 20
    d: int = 16
    dtype: torch.dtype = torch.float32
    ids: Ids = ((5, 9),)
    pinned: Ids = ((0, 12),)
    batch: int = 1
    heads: int = 2
    keys: int | None = None
    sharp: float = 1.0
    raised: float = 3.0
    strided: bool = False
    sigma: float | None = None
    keyed: bool = False
    map_tokens: int = MAP_TOKENS
    steps: int = 3
    more: bool = True
    ragged: bool = True
    on: torch.device | None = None

    @property
    def device(self) -> torch.device:
        return self.on or default_device()

    @property
    def grid(self) -> tuple[int, int]:
        side = math.isqrt(self.m)
        return GRIDS.get(self.m, (side, side))

    @property
    def scale(self) -> float:
        return self.d**-0.5

    def rows(self, ids: Ids) -> list[list[int]]:
        return [list(row) for row in (ids * self.batch if len(ids) == 1 else ids)]

    def tensor_ids(self, ids: Ids) -> Tensor:
        made = torch.tensor(ids[0] if len(ids) == 1 else ids, dtype=torch.int64, device=self.device)
        return made if self.strided else fenced(made)

    @cached_property
    def edit(self) -> dict[str, Tensor]:
        return {"target_ids": self.tensor_ids(self.ids), "pinned_ids": self.tensor_ids(self.pinned)}

    @property
    def basis(self) -> dict[str, Any]:
        return {"grid": self.grid, "sigma": self.sigma}

    @property
    def smoothing(self) -> dict[str, Any]:
        return {"grid": self.grid, "kernel_size": 3 if min(self.grid) > 1 else 1}

    @property
    def lengths(self) -> Tensor | None:
        """The number of tokens of every sample's maps."""
        if self.batch == 1 or not self.ragged:
            return None
        return self.map_tokens - torch.arange(self.batch, device=self.device)

    def tensors(self, names: Iterable[str] | None = None) -> Tensors:
        """Make the inputs of `names`, or of every operation, by name; the statistics as float64 gives them for these q,
        k and v. An input that a case does not have is left out."""
        makers = {
            **dict.fromkeys("qkv", self._qkv),
            **dict.fromkeys(("bias", "theta"), self._edits),
            **dict.fromkeys(("target_ids", "pinned_ids"), lambda: self.edit),
            **dict.fromkeys(STATISTICS, self._statistics),
            **dict.fromkeys(("maps", "text", "lengths"), self._maps),
            **dict.fromkeys(("row_regions", "column_regions", "share"), self._regions),
            **dict.fromkeys(("row_groups", "column_groups", "allowed"), self._groups),
            "key_bias": self._key_bias,
            "lse": self._lse,
            **dict.fromkeys(("projection", "gammas", "token_weight"), self._update),
        }
        made: Tensors = {}
        for name in makers if names is None else names:
            if name not in made:
                made |= {x: t for x, t in makers[name]().items() if x not in made}
        chosen = made if names is None else {name: made[name] for name in names if name in made}
        return {name: x if self.strided else fenced(x) for name, x in chosen.items()}

    def _qkv(self) -> Tensors:
        shape = (self.batch, self.heads, self.m, self.n, self.d)
        made = attention_inputs(*shape, self.dtype, self.sharp, strided=self.strided, device=self.device)
        kept = [slice(None), *[slice(self.keys)] * 2]
        return {name: x[:, heads] for name, x, heads in zip("qkv", made, kept, strict=True)}

    def _edits(self) -> Tensors:
        """NaN where a target is padding."""
        targets, shape = len(self.ids[0]), ops.basis_shape(**self.basis)
        padded = torch.tensor(self.rows(self.ids), device=self.device)[:, None, :, None] < 0
        bias = self.raised * randn(
            self.batch, self.heads, targets, self.m, dtype=torch.float32, seed=5, device=self.device
        )
        theta = self.raised * (rand(self.batch, self.heads, targets, *shape, seed=6, device=self.device) - 0.3)
        return {
            "bias": bias.masked_fill(padded, torch.nan),
            "theta": theta.masked_fill(padded.unsqueeze(-1), torch.nan),
        }

    def _statistics(self) -> Tensors:
        q, k, v = (x.double() for x in self._qkv().values())
        how: dict[str, Any] = {**self.edit, "key_bias": self._key_bias().get("key_bias")}
        statistics = ops.target_statistics(q, k, v, **how, with_square=True, impl="reference")
        return {name: x.float() for name, x in statistics._asdict().items() if x is not None}

    def _key_bias(self) -> Tensors:
        if not self.keyed:
            return {}
        key_bias = 2 * randn(1, 1, self.batch, self.n, dtype=torch.float32, seed=11, device=self.device)[0, 0]
        key_bias[:, 2::5] = -torch.inf
        if self.batch > 2:
            key_bias[-1] = -torch.inf
        return {"key_bias": key_bias}

    def _lse(self) -> Tensors:
        """Of all columns, as float64 gives it; head by head, for the logits of a joint layer would fill the memory."""
        q, k, _ = self._qkv().values()
        key_bias = self._key_bias().get("key_bias")
        added = 0.0 if key_bias is None else key_bias.double().unsqueeze(1)
        each = q.shape[1] // k.shape[1]
        heads = zip(q.double().unbind(1), (x for x in k.double().unbind(1) for _ in range(each)), strict=True)
        lse = [torch.logsumexp((a @ b.mT).mul_(self.scale).add_(added), -1) for a, b in heads]
        return {"lse": torch.stack(lse, 1).float()}

    def _maps(self) -> Tensors:
        """Maps as attention gives them, NaN for padded tokens, and causal rows that sum to 1."""
        shape = self.batch, self.map_tokens
        logits = self.sharp * randn(*shape, self.m, dtype=torch.float64, seed=7, device=self.device)
        maps = (logits.softmax(1) * rand(self.batch, 1, self.m, seed=8, device=self.device)).to(self.dtype)
        lengths = self.lengths
        if lengths is not None:
            padded = torch.arange(self.map_tokens, device=self.device) >= lengths[:, None]
            maps.masked_fill_(padded.unsqueeze(-1), torch.nan)
        text = rand(*shape, self.map_tokens, seed=9, device=self.device).tril()
        made = {"maps": maps, "text": text / text.sum(-1, keepdim=True)}
        return made if lengths is None else {**made, "lengths": lengths}

    def _regions(self) -> Tensors:
        """Sets of two regions, some empty, of the image tokens and of the context's."""
        samples = torch.arange(self.batch, device=self.device)[:, None]
        rows, columns = (((samples + torch.arange(side, device=self.device)) % 4).int() for side in (self.m, self.n))
        return {
            "row_regions": rows,
            "column_regions": columns,
            "share": rand(self.batch, self.m, seed=10, device=self.device),
        }

    def _groups(self) -> Tensors:
        """Four groups, each a run of neighbours that begins elsewhere in every sample; the last sees only itself, which
        is nothing where there are three columns."""
        samples = torch.arange(self.batch, device=self.device)[:, None]
        rows, columns = (
            (samples + torch.arange(side, device=self.device) * 4 // side) % 4 for side in (self.m, self.n)
        )
        allowed = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1]], device=self.device).bool()
        return {"row_groups": rows, "column_groups": columns, "allowed": allowed}

    def _update(self) -> Tensors:
        """Of a context's step, with a projection to as many numbers as all heads have."""
        return {
            "projection": torch.eye(self.heads * self.d, dtype=self.dtype, device=self.device),
            "gammas": torch.tensor([0.3, 0.7], device=self.device),
            "token_weight": 1 + rand(self.batch, self.n, seed=12, device=self.device),
        }
