"""The forms that diffusers has in a pipeline of its own: Attend-and-Excite."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from bench.pictures import ours
from bench.pictures.attention_layers import layers_of
from bench.pictures.guidance_loop import read_layers, tokens_of
from bench.pictures.sampling import Drawn, Form, Setting, call


def objection(setting: Setting) -> str | None:
    """Why `FORMS` cannot draw this, None where they can: with one text encoder, and where the cross-attention layers
    that are read are all of their size, by which diffusers chooses them."""
    pipe = setting.pipe
    if getattr(pipe, "text_encoder_2", None) is not None:
        return f"{type(pipe).__name__} has two text encoders, for which diffusers has no such pipeline"
    read = read_layers(setting, ours.method("AttendAndExcite", setting))
    grid = read[0].grid(setting.grid)
    alike = {layer.name for layer in layers_of(pipe, cross=True).values() if layer.grid(setting.grid) == grid}
    if alike != {layer.name for layer in read}:
        return f"layers is {setting.layers!r}, but diffusers reads all cross-attention layers of {grid[0]}x{grid[1]}"
    return None


def _pipeline(pipe: Any) -> Any:
    """diffusers' pipeline on the parts of this one, without the news that it is deprecated."""
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    spared = dict.fromkeys(("safety_checker", "feature_extractor"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import StableDiffusionAttendAndExcitePipeline

        made = StableDiffusionAttendAndExcitePipeline(**parts, **spared, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    # Its own is a copy; this one may answer from memory.
    made.encode_prompt = pipe.encode_prompt
    return made


def _attend_and_excite(setting: Setting) -> Drawn:
    """StableDiffusionAttendAndExcitePipeline of the pipeline's own parts, without refinement.

    Raises:
        ValueError: there is an `objection`.
    """
    if why := objection(setting):
        raise ValueError(f"{why}; leave out its form")
    method: Any = ours.method("AttendAndExcite", setting)
    pipe = _pipeline(setting.pipe)
    before = pipe.unet.attn_processors
    try:
        return Drawn(
            call(
                replace(setting, pipe=pipe),
                token_indices=[tokens_of(setting, method.targets)] * setting.batch,
                max_iter_to_alter=setting.edited,
                scale_factor=method.scale,
                thresholds={},
                attn_res=read_layers(setting, method)[0].grid(setting.grid),
            )
        )
    finally:
        pipe.unet.set_attn_processor(before)


FORMS: dict[str, Form] = {"AttendAndExcite": _attend_and_excite}
