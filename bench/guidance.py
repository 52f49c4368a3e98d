"""One guidance iteration of Attend-and-Excite on Stable Diffusion's architecture with random weights, on a CPU, against
diffusers' own pipeline; whole images are `overhead.py`'s.

    python bench/guidance.py             SD 1.5, 512x512
    python bench/tables.py              put the last figures into docs/measurements.md

diffusers' form is its StableDiffusionAttendAndExcitePipeline, unchanged: the whole UNet, attention with its maps in
every layer, weights that require gradients. The forms alternate. Each run appends one line to
bench/results/cpu_guidance.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from architectures import unet as build_unet
from checkout import RESULTS, append, git_state
from tables import guidance_table
from torch import Tensor

import attnctl_fast as ac
from attnctl_fast.attach.call import Call, Site
from attnctl_fast.attach.evaluation import Evaluation
from attnctl_fast.attach.families import UNET
from attnctl_fast.attach.layers import cross_attention_layers
from attnctl_fast.attach.rows import Rows
from attnctl_fast.cli.report import spread, versions

TOKENS = [2, 5]
WHOLE = {"truncate": False, "freeze": False}


def pipelines(name: str) -> tuple[Any, Any]:
    """diffusers' Attend-and-Excite pipeline and the plain one, on one UNet, without text encoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import StableDiffusionAttendAndExcitePipeline
    torch.manual_seed(0)
    parts = {
        "vae": AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4),
        "unet": build_unet(name),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        **dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor")),
        "requires_safety_checker": False,
    }
    both = StableDiffusionAttendAndExcitePipeline(**parts), StableDiffusionPipeline(**parts)
    for pipe in both:
        pipe.set_progress_bar_config(disable=True)
    return both


def their_iteration(pipe: Any, latents: Tensor, text: Tensor, timestep: Tensor) -> Callable[[], Tensor]:
    """What diffusers' pipeline does for one sample in one step, by its own methods in its order."""
    module = sys.modules[type(pipe).__module__]
    cells = latents.shape[-1] // 4
    unet = pipe.unet

    def run() -> Tensor:
        before = dict(unet.attn_processors)
        pipe.attention_store = module.AttentionStore((cells, cells))
        pipe.register_attention_control()
        try:
            with torch.enable_grad():
                moved = latents.clone().detach().requires_grad_(True)
                unet(moved, timestep, encoder_hidden_states=text)
                unet.zero_grad()
                highest = pipe._aggregate_and_get_max_attention_per_token(indices=TOKENS)
                return pipe._update_latent(moved, pipe._compute_loss(highest), 20.0)
        finally:
            unet.set_attn_processor(before)

    return run


def our_iteration(
    pipe: Any, latents: Tensor, text: Tensor, timestep: Tensor, **options: Any
) -> Callable[[], Tensor | None]:
    unet, side = pipe.unet, latents.shape[-1]
    layers = cross_attention_layers(unet)
    method = ac.AttendAndExcite(TOKENS, thresholds={}, **options)
    prompts = SimpleNamespace(count=1, length=text.shape[1], positions=lambda targets: [list(targets)])
    call: Any = Call(pipe, prompts, 1, None, step=0, steps=50, latents=(side, side))  # type: ignore[arg-type]
    sites = [Site(layers[name]) for name in method.default_layers(layers)]
    for site in sites:
        site.grid = site.layer.grid(call.latents)
    guidance = method.start(call, sites)
    tap: Any = SimpleNamespace(latents=latents, moved=None, factor=lambda *_: None)
    given = {"sample": latents, "timestep": timestep, "encoder_hidden_states": text}

    def run() -> Tensor:
        evaluation = Evaluation(call, UNET, unet, Rows(1, [0], [0]), tap, (), given)
        guidance.before_denoiser(evaluation)
        return evaluation.latents

    return run


def timed(forms: dict[str, Callable[[], Any]], turns: int, progress: str) -> dict[str, list[float]]:
    """Seconds of every form, turn by turn; one call of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(turns + 1):
        for name, run in list(forms.items())[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            print(f"{progress}, turn {turn}, {name}: {taken:.2f} s", flush=True)
            if turn:
                seconds[name].append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("sd15", "sd2"), default="sd15")
    parser.add_argument("--side", type=int, default=64, help="of the latents; 64 is 512 pixels")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    theirs, ours = pipelines(arguments.arch)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, arguments.side, arguments.side, generator=generator)
    text = torch.randn(1, 77, ours.unet.config.cross_attention_dim, generator=generator)
    timestep = torch.tensor(981)

    forms: dict[str, Callable[[], Any]] = {
        "diffusers": their_iteration(theirs, latents, text, timestep),
        "ours": our_iteration(ours, latents, text, timestep),
        "ours, whole UNet, trainable weights": our_iteration(ours, latents, text, timestep, **WHOLE),
    }
    torch.testing.assert_close(forms["ours"](), forms["diffusers"](), rtol=0, atol=1e-3)
    measured = timed(forms, arguments.turns, "iteration")
    run = {
        "date": time.strftime("%Y-%m-%d"),
        "git": git_state(),
        "versions": versions(),
        "settings": {"arch": arguments.arch, "side": arguments.side},
        "iteration": {
            form: spread(seconds) | {"ratio": spread(_ratios(seconds, measured["ours"]))}
            for form, seconds in measured.items()
        },
    }
    append(RESULTS / "cpu_guidance.jsonl", run)
    print(guidance_table(run))


def _ratios(seconds: list[float], ours: list[float]) -> list[float]:
    """Of the times of each turn."""
    return [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]


if __name__ == "__main__":
    main()
