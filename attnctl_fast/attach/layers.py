"""The attention layers of a model: names, places, grids, and choosing among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True)
class ByDownsampling:
    """See `by_downsampling`."""

    factor: int


def by_downsampling(factor: int) -> ByDownsampling:
    """Choose the layers with text whose grid is the latents' grid divided by `factor` along each axis.

    `by_downsampling(4)` names the 16x16 layers of Stable Diffusion at 512x512 (latents 64x64). All layers of a
    transformer have one grid: the latents' divided by the size of its patches.

    Raises:
        ValueError: `factor` is not a power of two (1, 2, 4, ...).
    """
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1 or factor & (factor - 1):
        raise ValueError(f"factor is {factor!r}; grids are halved, so it must be a power of two: 1, 2, 4, 8")
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
    """An attention module of a model.

    name: as in `named_modules()`. block: its block, such as `down_blocks.2`. factor: how many latents lie along a side
    of one of its image tokens. cross: whether it attends to the text, not to the image alone. text: where the text
    stands in the one sequence of joint attention, "first" or "last"; "" where the text is apart. outer_mask: the mask
    of its attention is the outer product of one of its tokens. before: how many tokens of the model's own stand before
    a text that is first. fill: of how many tokens the length of an image that is first is a multiple.
    """

    name: str
    block: str
    factor: int
    module: Any
    cross: bool = True
    text: Literal["", "first", "last"] = ""
    outer_mask: bool = False
    before: int = 0
    fill: int = 1

    def text_start(self, image: int) -> int:
        """Return the first column of the text in joint attention with so many image tokens."""
        return self.before if self.text == "first" else -(-image // self.fill) * self.fill

    def grid(self, latents: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) of the layer for latents of that (height, width).

        Odd sides are rounded up, as a UNet does.
        """
        return -(-latents[0] // self.factor), -(-latents[1] // self.factor)


def _blocks(unet: Any) -> Iterable[tuple[str, Any, int]]:
    """Yield (name, module, factor) of every block in order of execution."""
    level = 0
    if not hasattr(unet, "down_blocks"):
        return
    for index, block in enumerate(unet.down_blocks):
        yield f"down_blocks.{index}", block, 1 << level
        level += getattr(block, "downsamplers", None) is not None
    if unet.mid_block is not None:
        yield "mid_block", unet.mid_block, 1 << level
    for index, block in enumerate(unet.up_blocks):
        yield f"up_blocks.{index}", block, 1 << level
        level -= getattr(block, "upsamplers", None) is not None


def unet_layers(unet: Any) -> dict[str, Layer]:
    """Return every cross-attention layer of a UNet, and every self-attention layer of its transformer blocks, by name.

    In order of execution: down, mid, up.
    """
    from diffusers.models.attention_processor import Attention

    return {
        f"{block_name}.{name}": Layer(f"{block_name}.{name}", block_name, factor, module, module.is_cross_attention)
        for block_name, block, factor in _blocks(unet)
        for name, module in block.named_modules()
        if isinstance(module, Attention) and (module.is_cross_attention or name.endswith((".attn1", ".attn2")))
    }


def transformer_layers(
    model: Any,
    factor: int,
    *,
    cross: tuple[str, ...],
    text: Literal["", "first", "last"] = "",
    outer_mask: bool = False,
    before: int = 0,
    fill: int = 1,
    stacks: str = "blocks",
) -> dict[str, Layer]:
    """Return the attention layers of a transformer's blocks by name, in order of execution.

    Those that make no attention call (linear ones) are left out.

    Args:
        model: the transformer.
        factor: how many latents lie along a side of an image token.
        cross: the names, within a block, of those that attend to the text.
        text: as in `Layer`, of those.
        outer_mask: as in `Layer`, of those.
        before: as in `Layer`, of those.
        fill: as in `Layer`, of those.
        stacks: how its lists of blocks are called, or how their names end.
    """
    found = {}
    for name, module in model.named_modules():
        stack, _, rest = name.partition(".")
        index, _, own = rest.partition(".")
        if not stack.endswith(stacks) or own not in {*cross, "attn1", "attn2"} or not hasattr(module, "processor"):
            continue
        if "Linear" in type(module.processor).__name__:
            continue
        layer = Layer(name, f"{stack}.{index}", factor, module, own in cross)
        joint: dict[str, Any] = {"text": text, "outer_mask": outer_mask, "before": before, "fill": fill}
        found[name] = replace(layer, **joint) if layer.cross else layer
    return found


def cross_attention_layers(unet: Any) -> dict[str, Layer]:
    """Return every cross-attention layer of a UNet by name, in order of execution."""
    return {name: layer for name, layer in unet_layers(unet).items() if layer.cross}


def last_down_first_up(layers: dict[str, Layer]) -> list[str]:
    """Return the layers of the last down and the first up block that have cross-attention, as in arXiv 2403.06381."""
    blocks = list(dict.fromkeys(layer.block for layer in layers.values()))
    down = [block for block in blocks if block.startswith("down_blocks")][-1:]
    up = [block for block in blocks if block.startswith("up_blocks")][:1]
    return [name for name, layer in layers.items() if layer.block in down + up]


def middle_third(layers: dict[str, Layer]) -> list[str]:
    """Return the layers of the middle third of a transformer's blocks with text, without those of single streams."""
    names = both_streams(layers)
    third = len(names) // 3
    return names[third : len(names) - third]


def both_streams(layers: dict[str, Layer]) -> list[str]:
    """Return the layers of a transformer's blocks with a stream for the text and one for the image."""
    return [name for name, layer in layers.items() if not layer.block.startswith("single_")]


def of_transformer(layers: dict[str, Layer]) -> bool:
    """Return whether these are a transformer's layers, which all have one grid."""
    lists = ("blocks.", "layers.")
    return any("transformer_blocks" in layer.block or layer.block.startswith(lists) for layer in layers.values())


def _matches(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix.rstrip(".") + ".")


def choose(layers: dict[str, Layer], choice: str | Sequence[str] | ByDownsampling) -> list[str]:
    """Return the names that `choice` (of `check_choice`) selects, in order of execution.

    Raises:
        ValueError: a prefix, or a downsampling, that no cross-attention layer has; the message lists those that exist.
    """
    if isinstance(choice, ByDownsampling):
        chosen = [name for name, layer in layers.items() if layer.factor == choice.factor]
        if not chosen:
            blocks: dict[int, dict[str, None]] = {}
            for layer in layers.values():
                blocks.setdefault(layer.factor, {})[layer.block] = None
            known = [f"{factor} ({', '.join(blocks[factor])})" for factor in sorted(blocks)]
            raise ValueError(
                f"no layer with text divides the latents' grid by {choice.factor}; this model has "
                f"by_downsampling of {', '.join(known)}; name such blocks as layers"
            )
        return chosen
    for prefix in choice:
        if not any(_matches(name, prefix) for name in layers):
            raise ValueError(f"{prefix!r} matches no layer with text; this model has {', '.join(layers)}")
    return [name for name in layers if any(_matches(name, prefix) for prefix in choice)]
