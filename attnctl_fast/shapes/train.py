"""Train a shapes model: `python -m attnctl_fast.shapes.train unet --out DIR`.

Two stages: the autoencoder on drawn images (or another model's is taken), then the denoiser on their latents with the
frozen text encoders of `text.py`. Every step draws its random numbers from a generator seeded by the step, so a run
that was stopped and continued with `--resume` does exactly what an uninterrupted one does.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from tqdm import tqdm

from .autoencoder import build_vae, standardise_latents
from .card import export_pipeline, measure, write_card
from .data import Examples, make_examples
from .denoiser import denoiser_named
from .load import WEIGHTS, load_pipeline, load_vae
from .localisation import pixel_loss, token_loss
from .scene import MAX_OBJECTS

CARD_SEEDS = 100_000


@dataclass(frozen=True)
class Settings:
    """The settings that decide the weights; those of `DEFAULTS` are the shipped models'.

    `own_vae` trains an autoencoder instead of taking the one that ships with the UNet. `token_loss` and `pixel_loss`
    are the weights of these losses (`localisation.py`). `muon` is the learning rate of the matrices in a transformer's
    blocks, which the optimiser Muon trains then beside AdamW; 0 leaves all to AdamW. `stop` ends the denoiser's
    training early on the learning-rate schedule of `steps`; 0 means not to. A run that is already further gives its
    snapshot of that step.
    """

    model: str = "unet"
    seed: int = 0
    examples: int = 24_000
    own_vae: bool = False
    vae_steps: int = 1_200
    vae_batch: int = 16
    vae_lr: float = 1e-3
    vae_l1: float = 0.3
    vae_kl: float = 3e-4
    steps: int = 2_600
    stop: int = 0
    batch: int = 32
    lr: float = 1e-3
    muon: float = 0.0
    warmup: int = 100
    ema: float = 0.997
    caption_dropout: float = 0.1
    token_loss: float = 0.05
    pixel_loss: float = 0.02
    autocast: bool = True


DEFAULTS = {
    "unet": Settings(examples=40_000, steps=3_200),
    "mmdit": Settings(model="mmdit", steps=5_000, stop=3_500, batch=16, lr=2e-3, muon=1e-2, pixel_loss=0.1),
}


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
        self.stop = settings.stop or settings.steps
        self.denoiser = denoiser_named(settings.model, seed=settings.seed, device=device)
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
        """Run both stages, or what is left of them; returns the autoencoder and the denoiser's averaged weights."""
        examples = make_examples(self.settings.examples, progress=self.progress)
        vae = self.train_vae(examples) if self.settings.own_vae else load_vae().to(self.device)
        if self._trained(self.settings.model) > self.stop:
            return vae, self._snapshot(self.stop)
        return vae, self.train_denoiser(examples, self.encode(vae, examples))

    def export(self, vae: Any, model: Any, *, measured: int = 256) -> Path:
        """Write `weights/`: the pipeline and its card, with figures over `measured` pictures per number of objects."""
        folder, settings = self.out / "weights", self.settings
        pipe = export_pipeline(folder, self.denoiser.pipeline(vae, model))
        card: dict[str, Any] = {
            "settings": asdict(settings),
            "parameters": {
                name: sum(parameter.numel() for parameter in module.parameters())
                for name, module in pipe.components.items()
                if isinstance(module, nn.Module)
            },
            "training": {stage: self._summary(stage) for stage in ("vae", settings.model)},
        }
        if measured:
            # Seeds from 0 belong to the comparisons that people make with the model.
            seeds = range(CARD_SEEDS, CARD_SEEDS + measured)
            loaded = load_pipeline(settings.model, device=str(self.device), weights=folder)
            card["measured"] = measure(self.denoiser, loaded, seeds)
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
            self._update(vae, [optimizer], loss)
            log.update(loss=loss.item(), mse=(error**2).mean().item(), kl=kl.item(), lr=lr)
        vae.eval().requires_grad_(False)
        standardise_latents(vae, self._images(examples, torch.arange(min(2_000, len(examples.captions)))))
        return vae

    @torch.no_grad()
    def encode(self, vae: Any, examples: Examples) -> torch.Tensor:
        """Return the latents of all examples, float32 `[n,4,16,16]`."""
        batches = torch.arange(len(examples.captions)).split(64)
        batches = tqdm(batches, desc="encoding", disable=not self.progress)
        return torch.cat([vae.encode(self._images(examples, batch)).latent_dist.mean.cpu() for batch in batches])

    def train_denoiser(self, examples: Examples, latents: torch.Tensor) -> Any:
        """Train the denoiser on noised latents and localised attention; return its exponential moving average."""
        settings, denoiser = self.settings, self.denoiser
        torch.manual_seed(settings.seed + 1)
        model = denoiser.build().to(self.device).train()
        average = copy.deepcopy(model).eval().requires_grad_(False)
        optimizers = _optimizers(model, settings)
        tokens = denoiser.tokens([*(caption.text for caption in examples.captions), ""])
        words = word_table(examples)
        state = {"model": model, "average": average, **{name: one for name, (one, _) in optimizers.items()}}
        with denoiser.record(model) as recorders:
            for step, log in self._steps(settings.model, self.stop, settings.steps, state):
                generator = self._generator(1, step)
                rows = self._indices(generator, settings.batch, examples)
                lr, *_ = [
                    _set_lr(one, peak, step, settings.steps, warmup=settings.warmup)
                    for one, peak in optimizers.values()
                ]
                noise = torch.randn(latents[rows].shape, generator=generator)
                levels = denoiser.levels(len(rows), generator)
                dropped = torch.rand(len(rows), generator=generator) < settings.caption_dropout
                ids = torch.where(dropped[:, None], tokens[-1], tokens[rows])
                batch = (part.to(self.device) for part in (latents[rows], ids, noise, levels))
                with self._autocast():
                    errors, signal = denoiser.errors(model, *batch)
                # Where an object will be is open at high noise: there the maps have nothing to be right about.
                asked = words[rows].to(self.device), examples.masks[rows].to(self.device).float()
                weight = signal * ~dropped.to(self.device)
                maps = [record.probabilities for record in recorders.values() if record.probabilities is not None]
                token, pixel = (
                    torch.stack([loss(layer, *asked, weight) for layer in maps]).mean()
                    for loss in (token_loss, pixel_loss)
                )
                denoising = errors.mean()
                loss = denoising + settings.token_loss * token + settings.pixel_loss * pixel
                self._update(model, [one for one, _ in optimizers.values()], loss)
                _average(average, model, min(settings.ema, (1 + step) / (10 + step)))
                log.update(denoising=denoising.item(), token=token.item(), pixel=pixel.item(), lr=lr)
        return average

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
        begin = time.process_time() - seconds
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as lines:
            bar = tqdm(range(start, stop), desc=stage, initial=start, total=stop, disable=not self.progress)
            for step in bar:
                log: dict[str, float] = {}
                yield step, log
                done, seconds = step + 1, time.process_time() - begin
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
        model = self.denoiser.build()
        model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
        return model.eval().requires_grad_(False).to(self.device)

    def _summary(self, stage: str) -> dict[str, float]:
        """Return steps, seconds and the last hundred steps' mean losses; of a repeated step the last pass counts."""
        if stage == "vae" and not self.settings.own_vae:
            known: dict[str, float] = json.loads((WEIGHTS["unet"] / "card.json").read_text())["training"]["vae"]
            return known
        stop = self.settings.vae_steps if stage == "vae" else self.stop
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
        return torch.randint(len(examples.captions), (batch,), generator=generator)

    def _images(self, examples: Examples, rows: torch.Tensor) -> torch.Tensor:
        return examples.images[rows].to(self.device).float() / 127.5 - 1

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.autocast)

    def _update(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], loss: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()


