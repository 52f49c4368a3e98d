"""Train the shapes model from nothing: `python -m attnctl_fast.shapes.train --out DIR`.

Two stages: the autoencoder on drawn images, then the UNet on their latents with the frozen text encoder of `text.py`.
Every step draws its random numbers from a generator seeded by the step, so a run that was stopped and continued with
`--resume` does exactly what an uninterrupted one does.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from tqdm import tqdm

from .card import export_pipeline, measure, write_card
from .data import Examples, make_examples, word_positions
from .localisation import localisation_loss, record_attention
from .model import build_scheduler, build_unet, build_vae, cross_attention_layers, load_pipeline
from .scene import MAX_OBJECTS
from .text import MAX_LENGTH, build_text_encoder, build_tokenizer

CARD_SEEDS = 100_000


@dataclass(frozen=True)
class Settings:
    """The settings that decide the weights; the defaults are those of the shipped model.

    `stop` ends the UNet's training early on the learning-rate schedule of `steps`; 0 means not to. A run that is
    already further gives its snapshot of that step.
    """

    seed: int = 0
    examples: int = 24_000
    vae_steps: int = 1_200
    vae_batch: int = 16
    vae_lr: float = 1e-3
    vae_l1: float = 0.3
    vae_kl: float = 3e-4
    steps: int = 2_600
    stop: int = 1_750
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 100
    ema: float = 0.997
    snr_gamma: float = 5.0
    caption_dropout: float = 0.1
    localisation: float = 0.05
    autocast: bool = True


class Run:
    """A training run: its settings, its folder, and where it computes.

    Args:
        settings: what decides the weights.
        out: the folder for checkpoints, snapshots, `log.jsonl` and, at the end, `weights/`.
        device: any torch device.
        resume: continue from the checkpoints in `out`.
        save_every: steps between two checkpoints.
        progress: whether to show progress bars.

    Raises:
        ValueError: when `out` already holds a run and `resume` is false, or a run with other settings.
    """

    def __init__(
        self,
        settings: Settings,
        out: Path,
        *,
        device: str = "cpu",
        resume: bool = False,
        save_every: int = 250,
        progress: bool = True,
    ) -> None:
        self.settings, self.out, self.device = settings, Path(out), torch.device(device)
        self.save_every, self.progress = save_every, progress
        self.out.mkdir(parents=True, exist_ok=True)
        record = self.out / "settings.json"
        # Stopping is not part of what a run is: a stopped run may be continued further.
        identity = {k: v for k, v in asdict(settings).items() if k != "stop"}
        if record.exists():
            before = json.loads(record.read_text(encoding="utf-8"))
            if not resume:
                raise ValueError(f"{self.out} already holds a run: pass --resume to continue it, or another --out")
            changed = {k: (before.get(k), v) for k, v in identity.items() if before.get(k) != v}
            if changed:
                raise ValueError(
                    f"{self.out} holds a run with other settings (before, now): {changed}; use another --out"
                )
        record.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")

    def train(self) -> tuple[Any, Any]:
        """Run both stages, or what is left of them; returns the autoencoder and the UNet's averaged weights."""
        examples = make_examples(self.settings.examples, progress=self.progress)
        vae = self.train_vae(examples)
        stop = self.settings.stop or self.settings.steps
        if self._trained("unet") > stop:
            return vae, self._snapshot(stop)
        return vae, self.train_unet(examples, self.encode(vae, examples))

    def export(self, vae: Any, unet: Any, *, measured: int = 256) -> Path:
        """Write `weights/`: the pipeline and its card, with figures over `measured` pictures per number of objects."""
        folder = self.out / "weights"
        text_encoder = build_text_encoder(self.settings.seed)
        export_pipeline(folder, vae, unet, text_encoder, build_tokenizer(self.out / "tokenizer"))
        card: dict[str, Any] = {
            "what": "A text-to-image model of coloured shapes on light grey, 64x64 pixels, trained on drawings",
            "rebuild": "python -m attnctl_fast.shapes.train",
            "settings": asdict(self.settings),
            "parameters": {
                name: sum(parameter.numel() for parameter in module.parameters())
                for name, module in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder))
            },
            "training": {stage: self._summary(stage) for stage in ("vae", "unet")},
        }
        if measured:
            # Seeds from 0 belong to the comparisons that people make with the model.
            seeds = range(CARD_SEEDS, CARD_SEEDS + measured)
            card["measured"] = measure(load_pipeline(device=str(self.device), weights=folder), seeds)
        write_card(folder, card)
        return folder

    def train_vae(self, examples: Examples) -> Any:
        """Train the autoencoder, its latents shifted and scaled to mean 0 and variance 1 in every channel."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        vae = build_vae().to(self.device).train()
        optimizer = torch.optim.AdamW(vae.parameters(), settings.vae_lr, weight_decay=1e-4)
        state = {"model": vae, "optimizer": optimizer}
        for step, log in self._steps("vae", settings.vae_steps, settings.vae_steps, state):
            generator = self._generator(0, step)
            images = self._images(examples, self._indices(generator, settings.vae_batch, examples))
            lr = _set_lr(optimizer, settings.vae_lr, step, settings.vae_steps, warmup=50)
            with self._autocast():
                posterior = vae.encode(images).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
                decoded = vae.decode(posterior.mean + posterior.std * noise).sample
            decoded = decoded.float()
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            error = decoded - images
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
            loss = (error**2).mean() + settings.vae_l1 * error.abs().mean() + settings.vae_kl * kl
            self._update(vae, optimizer, loss)
            log.update(loss=loss.item(), mse=(error**2).mean().item(), kl=kl.item(), lr=lr)
        vae.eval().requires_grad_(False)
        standardise_latents(vae, self._images(examples, torch.arange(min(2_000, len(examples.scenes)))))
        return vae

    @torch.no_grad()
    def encode(self, vae: Any, examples: Examples) -> torch.Tensor:
        """Return the latents of all examples, float32 `[n,4,16,16]`."""
        batches = torch.arange(len(examples.scenes)).split(64)
        batches = tqdm(batches, desc="encoding", disable=not self.progress)
        return torch.cat([vae.encode(self._images(examples, batch)).latent_dist.mean.cpu() for batch in batches])

    def train_unet(self, examples: Examples, latents: torch.Tensor) -> Any:
        """Train the UNet on noise prediction and localised attention; return its exponential moving average."""
        settings, layers = self.settings, cross_attention_layers()
        torch.manual_seed(settings.seed + 1)
        unet = build_unet().to(self.device).train()
        average = copy.deepcopy(unet).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(unet.parameters(), settings.lr, weight_decay=1e-2)
        tokens, words, word_masks = self._captions(examples)
        text_encoder = build_text_encoder(settings.seed).to(self.device)
        alphas = build_scheduler().alphas_cumprod
        state = {"model": unet, "average": average, "optimizer": optimizer}
        stop = settings.stop or settings.steps
        with record_attention(unet, layers) as recorders:
            for step, log in self._steps("unet", stop, settings.steps, state):
                generator = self._generator(1, step)
                rows = self._indices(generator, settings.batch, examples)
                lr = _set_lr(optimizer, settings.lr, step, settings.steps, warmup=settings.warmup)
                times = torch.randint(len(alphas), (len(rows),), generator=generator)
                noise = torch.randn(latents[rows].shape, generator=generator)
                dropped = torch.rand(len(rows), generator=generator) < settings.caption_dropout
                alpha = alphas[times]
                noisy = alpha.sqrt().view(-1, 1, 1, 1) * latents[rows] + (1 - alpha).sqrt().view(-1, 1, 1, 1) * noise
                ids = torch.where(dropped[:, None], tokens[-1], tokens[rows])
                with self._autocast():
                    context = text_encoder(ids.to(self.device)).last_hidden_state
                    predicted = unet(noisy.to(self.device), times.to(self.device), context).sample
                per_sample = ((predicted.float() - noise.to(self.device)) ** 2).mean(dim=(1, 2, 3))
                snr = (alpha / (1 - alpha)).to(self.device)
                diffusion = (per_sample * (snr.clamp(max=settings.snr_gamma) / snr)).mean()
                # Where an object will be is open at high noise: there the maps have nothing to be right about.
                weight = alpha.sqrt() * ~dropped
                places = torch.stack(
                    [
                        localisation_loss(
                            recorder.probabilities,
                            words[rows].to(self.device),
                            word_masks[rows].to(self.device).float(),
                            weight.to(self.device),
                        )
                        for recorder in recorders.values()
                        if recorder.probabilities is not None
                    ]
                ).mean()
                self._update(unet, optimizer, diffusion + settings.localisation * places)
                _average(average, unet, min(settings.ema, (1 + step) / (10 + step)))
                log.update(diffusion=diffusion.item(), localisation=places.item(), lr=lr)
        return average

    def _captions(self, examples: Examples) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the captions of all examples.

        Token ids `[n+1, 20]` (last: no caption), colour and noun positions `[n, 6]`, their masks `[n, 6, 256]`.
        """
        tokenizer = build_tokenizer(self.out / "tokenizer")
        prompts = [*(scene.prompt for scene in examples.scenes), ""]
        tokens = tokenizer(prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
        words = torch.full((len(examples.scenes), 2, MAX_OBJECTS), -1)
        for index, scene in enumerate(examples.scenes):
            words[index, :, : len(scene.objects)] = torch.tensor(word_positions(scene))
        return tokens.input_ids, words.flatten(1), examples.masks.repeat(1, 2, 1)

    def _steps(
        self, stage: str, stop: int, total: int, state: dict[str, Any]
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield `(step, log)` from the stage's checkpoint to `stop`, writing the log and the checkpoints in between."""
        path = self.out / f"{stage}.pt"
        start, seconds = 0, 0.0
        if path.exists():
            saved = torch.load(path, map_location=self.device, weights_only=True)
            start, seconds = saved["step"], saved["seconds"]
            for name, part in state.items():
                part.load_state_dict(saved[name])
        begin = time.perf_counter() - seconds
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as lines:
            bar = tqdm(range(start, stop), desc=stage, initial=start, total=stop, disable=not self.progress)
            for step in bar:
                log: dict[str, float] = {}
                yield step, log
                done, seconds = step + 1, time.perf_counter() - begin
                bar.set_postfix({name: f"{value:.4f}" for name, value in log.items() if name != "lr"}, refresh=False)
                _write(lines, {"stage": stage, "step": done, "of": total, **log, "seconds": round(seconds, 2)})
                if done % self.save_every == 0 or done == stop:
                    self._save(path, {"step": done, "seconds": seconds}, state)
                    if "average" in state:
                        snapshot = self.out / "snapshots" / f"step-{done:05d}"
                        state["average"].save_pretrained(snapshot)

    def _trained(self, stage: str) -> int:
        path = self.out / f"{stage}.pt"
        return torch.load(path, map_location="cpu", weights_only=True)["step"] if path.exists() else 0

    def _snapshot(self, step: int) -> Any:
        from safetensors.torch import load_file

        folder = self.out / "snapshots" / f"step-{step:05d}"
        if not folder.is_dir():
            have = sorted(int(path.name[5:]) for path in folder.parent.glob("step-*"))
            raise ValueError(
                f"the run in {self.out} is past step {step} and kept no snapshot of it: choose from {have}"
            )
        unet = build_unet()
        unet.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
        return unet.eval().requires_grad_(False).to(self.device)

    def _summary(self, stage: str) -> dict[str, float]:
        """Return steps, seconds and the last hundred steps' mean losses; of a repeated step the last pass counts."""
        stop = self.settings.vae_steps if stage == "vae" else self.settings.stop or self.settings.steps
        entries: dict[int, dict[str, Any]] = {}
        for line in (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["stage"] == stage and entry["step"] <= stop:
                entries[entry["step"]] = entry
        last = [entries[step] for step in sorted(entries)[-100:]]
        losses = [name for name in last[-1] if name not in ("stage", "step", "of", "lr", "seconds")]
        means = {name: sum(entry[name] for entry in last) / len(last) for name in losses}
        return {"steps": last[-1]["step"], "seconds": last[-1]["seconds"], **means}

    def _save(self, path: Path, header: dict[str, Any], state: dict[str, Any]) -> None:
        partial = path.with_suffix(".partial")
        torch.save({**header, **{name: part.state_dict() for name, part in state.items()}}, partial)
        partial.replace(path)

    def _generator(self, stage: int, step: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.settings.seed * 2 + stage) * 10_000_019 + step)

    def _indices(self, generator: torch.Generator, batch: int, examples: Examples) -> torch.Tensor:
        return torch.randint(len(examples.scenes), (batch,), generator=generator)

    def _images(self, examples: Examples, rows: torch.Tensor) -> torch.Tensor:
        return examples.images[rows].to(self.device).float() / 127.5 - 1

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.autocast)

    def _update(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def standardise_latents(vae: Any, images: torch.Tensor) -> None:
    """Give the latents of `images` mean 0 and variance 1 in every channel, by changing the 1x1 convolutions in place.

    A Stable Diffusion pipeline knows one scaling factor for all channels and no shift; what is decoded is unchanged.
    """
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(64)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std.view(1, -1, 1, 1)


def _set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, total: int, *, warmup: int) -> float:
    """Set the rate to a linear warm-up, then half a cosine to a hundredth of the peak; return it."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))
    lr = peak * min((step + 1) / warmup, 0.01 + 0.99 * cosine)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def _write(lines: TextIO, entry: dict[str, Any]) -> None:
    lines.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in entry.items()}) + "\n")
    lines.flush()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m attnctl_fast.shapes.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/shapes"), help="folder of the run (default: out/shapes)")
    parser.add_argument("--device", default="cpu", help="any torch device (default: cpu)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints (default: 250)")
    parser.add_argument(
        "--measured", type=int, default=256, help="pictures behind each figure of the card (default: 256)"
    )
    defaults = Settings()
    for name, value in asdict(defaults).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(flag, type=type(value), default=value, help=f"(default: {value})")
    options = vars(parser.parse_args(arguments))
    settings = replace(defaults, **{name: options[name] for name in asdict(defaults)})
    run = Run(
        settings,
        options["out"],
        device=options["device"],
        resume=options["resume"],
        save_every=options["save_every"],
    )
    folder = run.export(*run.train(), measured=options["measured"])
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
