"""The tables of docs/models.md, made by drawing with every method on every kind of pipeline.

    python -m tests.docs.models [--update]     print the tables, or write them into the page

The models are tiny, with random weights. A cell says "yes" where the method changed the picture and left the pipeline
as it was, and otherwise the number of the message with which it refused.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import attnctl_fast as ac
from tests.support import tiny, tiny_transformers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
PROMPT = "a red bag and a black apple"
OTHER = "the black bag of a red apple"
IDS = {"red": 2, "bag": 3, "black": 6, "apple": 7}
LAYERS = ["down_blocks.1", "up_blocks.1"]
Options = dict[str, Any]
Draw = Callable[[], torch.Tensor]


def masks(height: int = 64, width: int = 64) -> dict[str, torch.Tensor]:
    left = torch.zeros(height, width)
    left[height // 4 : -height // 4, : width // 2] = 1
    return {"bag": left, "apple": left.flip(1)}


GUIDED: Options = {"layers": LAYERS, "scale": 40.0}


def guided(word: Mapping[str, Any]) -> Options:
    own: Options = word.get("guided", GUIDED)
    return own


METHODS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "AttentionRegulation": lambda word: ac.AttentionRegulation([word["bag"], word["apple"]]),
    "EnergyContext": lambda word: ac.EnergyContext(0.05, 0.05),
    "Composition": lambda word: ac.Composition([ac.Edit("the two dog", 1.5)]),
    "AttendAndExcite": lambda word: ac.AttendAndExcite([word["bag"], word["apple"]], thresholds={}, **guided(word)),
    "TSAM": lambda word: ac.TSAM(refinement={}, **guided(word)),
    "SynGen": lambda word: ac.SynGen(
        [(word["red"], word["bag"]), (word["black"], word["apple"])],
        unrelated=None if word["bag"] == "bag" else [1, 4, 5],
        **guided(word),
    ),
    "CONFORM": lambda word: ac.CONFORM(
        [(word["red"], word["bag"]), (word["black"], word["apple"])], refinement={}, **guided(word)
    ),
    "FOCUS": lambda word: ac.FOCUS(
        [(word["red"], word["bag"]), (word["black"], word["apple"])], strength=5.0, layers=guided(word).get("layers")
    ),
    "DenseDiffusion": lambda word: ac.DenseDiffusion(
        {word[name]: mask for name, mask in word.get("masks", masks()).items()}
    ),
    "ComposableDiffusion": lambda word: ac.ComposableDiffusion(["a red bag", "a black apple"]),
    "Regions": lambda word: ac.Regions({f"a {name}": mask for name, mask in word.get("masks", masks()).items()}),
    "NAG": lambda word: ac.NAG("the two dog"),
    "TACA": lambda word: ac.TACA(1.5),
    "PLADIS": lambda word: ac.PLADIS(),
    "capture": lambda word: None,
}
WORDS = {name: name for name in IDS}


def picture() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def mask_image() -> torch.Tensor:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:56] = 1
    return mask


def image() -> Options:
    return {"image": picture(), "strength": 1.0}


def inpainting() -> Options:
    return {**image(), "mask_image": mask_image(), "height": 64, "width": 64}


XL = {"kind": "sdxl"}
PAG = {"pag_applied_layers": ["down_blocks.1"]}
# What a row is called, the pipeline's class, how it is built, and how it is called.
PIPELINES: list[tuple[str, str, Options, Callable[[], Options]]] = [
    ("SD 1.x", "StableDiffusionPipeline", {}, dict),
    ("SD 2.x", "StableDiffusionPipeline", {"kind": "sd2"}, dict),
    ("SDXL", "StableDiffusionXLPipeline", XL, dict),
    ("SD image to image", "StableDiffusionImg2ImgPipeline", {}, image),
    ("SDXL image to image", "StableDiffusionXLImg2ImgPipeline", XL, image),
    ("SD inpainting", "StableDiffusionInpaintPipeline", {}, inpainting),
    ("SD inpainting, 9 channels", "StableDiffusionInpaintPipeline", {"in_channels": 9}, inpainting),
    ("SDXL inpainting", "StableDiffusionXLInpaintPipeline", XL, inpainting),
    ("SD with ControlNet", "StableDiffusionControlNetPipeline", {}, lambda: {"image": picture()}),
    ("Perturbed attention guidance", "StableDiffusionPAGPipeline", PAG, lambda: {"pag_scale": 2.0}),
    (
        "InstructPix2Pix XL",
        "StableDiffusionXLInstructPix2PixPipeline",
        {**XL, "in_channels": 8},
        lambda: {"image": picture(), "height": 64, "width": 64},
    ),
    (
        "Panorama",
        "StableDiffusionPanoramaPipeline",
        {},
        lambda: {"height": 64, "width": 96, "latents": tiny.latents(size=(32, 48))},
    ),
]


# What a row is called, the pipeline's class, and its kind in `tests.support.tiny_transformers`.
TRANSFORMERS: list[tuple[str, str, str]] = [
    ("PixArt-alpha", "PixArtAlphaPipeline", "pixart_alpha"),
    ("PixArt-Sigma", "PixArtSigmaPipeline", "pixart_sigma"),
    ("Sana", "SanaPipeline", "sana"),
    ("HunyuanDiT", "HunyuanDiTPipeline", "hunyuan"),
    ("SD 3, SD 3.5", "StableDiffusion3Pipeline", "sd3"),
    ("SD 3 image to image", "StableDiffusion3Img2ImgPipeline", "sd3"),
    ("SD 3 inpainting", "StableDiffusion3InpaintPipeline", "sd3"),
    ("SD 3 with ControlNet", "StableDiffusion3ControlNetPipeline", "sd3"),
    ("SD 3 with perturbed attention guidance", "StableDiffusion3PAGPipeline", "sd3"),
    ("FLUX.1", "FluxPipeline", "flux"),
    ("FLUX.1 image to image", "FluxImg2ImgPipeline", "flux"),
    ("FLUX.1 inpainting", "FluxInpaintPipeline", "flux"),
    ("FLUX.1 Fill", "FluxFillPipeline", "flux"),
    ("FLUX.1 with ControlNet", "FluxControlNetPipeline", "flux"),
    ("Chroma", "ChromaPipeline", "chroma"),
    ("Chroma image to image", "ChromaImg2ImgPipeline", "chroma"),
    ("Qwen-Image", "QwenImagePipeline", "qwen"),
    ("Qwen-Image image to image", "QwenImageImg2ImgPipeline", "qwen"),
    ("Qwen-Image inpainting", "QwenImageInpaintPipeline", "qwen"),
    ("Qwen-Image with ControlNet", "QwenImageControlNetPipeline", "qwen"),
    ("FLUX.2", "Flux2Pipeline", "flux2"),
    ("FLUX.2 Klein", "Flux2KleinPipeline", "flux2_klein"),
    ("Lumina 2", "Lumina2Pipeline", "lumina2"),
    ("AuraFlow", "AuraFlowPipeline", "auraflow"),
    ("CogView 4", "CogView4Pipeline", "cogview4"),
    ("Z-Image", "ZImagePipeline", "zimage"),
    ("Z-Image image to image", "ZImageImg2ImgPipeline", "zimage"),
    ("Z-Image inpainting", "ZImageInpaintPipeline", "zimage"),
    ("Wan, text to video", "WanPipeline", "wan"),
    ("LTX-Video, text to video", "LTXPipeline", "ltx"),
]
# A row for all models that nobody knows: nothing is built, the class of its transformer is enough to be refused.
UNKNOWN = ("HiDream, as all others", "HiDreamImagePipeline", "HiDreamImageTransformer2DModel")


def with_lora(pipe: Any) -> None:
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False))


def with_ip_adapter(pipe: Any) -> None:
    pipe.unet._load_ip_adapter_weights([tiny.ip_adapter(pipe)])


def with_float8(pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


def heun(pipe: Any) -> None:
    pipe.scheduler = tiny.scheduler("HeunDiscreteScheduler")


def embeddings(pipe: Any) -> Options:
    positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    return {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}


def adapter_images(pipe: Any) -> Options:
    return {"ip_adapter_image_embeds": [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(3))]}


def nothing(pipe: Any) -> None:
    return None


# What a row is called, what is done to the pipeline (of SD 1.x) before, how it is called, and the words.
FEATURES: list[tuple[str, Callable[[Any], None], Callable[[Any], Options], Mapping[str, Any]]] = [
    ("Several prompts", nothing, lambda pipe: {"prompt": [PROMPT, OTHER], "latents": tiny.latents(2)}, WORDS),
    ("Several images per prompt", nothing, lambda p: {"num_images_per_prompt": 2, "latents": tiny.latents(2)}, WORDS),
    ("Negative prompt", nothing, lambda pipe: {"negative_prompt": "two dog"}, WORDS),
    ("`guidance_scale=1`", nothing, lambda pipe: {"guidance_scale": 1.0}, WORDS),
    ("Prompt embeddings, with token ids", nothing, embeddings, IDS),
    (
        "Another shape than square",
        nothing,
        lambda pipe: {"height": 48, "width": 80, "latents": tiny.latents(1, (24, 40))},
        WORDS | {"masks": masks(48, 80)},
    ),
    ("Heun, two evaluations a step", heun, lambda pipe: {"num_inference_steps": 2}, WORDS),
    ("LoRA", with_lora, lambda pipe: {}, WORDS),
    ("IP-Adapter", with_ip_adapter, adapter_images, WORDS),
    ("bfloat16", lambda pipe: pipe.to(torch.bfloat16), lambda pipe: {}, WORDS),
    ("Weights stored as float8", with_float8, lambda pipe: {}, WORDS),
    ("Sliced attention", lambda pipe: pipe.enable_attention_slicing(), lambda pipe: {}, WORDS),
]


def drawn(pipe: Any, options: Options) -> torch.Tensor:
    given = {"prompt": PROMPT, "num_inference_steps": 1, "output_type": "latent"} | options
    if "image" not in given or "ControlNet" in type(pipe).__name__:
        given.setdefault("latents", tiny.latents())
        given["latents"] = given["latents"].to(pipe.unet.dtype)
    else:
        given["generator"] = torch.Generator().manual_seed(1)
    result: torch.Tensor = pipe(**given).images
    return result


def tried(pipe: Any, draw: Draw, name: str, words: Mapping[str, Any], plain: torch.Tensor) -> str:
    """Return "yes", or the message of the error with which the method refused.

    Raises:
        AssertionError: the method neither worked nor refused.
    """
    try:
        if name == "capture":
            with ac.capture(pipe, layers=guided(words)["layers"]) as maps:
                found = draw()
            assert len(maps)
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
        else:
            with ac.control(pipe, METHODS[name](words)):
                found = draw()
            assert found.isfinite().all() and not torch.equal(found, plain), f"{name} changes nothing"
    except ValueError as error:
        return str(error)
    return "yes"


def drawn_by_transformer(kind: str, pipe: Any) -> torch.Tensor:
    # PixArt-alpha takes a single step for a distilled model.
    return tiny_transformers.call(kind, pipe, prompt=PROMPT, num_inference_steps=1 + (kind == "pixart_alpha"))


Rows = list[tuple[str, list[str]]]


def pipeline_rows() -> Rows:
    rows: Rows = []
    for title, cls, build, options in PIPELINES:
        pipe = tiny.pipeline(cls, **build)
        if title == "Panorama":
            pipe.get_views = lambda *args, **kwargs: [(0, 32, 0, 32), (0, 32, 16, 48)]
        rows.append((f"{title}: `{cls}`", _row(pipe, partial(drawn, pipe, options()), WORDS)))
    return rows


def transformer_rows() -> Rows:
    import diffusers

    rows: Rows = []
    words = WORDS | {"guided": {"layers": None, "scale": 40.0}, "masks": masks(32, 32)}
    for title, cls, kind in TRANSFORMERS:
        pipe = tiny_transformers.pipeline(kind, cls)
        cells = _row(pipe, partial(drawn_by_transformer, kind, pipe), words)
        model = type(pipe.transformer).__name__
        cells = [cell.replace(cls, "PIPELINE").replace(f"{model}, but", "MODEL, but") for cell in cells]
        cells = [re.sub(r"where \w+ would act", "where METHOD would act", cell) for cell in cells]
        cells = [re.sub(r"^\w+ is not a CLIP", "ENCODER is not a CLIP", cell) for cell in cells]
        rows.append((f"{title}: `{cls}`", cells))
    title, cls, model = UNKNOWN
    pipeline = getattr(diffusers, cls)
    pipe, transformer = (one.__new__(one) for one in (pipeline, getattr(diffusers, model)))
    vars(pipe)["transformer"] = transformer
    refused = tried(pipe, partial(torch.zeros, 0), "AttentionRegulation", words, torch.zeros(0))
    rows.append((f"{title}: `{cls}`", [refused] * len(METHODS)))
    return rows


def feature_rows() -> Rows:
    rows = []
    for title, change, options, words in FEATURES:
        pipe = tiny.pipeline()
        change(pipe)
        rows.append((title, _row(pipe, partial(drawn, pipe, options(pipe)), words)))
    return rows


def _row(pipe: Any, draw: Draw, words: Mapping[str, Any]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = draw()
        cells = [tried(pipe, draw, name, words, plain) for name in METHODS]
        assert torch.equal(draw(), plain), "the pipeline is not as it was"
    return cells


def table(rows: Rows, first: str) -> str:
    """Lay out the rows, with the messages below."""
    rows = [(title, [re.sub(r"^\w+_blocks[\w.]+", "LAYER", cell) for cell in cells]) for title, cells in rows]
    messages = list(dict.fromkeys(cell for _, cells in rows for cell in cells if cell != "yes"))
    lines = [f"| {first} | " + " | ".join(f"`{name}`" for name in METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for title, cells in rows:
        shown = ("yes" if cell == "yes" else f"no ({messages.index(cell) + 1})" for cell in cells)
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    if messages:
        lines += ["", *(f"{index + 1}. `{message}`" for index, message in enumerate(messages))]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "pipelines": lambda: table(pipeline_rows(), "pipeline"),
    "transformers": lambda: table(transformer_rows(), "pipeline"),
    "features": lambda: table(feature_rows(), "with"),
}


def filled(page: str, name: str, content: str) -> str:
    """Return the page with one of its tables replaced."""
    found, count = re.subn(
        rf"(<!-- made:{name} -->\n).*?(\n<!-- /made -->)", lambda at: f"{at[1]}\n{content}\n{at[2]}", page, flags=re.S
    )
    assert count == 1, f"{PAGE.name} has no table {name}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the tables into docs/models.md")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        content = make()
        page = filled(page, name, content)
        if not arguments.update:
            print(content, end="\n\n")
    if arguments.update:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