def word_table(examples: Examples) -> torch.Tensor:
    """Return the text column and the object of every word of the captions, int64 `[n, 6, 2]`, -1 for none."""
    words = torch.full((len(examples.captions), 2 * MAX_OBJECTS, 2), -1)
    for row, caption in zip(words, examples.captions, strict=True):
        row[: len(caption.words)] = torch.tensor([(1 + word.place, word.object) for word in caption.words])
    return words


def _optimizers(model: Any, settings: Settings) -> dict[str, tuple[torch.optim.Optimizer, float]]:
    """Return AdamW and, if asked for, Muon for the matrices of the transformer's blocks, each with its peak rate.

    Matrices that the time makes modulations from are AdamW's: their input is the same for all tokens.
    """
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if settings.muon and parameter.ndim == 2 and "transformer_blocks." in name and ".linear." not in name
    ]
    known = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    made: dict[str, tuple[torch.optim.Optimizer, float]] = {
        "optimizer": (torch.optim.AdamW(rest, settings.lr, weight_decay=1e-2), settings.lr)
    }
    if matrices:
        muon = torch.optim.Muon(matrices, settings.muon, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
        made["muon"] = (muon, settings.muon)
    return made


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
    models = parser.add_subparsers(dest="model", required=True)
    for model, defaults in DEFAULTS.items():
        _add_options(models.add_parser(model, help=f"train the {model}"), defaults)
    options = vars(parser.parse_args(arguments))
    settings = Settings(**{name: options[name] for name in asdict(DEFAULTS["unet"])})
    run = Run(
        settings,
        options["out"],
        device=options["device"],
        resume=options["resume"],
        save_every=options["save_every"],
    )
    folder = run.export(*run.train(), measured=options["measured"])
    print(f"wrote {folder}")


def _add_options(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    out = Path("out") / f"shapes-{defaults.model}"
    parser.add_argument("--out", type=Path, default=out, help=f"folder of the run (default: {out})")
    parser.add_argument("--device", default="cpu", help="any torch device (default: cpu)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints (default: 250)")
    parser.add_argument(
        "--measured", type=int, default=256, help="pictures behind each figure of the card (default: 256)"
    )
    for name, value in asdict(defaults).items():
        flag = "--" + name.replace("_", "-")
        if name == "model":
            continue
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(flag, type=type(value), default=value, help=f"(default: {value})")


if __name__ == "__main__":
    main()
