"""Tiny pipelines as tests call them: prompts, kinds, calls with methods and without, and what must be as before."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnctl_fast as ac
from tests.support import tiny
from tests.support.marks import full

PROMPT = "a bag and an apple"
OTHER = "the red ball of two dog, and a black cat"
TARGETS = ["bag", "apple"]
LAYERS = ["down_blocks.1.attentions.0.transformer_blocks.0.attn2"] + [
    f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn2" for i in range(2)
]


def call(pipe: Any, **options: Any) -> torch.Tensor:
    """The final latents."""
    count = options.pop("count", 1)
    size = options.pop("size", (tiny.SIDE, tiny.SIDE))
    options = {"prompt": PROMPT, "num_inference_steps": 4, "output_type": "latent"} | options
    if "image" not in options or "ControlNet" in type(pipe).__name__:
        options["latents"] = options.get("latents", tiny.latents(count, size)).to(pipe.unet.dtype)
    else:
        options.setdefault("generator", torch.Generator().manual_seed(1))
    return pipe(**options).images


def controlled(pipe: Any, targets: Any = TARGETS, **options: Any) -> torch.Tensor:
    method = {name: options.pop(name) for name in ("strength", "layers", "edit_steps") if name in options}
    with ac.control(pipe, ac.AttentionRegulation(targets, **method)):
        return call(pipe, **options)


def guided(pipe: Any, *methods: Any, **options: Any) -> Tensor:
    with ac.control(pipe, *methods):
        return call(pipe, **options)


def picture(channels: int = 3, seed: int = 0, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(seed))


def a_mask() -> torch.Tensor:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:56] = 1
    return mask


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd1": ({}, {}),
    "sd2": ({"kind": "sd2"}, {}),
    "sdxl": ({"cls": "StableDiffusionXLPipeline", "kind": "sdxl"}, {}),
    "img2img": ({"cls": "StableDiffusionImg2ImgPipeline"}, {"image": picture(), "strength_": 0.75}),
    "sdxl img2img": (
        {"cls": "StableDiffusionXLImg2ImgPipeline", "kind": "sdxl"},
        {"image": picture(), "strength_": 0.75},
    ),
    "inpaint, 4 channels": (
        {"cls": "StableDiffusionInpaintPipeline"},
        {"image": picture(), "mask_image": a_mask(), "height": 64, "width": 64, "strength_": 1.0},
    ),
    "inpaint, 9 channels": (
        {"cls": "StableDiffusionInpaintPipeline", "in_channels": 9},
        {"image": picture(), "mask_image": a_mask(), "height": 64, "width": 64, "strength_": 0.75},
    ),
    "sdxl inpaint": (
        {"cls": "StableDiffusionXLInpaintPipeline", "kind": "sdxl"},
        {"image": picture(), "mask_image": a_mask(), "height": 64, "width": 64, "strength_": 0.75},
    ),
    "controlnet": ({"cls": "StableDiffusionControlNetPipeline"}, {"image": picture()}),
    "controlnet, guess mode": (
        {"cls": "StableDiffusionControlNetPipeline"},
        {"image": picture(), "guess_mode": True, "guidance_scale": 3.0},
    ),
}


def peaks(maps: Tensor) -> Tensor:
    """One minus the highest attention to the least attended of the tokens 1 to 5."""
    return (1 - maps[:, 1:6].amax(2)).amax(1)


class Peaks(ac.LatentGuidance):
    layers = ac.by_downsampling(2)
    scale = 30.0

    def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
        return peaks(maps)


# The kinds that differ most: more methods than one need no other by default.
FEW_KINDS = [
    kind if kind in ("sd2", "sdxl img2img", "inpaint, 9 channels", "controlnet, guess mode") else full(kind)
    for kind in KINDS
]


class Built(NamedTuple):
    """A pipeline, how it is called, and the latents that it then draws by itself."""

    pipe: Any
    options: dict[str, Any]
    plain: Tensor


@cache
def built(kind: str) -> Built:
    """One for all tests of a process: what a test does not put back, the next one sees."""
    parts, options = KINDS[kind]
    pipe = tiny.pipeline(**parts)
    options = {("strength" if name == "strength_" else name): value for name, value in options.items()}
    return Built(pipe, options, call(pipe, **options))


def snapshot(pipe: Any) -> dict[str, Any]:
    """All of a pipeline that control touches or might: processors by identity, hooks, instance attributes, weights."""
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    modules = dict(model.named_modules())
    processors = {name: module.processor for name, module in modules.items() if hasattr(module, "processor")}
    return {
        "processors": {name: id(processor) for name, processor in processors.items()},
        "backends": {name: vars(p).get("_attention_backend", "none") for name, p in processors.items()},
        "children": {name: list(module._modules) for name, module in modules.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "hooks": {
            (name, kind): list(hooks)
            for name, module in modules.items()
            for kind, hooks in module.__dict__.items()
            if kind.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
        },
        "forwards": {name: module.__dict__.get("forward") for name, module in modules.items()},
        "pipeline": {name: id(value) for name, value in pipe.__dict__.items() if callable(value)},
        "names": sorted(name for name in pipe.__dict__ if not name.startswith("_")),
        "scheduler": sorted(name for name, value in pipe.scheduler.__dict__.items() if callable(value)),
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "weights": list(model.state_dict()),
        "class": (type(pipe), type(pipe).__call__),
        "attention": torch.nn.functional.scaled_dot_product_attention,
    }


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def callback(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        if index == step:
            raise Stop
        return tensors

    return callback


def with_ip_adapter(pipe: Any, **options: Any) -> Any:
    pipe.load_ip_adapter(tiny.ip_adapter(pipe), subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)
    return pipe


def image_embeddings(batch: int = 1) -> dict[str, Any]:
    """Negative and positive embeddings of one image, as the pipeline takes them with guidance on."""
    generator = torch.Generator().manual_seed(4)
    return {"ip_adapter_image_embeds": [torch.randn(2, 1, 8, generator=generator)]}
