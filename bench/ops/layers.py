"""The layers of Stable Diffusion and FLUX whose kernels are compiled, tuned and measured."""

from __future__ import annotations

from typing import NamedTuple

from attnctl_fast.ops.map_similarity import KERNEL_TOKENS

PINNED = (0, 12)


class Layer(NamedTuple):
    """One attention layer: `tokens` columns, those of text tokens but in joint attention; heads of `width` numbers;
    targets and steps of regulation."""

    model: str
    heads: int
    grid: tuple[int, int]
    width: int
    tokens: int = 77
    targets: int = 2
    batch: int = 1
    steps: int = 20

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def pinned_ids(self) -> tuple[int, ...]:
        """Where SOS and EOS stand, which keep their probabilities."""
        return tuple(i for i in PINNED if i < self.tokens)

    @property
    def target_ids(self) -> tuple[int, ...]:
        return tuple(i for i in range(1, self.tokens) if i not in PINNED)[: self.targets]

    @property
    def map_tokens(self) -> int:
        """Of losses on maps: 12, or as many as there are targets, within the prompt and what the kernels take."""
        return min(max(12, self.targets), self.tokens - 2, KERNEL_TOKENS)

    @property
    def sizes(self) -> str:
        return f"B{self.batch} H{self.heads} M{self.image_tokens} N{self.tokens} d{self.width} T{self.targets}"


# The cross-attention layers at batch 1, from the largest grid to the smallest: SD 1.5 and SD 2 at 512 px, SD 2 at 768
# px, SDXL at 1024 px.
LAYERS = [
    *(Layer("SD 1.5", 8, (side, side), width) for side, width in ((64, 40), (32, 80), (16, 160), (8, 160))),
    *(Layer("SD 2", heads, (side, side), 64) for side, heads in ((64, 5), (32, 10), (16, 20), (8, 20))),
    *(Layer("SD 2 768", heads, (side, side), 64) for side, heads in ((96, 5), (48, 10), (24, 20), (12, 20))),
    *(Layer("SDXL", heads, (side, side), 64) for side, heads in ((64, 10), (32, 20))),
]
# Joint attention, image rows and all columns, of SD 3.5 and FLUX at 512 and 1024 px: a few words, a prompt's, the
# whole text.
JOINT = [
    *(Layer("SD 3.5", 24, (32, 32), 64, tokens=1357, targets=targets) for targets in (4, 40, 333)),
    *(Layer("FLUX", 24, (32, 32), 128, tokens=1536, targets=targets) for targets in (4, 40)),
    *(Layer("SD 3.5", 24, (64, 64), 64, tokens=4429, targets=targets) for targets in (4, 333)),
    *(Layer("FLUX", 24, (64, 64), 128, tokens=4608, targets=targets) for targets in (4, 512)),
]
# The widest heads of the layers where guidance works, those of SD 1.5.
WIDEST = LAYERS[2]
# Self-attention, which DenseDiffusion changes by regions, where it is largest.
SELF = Layer("SD 2", 5, (64, 64), 64, tokens=64 * 64)
# The kernels regulate up to 4096 image tokens.
REGULATED = [layer for layer in LAYERS if layer.image_tokens <= 4096]
# Of the aims (B*H, M) = (20, 256) and (20, 1024).
SMALL, LARGE = LAYERS[6], LAYERS[13]
# The most image tokens that SD 2 has at 512 px.
LARGEST = LAYERS[4]
# To see that all of it runs.
TINY = Layer("tiny", 2, (4, 4), 8, tokens=9, steps=2)
