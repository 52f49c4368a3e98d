"""The differences between models: where a pipeline keeps one, what its arguments are called, which layers it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from . import segments
from .layers import Layer, transformer_layers, unet_layers
from .tokens import Segment

# Of texts that were padded to one length: how long each is, `[R]` on the CPU.
_LENGTHS = "lengths"


def padded_texts(texts: Iterable[Tensor]) -> Tensor:
    """Return texts `[n,C]` of their own lengths as `[R,N,C]`, with zeros behind them."""
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)


def stacked_pictures(pictures: Sequence[Tensor]) -> Tensor:
    """Return pictures `[C,1,height,width]` as `[R,C,height,width]`."""
    return torch.stack(list(pictures)).squeeze(2)


def listed_pictures(pictures: Tensor) -> list[Tensor]:
    """Undo `stacked_pictures`."""
    return list(pictures.unsqueeze(2))


def _given_text(model: Any, given: dict[str, Any]) -> Tensor:
    text: Tensor = given["encoder_hidden_states"]
    return text


def _nothing_more(results: list[Any], encode: Callable[..., Any]) -> dict[str, Tensor]:
    return {}


def _whole_text(given: dict[str, Any]) -> int:
    return int(given["encoder_hidden_states"].shape[1])


@dataclass(frozen=True)
class Family:
    """Models that are attached to in the same way.

    name: how it is told from others. model: the class of its models in diffusers. component: where a pipeline keeps the
    model. layers: its attention layers by name, in order of execution. segments: the parts of its text, as in the
    module of that name. context: what layers are given as the text, from the model's arguments. lists: the model takes
    and returns a list of pictures `[C,1,height,width]`, and texts of their own lengths, and this is the pipeline's
    argument that says how many pictures a prompt has; "" where it takes tensors. conditional_first: the pipeline stacks
    the prompts' rows before those of negative prompts. sample, timestep, text: the model's arguments. positions: the
    argument that says where the image's tokens are: the index, row and column of each, or how many frames, rows and
    columns every picture has, or how many frames a video has, beside `height` and `width`; "" where the sample is
    `[R,C,height,width]`, or of videos `[R,C,frames,height,width]`. cell: where it is packed, how many latents lie along
    a side of a token. columns: how many columns of the text joint attention has, from the model's arguments. fill: of
    how many tokens the length of a text is a multiple; 0 where it is what the call says. beside: how a second text may
    run through it beside the prompts', as the module of that name has it; "" where none may. more: what else of another
    text than the prompt the model is given, from what `encode_prompt` returned behind its context and from that
    function with other arguments. refused: pipelines with such a model whose pictures lie elsewhere, each with why.
    """

    name: str
    model: str
    component: str
    layers: Callable[[Any], dict[str, Layer]]
    segments: Callable[[Any, dict[str, Any], int], list[Segment]]
    context: Callable[[Any, dict[str, Any]], Tensor] = _given_text
    lists: str = ""
    conditional_first: bool = False
    sample: str = "hidden_states"
    timestep: str = "timestep"
    text: str = "encoder_hidden_states"
    positions: str = ""
    cell: int = 2
    columns: Callable[[dict[str, Any]], int] = _whole_text
    fill: int = 0
    beside: Literal["", "rows", "columns"] = ""
    more: Callable[[list[Any], Callable[..., Any]], dict[str, Tensor]] = _nothing_more
    refused: Mapping[str, str] = field(default_factory=dict)

    def model_of(self, pipe: Any) -> Any:
        """Return the pipeline's model as it was before torch.compile wrapped it."""
        model = getattr(pipe, self.component)
        return getattr(model, "_orig_mod", model)

    def arguments(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of `model(*args, **kwargs)` by name."""
        return dict(zip(_parameters(type(model).forward), args, strict=False)) | kwargs

    def tensors(self, given: dict[str, Any], texts: Tensor) -> dict[str, Any]:
        """Return the arguments by name with tensors in place of lists, `replaced` undoes it; texts: `padded_texts`."""
        lengths = torch.tensor([len(text) for text in given[self.text]])
        pictures = stacked_pictures(given[self.sample])
        return {**given, self.sample: pictures, self.text: texts, _LENGTHS: lengths}

    def replaced(
        self, model: Any, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return `given` by name as positional arguments, as many as `args`, and keywords.

        Hooks on the model look for arguments where pipelines put them, and torch.compile would take another place for
        another call.
        """
        if self.lists:
            lengths, texts = given[_LENGTHS].tolist(), given[self.text]
            given = {name: x for name, x in given.items() if name != _LENGTHS}
            given[self.sample] = listed_pictures(given[self.sample])
            given[self.text] = [text[:length] for text, length in zip(texts, lengths, strict=True)]
        names = _parameters(type(model).forward)[: len(args)]
        return tuple(given[name] for name in names), {name: x for name, x in given.items() if name not in names}

    def latents(self, given: dict[str, Any]) -> tuple[int, int]:
        """Return (height, width) of the latents, from the model's arguments; reads positions from their device."""
        if not self.positions:
            height, width = given[self.sample].shape[-2:]
            return height, width
        ids = given.get(self.positions)
        if ids is None:
            raise ValueError(
                f"{self.model} was called without {self.positions}, which says where the image's tokens are; pass it, "
                "as pipelines do"
            )
        if isinstance(ids, int):
            return given["height"], given["width"]
        if not isinstance(ids, Tensor):
            # Of every sample; those behind the first are pictures to look at.
            first = ids[0][0] if isinstance(ids[0], list) else ids[0]
            return first[1] * self.cell, first[2] * self.cell
        ids = (ids[0] if ids.ndim == 3 else ids).cpu()
        # Tokens of other index are pictures to look at (Kontext).
        height, width = ((ids[ids[:, 0] == ids[0, 0]].amax(0)[1:3] + 1) * self.cell).int().tolist()
        return height, width

    def frames(self, given: dict[str, Any]) -> tuple[int, ...]:
        """Return (how many,) frames the latents have, from the model's arguments; () of pictures."""
        if not self.positions:
            return tuple(given[self.sample].shape[2:-2])
        frames = given[self.positions]
        return (frames,) if isinstance(frames, int) else ()

    def channels(self, model: Any) -> int:
        """Return how many channels of the model's input are the latents; others are a mask and pictures behind them."""
        into = int(model.config.in_channels)
        cell = int(model.config.patch_size) ** 2 if self.positions else 1
        return min(into, int(getattr(model.config, "out_channels", None) or into) * cell)


@cache
def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def _unet_context(unet: Any, given: dict[str, Any]) -> Tensor:
    text: Tensor = given["encoder_hidden_states"]
    if unet.encoder_hid_proj is None or unet.config.encoder_hid_dim_type == "ip_image_proj":
        return text
    # Kolors' text is another encoder's.
    return unet.process_encoder_hidden_states(text, given.get("added_cond_kwargs"))


def _pixart_context(model: Any, given: dict[str, Any]) -> Tensor:
    text: Tensor = given["encoder_hidden_states"]
    return text if model.caption_projection is None else model.caption_projection(text)


def _sana_context(model: Any, given: dict[str, Any]) -> Tensor:
    return model.caption_norm(model.caption_projection(given["encoder_hidden_states"]))


def _wan_context(model: Any, given: dict[str, Any]) -> Tensor:
    text: Tensor = model.condition_embedder.text_embedder(given["encoder_hidden_states"])
    return text


def _hunyuan_context(model: Any, given: dict[str, Any]) -> Tensor:
    text = torch.cat([given["encoder_hidden_states"], model.text_embedder(given["encoder_hidden_states_t5"])], 1)
    mask = torch.cat([given["text_embedding_mask"], given["text_embedding_mask_t5"]], -1)
    return torch.where(mask.bool()[..., None], text, model.text_embedding_padding)


def _hunyuan_more(results: list[Any], encode: Callable[..., Any]) -> dict[str, Tensor]:
    context, _, mask, _ = encode(text_encoder_index=1, max_sequence_length=256)
    return {
        "text_embedding_mask": results[1],
        "encoder_hidden_states_t5": context,
        "text_embedding_mask_t5": mask,
    }


def _captions(model: Any, given: dict[str, Any]) -> Tensor:
    captions: Tensor = given["cap_feats"]
    return captions


def _whole_captions(given: dict[str, Any]) -> int:
    return int(given["cap_feats"].shape[1])


def _real_text(given: dict[str, Any]) -> int:
    """Return how many tokens the text has without padding, behind which the image follows at once."""
    lengths = {int(length) for length in given["encoder_attention_mask"].sum(1).tolist()}
    if len(lengths) > 1:
        raise ValueError(
            f"the prompts have {', '.join(map(str, sorted(lengths)))} tokens, and the image stands right behind each "
            "of them; draw prompts of different lengths one by one"
        )
    return lengths.pop()


def _patched(model: Any, **options: Any) -> dict[str, Layer]:
    return transformer_layers(model, model.config.patch_size, **options)


_cross = partial(_patched, cross=("attn2",))


def _wan(model: Any) -> dict[str, Layer]:
    return transformer_layers(model, model.config.patch_size[1], cross=("attn2",))


_FROM_PICTURE = "goes on from a picture, which stands in the latents that methods move"
_flux = partial(transformer_layers, factor=2, cross=("attn",), text="first")
_masked_flux = partial(_flux, outer_mask=True)


def _auraflow(model: Any) -> dict[str, Layer]:
    return _patched(model, cross=("attn",), text="first", before=model.register_tokens.shape[1])


_cogview4 = partial(_patched, cross=("attn1",), text="first")
_lumina2 = partial(_patched, stacks="layers", cross=("attn",), text="first")
_zimage = partial(transformer_layers, factor=2, stacks="layers", cross=("attention",), text="last", fill=32)
_sd3 = partial(_patched, cross=("attn",), text="last")
UNET = Family(
    "unet",
    "UNet2DConditionModel",
    "unet",
    unet_layers,
    segments.unet_segments,
    _unet_context,
    sample="sample",
)
FAMILIES = (
    UNET,
    Family("pixart", "PixArtTransformer2DModel", "transformer", _cross, segments.pixart_segments, _pixart_context),
    Family("sana", "SanaTransformer2DModel", "transformer", _cross, segments.sana_segments, _sana_context),
    Family(
        "hunyuan",
        "HunyuanDiT2DModel",
        "transformer",
        _cross,
        segments.hunyuan_segments,
        _hunyuan_context,
        more=_hunyuan_more,
    ),
    Family(
        "wan",
        "WanTransformer3DModel",
        "transformer",
        _wan,
        segments.wan_segments,
        _wan_context,
        refused={"WanImageToVideoPipeline": _FROM_PICTURE},
    ),
    Family(
        "ltx",
        "LTXVideoTransformer3DModel",
        "transformer",
        _cross,
        segments.ltx_segments,
        _pixart_context,
        positions="num_frames",
        cell=1,
        refused={
            "LTXImageToVideoPipeline": _FROM_PICTURE,
            "LTXConditionPipeline": "puts frames to go on from among the latents that methods move",
            "LTXI2VLongMultiPromptPipeline": "draws a video window by window, each with a prompt of its own",
        },
    ),
    Family(
        "sd3",
        "SD3Transformer2DModel",
        "transformer",
        _sd3,
        segments.sd3_segments,
        beside="rows",
    ),
    Family(
        "flux",
        "FluxTransformer2DModel",
        "transformer",
        _flux,
        segments.flux_segments,
        positions="img_ids",
        beside="rows",
    ),
    Family(
        "chroma",
        "ChromaTransformer2DModel",
        "transformer",
        _masked_flux,
        segments.chroma_segments,
        positions="img_ids",
    ),
    Family(
        "flux2",
        "Flux2Transformer2DModel",
        "transformer",
        _flux,
        segments.flux2_segments,
        positions="img_ids",
        beside="columns",
        refused={"Flux2KleinKVPipeline": "keeps the keys of the pictures to look at, and has them in between"},
    ),
    Family(
        "lumina2",
        "Lumina2Transformer2DModel",
        "transformer",
        _lumina2,
        segments.lumina2_segments,
        columns=_real_text,
    ),
    Family(
        "zimage",
        "ZImageTransformer2DModel",
        "transformer",
        _zimage,
        segments.zimage_segments,
        _captions,
        lists="num_images_per_prompt",
        conditional_first=True,
        sample="x",
        timestep="t",
        text="cap_feats",
        columns=_whole_captions,
        fill=1,
        refused={
            "ZImageOmniPipeline": "has pictures to look at between the texts of a prompt",
            "ZImageControlNetPipeline": "adds to places in the sequence, whose length guidance changes",
            "ZImageControlNetInpaintPipeline": "adds to places in the sequence, whose length guidance changes",
        },
    ),
    Family("cogview4", "CogView4Transformer2DModel", "transformer", _cogview4, segments.cogview4_segments, fill=16),
    Family("auraflow", "AuraFlowTransformer2DModel", "transformer", _auraflow, segments.auraflow_segments),
    Family(
        "qwen",
        "QwenImageTransformer2DModel",
        "transformer",
        _flux,
        segments.qwen_segments,
        positions="img_shapes",
        fill=1,
        refused={"QwenImageLayeredPipeline": "draws several pictures in one sequence, which have no grid in common"},
    ),
)


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline's model.

    Raises:
        ValueError: the pipeline has no model that methods attach to.
    """
    import diffusers

    name = type(pipe).__name__
    components = {family.component for family in FAMILIES}
    found = {part: getattr(pipe, part) for part in components if getattr(pipe, part, None) is not None}
    models = {part: getattr(model, "_orig_mod", model) for part, model in found.items()}
    for family in FAMILIES:
        model = models.get(family.component)
        # Older releases of diffusers lack some.
        if isinstance(model, getattr(diffusers, family.model, ())):
            for refused, why in family.refused.items():
                if isinstance(pipe, getattr(diffusers, refused, ())):
                    raise ValueError(f"{name} {why}; use another pipeline of {family.model}")
            if getattr(pipe, f"{family.component}_2", None) is not None:
                raise ValueError(
                    f"{name} draws its later steps with a model of their own, {family.component}_2, on which methods "
                    "would not act; use a pipeline without one (Wan 2.1, Wan 2.2 with 5B parameters)"
                )
            if not any(layer.cross for layer in family.layers(model).values()):
                raise ValueError(
                    f"the {family.component} of {name} has no cross-attention layer; use a text-to-image pipeline"
                )
            return family
    known = ", ".join(family.model for family in FAMILIES)
    if not models:
        raise ValueError(f"{name} has neither a UNet nor a transformer; methods attach to models of {known}")
    part, model = next(iter(models.items()))
    if part == UNET.component and not any(layer.cross for layer in unet_layers(model).values()):
        raise ValueError(f"the UNet of {name} has no cross-attention layer; use a text-to-image pipeline")
    if part == UNET.component:
        raise ValueError(
            f"the UNet of {name} is a {type(model).__name__}; methods attach to those of images "
            "(UNet2DConditionModel), where every row of the batch is a picture"
        )
    raise ValueError(
        f"the {part} of {name} is a {type(model).__name__}, which methods do not attach to; those that they know are "
        f"{known}, and docs/how-it-works.md says how one is added"
    )


def check_unet(pipe: Any, why: str) -> None:
    """Raise ValueError, which says why, unless the pipeline's model is a UNet."""
    family = family_of(pipe)
    if family is not UNET:
        raise ValueError(
            f"{type(pipe).__name__} has a {family.model}, but {why}; use a UNet pipeline (SD 1.x, 2.x, XL)"
        )
