"""The attention layers of a model: names, places, grids, and choosing among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class ByDownsampling:
    """See `by_downsampling`."""

    factor: int


def by_downsampling(factor: int) -> ByDownsampling:
    """Choose the cross-attention layers whose grid is the latents' grid divided by `factor` along each axis.

    `by_downsampling(4)` names the 16x16 layers of Stable Diffusion at 512x512 (latents 64x64).

    Raises:
        ValueError: `factor` is not a power of two (1, 2, 4, ...).
    """
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1 or factor & (factor - 1):
        raise ValueError(f"factor is {factor!r}; a UNet halves its grid, so it must be a power of two: 1, 2, 4, 8")
    return ByDownsampling(factor)


LayerChoice: TypeAlias = str | Sequence[str] | ByDownsampling | None


def check_choice(layers: LayerChoice) -> tuple[str, ...] | ByDownsampling | None:
    """Return `layers` in hashable form.

    Raises:
        ValueError: neither name prefixes, `by_downsampling(n)` nor None.
    """
    if layers is None or isinstance(layers, ByDownsampling):
        return layers
    given = (layers,) if isinstance(layers, str) else layers
    names = tuple(given) if isinstance(given, Iterable) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"layers is {layers!r}; pass name prefixes such as ['down_blocks.2', 'up_blocks.1'], "
            "by_downsampling(factor), or None for the method's default"
        )
    return names


@dataclass(frozen=True)
class Layer:
    """An attention module of a UNet.

    name: as in `named_modules()`. block: its block, such as `down_blocks.2`. level: how often the latents' grid has
    been halved where it stands. cross: whether it attends to the text, not to the image itself.
    """

    name: str
    block: str
    level: int
    module: Any
    cross: bool = True

    def grid(self, latents: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) of the layer for latents of that (height, width).

        Odd sides are rounded up, as the UNet does.
        """
        return -(-latents[0] >> self.level), -(-latents[1] >> self.level)


def _blocks(unet: Any) -> Iterable[tuple[str, Any, int]]:
    """Yield (name, module, level) of every block in order of execution."""
    level = 0
    if not hasattr(unet, "down_blocks"):
        return
    for index, block in enumerate(unet.down_blocks):
        yield f"down_blocks.{index}", block, level
        level += getattr(block, "downsamplers", None) is not None
    if unet.mid_block is not None:
        yield "mid_block", unet.mid_block, level
    for index, block in enumerate(unet.up_blocks):
        yield f"up_blocks.{index}", block, level
        level -= getattr(block, "upsamplers", None) is not None


def unet_layers(unet: Any) -> dict[str, Layer]:
    """Return every cross-attention layer of a UNet, and every self-attention layer of its transformer blocks, by name.

    In order of execution: down, mid, up.
    """
    from diffusers.models.attention_processor import Attention

    return {
        f"{block_name}.{name}": Layer(f"{block_name}.{name}", block_name, level, module, module.is_cross_attention)
        for block_name, block, level in _blocks(unet)
        for name, module in block.named_modules()
        if isinstance(module, Attention) and (module.is_cross_attention or name.endswith((".attn1", ".attn2")))
    }


def cross_attention_layers(unet: Any) -> dict[str, Layer]:
    """Return every cross-attention layer of a UNet by name, in order of execution."""
    return {name: layer for name, layer in unet_layers(unet).items() if layer.cross}


def last_down_first_up(layers: dict[str, Layer]) -> list[str]:
    """Return the layers of the last down and the first up block that have cross-attention, as in arXiv 2403.06381."""
    blocks = list(dict.fromkeys(layer.block for layer in layers.values()))
    down = [block for block in blocks if block.startswith("down_blocks")][-1:]
    up = [block for block in blocks if block.startswith("up_blocks")][:1]
    return [name for name, layer in layers.items() if layer.block in down + up]


def _matches(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix.rstrip(".") + ".")


def choose(layers: dict[str, Layer], choice: str | Sequence[str] | ByDownsampling) -> list[str]:
    """Return the names that `choice` (of `check_choice`) selects, in order of execution.

    Raises:
        ValueError: a prefix, or a downsampling, that no cross-attention layer has; the message lists those that exist.
    """
    if isinstance(choice, ByDownsampling):
        chosen = [name for name, layer in layers.items() if 1 << layer.level == choice.factor]
        if not chosen:
            blocks: dict[int, dict[str, None]] = {}
            for layer in layers.values():
                blocks.setdefault(1 << layer.level, {})[layer.block] = None
            known = [f"{factor} ({', '.join(blocks[factor])})" for factor in sorted(blocks)]
            raise ValueError(
                f"no cross-attention layer divides the latents' grid by {choice.factor}; this UNet has "
                f"by_downsampling of {', '.join(known)}; name such blocks as layers"
            )
        return chosen
    for prefix in choice:
        if not any(_matches(name, prefix) for name in layers):
            raise ValueError(f"{prefix!r} matches no cross-attention layer; this UNet has {', '.join(layers)}")
    return [name for name in layers if any(_matches(name, prefix) for prefix in choice)]
