"""Edit a given picture: DDIM inversion, then sampling with edit prompts composed into the cross-attention.

    python examples/edit_image.py --add "a blue circle" --remove "a red circle" --start 0.1
    python examples/edit_image.py --model MODEL --image cat.png --caption "a photo of a cat" --add dog --remove cat

Without --model it draws a red circle and edits that, on the small model that ships with attnctl-fast, whose colours are
decided earlier than those of Stable Diffusion. The recipe is
that of arXiv 2306.09869 (real-image editing): the caption is prompt and negative prompt, so that without edits the
picture comes back, and whatever the edits change is guided.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import attnctl_fast as ac


@torch.no_grad()
def invert(pipe: Any, images: Sequence[Image.Image], captions: list[str], steps: int) -> torch.Tensor:
    """The noise from which DDIM draws the pictures again, given their captions."""
    from diffusers import DDIMInverseScheduler

    pixels = pipe.image_processor.preprocess(list(images)).to(pipe.device, pipe.vae.dtype)
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    scheduler = pipe.scheduler
    pipe.scheduler = DDIMInverseScheduler.from_config(scheduler.config)
    try:
        return pipe(
            captions,
            latents=latents.to(pipe.unet.dtype),
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="latent",
        ).images
    finally:
        pipe.scheduler = scheduler


def edit(
    pipe: Any,
    images: Sequence[Image.Image],
    captions: list[str],
    edits: Sequence[ac.Edit],
    *,
    steps: int = 50,
    guidance_scale: float = 7.5,
) -> list[Image.Image]:
    """The pictures after the edits; the pipeline needs a DDIM scheduler."""
    noise = invert(pipe, images, captions, steps)
    with ac.control(pipe, ac.Composition(edits)):
        return pipe(
            captions,
            negative_prompt=captions,
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        ).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or an id on the Hugging Face hub")
    parser.add_argument("--image", type=Path, help="the picture; needed with --model")
    parser.add_argument("--caption", default="a red circle", help="what the picture shows")
    parser.add_argument("--add", nargs="*", default=[], metavar="TEXT")
    parser.add_argument("--remove", nargs="*", default=[], metavar="TEXT")
    parser.add_argument("--weight", type=float, default=0.7, help="of every edit")
    parser.add_argument("--start", type=float, default=0.5, help="share of the steps before the edits")
    parser.add_argument("--gamma", type=float, default=5e-4, help="step of the edits' own context update")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--out", type=Path, default=Path("edited.png"))
    arguments = parser.parse_args()
    if bool(arguments.model) != bool(arguments.image):
        parser.error("--model and --image belong together")
    if not arguments.add and not arguments.remove:
        parser.error("name something to --add or to --remove")

    if arguments.model:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if device == "cuda" else torch.float32
        pipe = StableDiffusionPipeline.from_pretrained(arguments.model, dtype=dtype).to(device)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        image = Image.open(arguments.image).convert("RGB")
    else:
        pipe = ac.shapes.load_pipeline()
        image = ac.shapes.render(ac.shapes.Scene((("red", "circle"),)), seed=0).image
    how = {"gamma_attn": arguments.gamma, "gamma_norm": arguments.gamma, "start": arguments.start}
    edits = [ac.Edit(text, arguments.weight, **how) for text in arguments.add]
    edits += [ac.Edit(text, arguments.weight, direction=-1, **how) for text in arguments.remove]
    result = edit(
        pipe, [image], [arguments.caption], edits, steps=arguments.steps, guidance_scale=arguments.guidance_scale
    )[0]
    result.save(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
