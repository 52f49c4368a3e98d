"""Writing a trained model as a pipeline folder, and measuring it for its card."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .denoiser import Denoiser, denoiser_named
from .detection import FAILURES, Score, failures
from .evaluate import Evaluation, evaluate
from .localisation import localisation_table

_README = """\
# The shapes model `{settings[model]}`

A text-to-image model of coloured shapes on light grey, 64x64 pixels, trained on drawings: {about[pipeline]}, in
float16, which `attnctl_fast.shapes.load_pipeline("{settings[model]}")` loads.

- Data: {settings[examples]} drawings of one, two or three objects (50, 40 and 10 %), six colours, six shapes. No
  picture or text from anywhere else. Captions name all, some or one of a picture's objects, in any order, mostly with
  their colours: `a blue star and a circle`. A caption that is silent about an object does not deny it.
- Autoencoder: {parameters[vae]} parameters, {training[vae][steps]} steps of batch {settings[vae_batch]} in \
{training[vae][seconds]:.0f} s, mean squared error {training[vae][mse]} on pixels from -1 to 1; that of the UNet.
- {about[model]}: {size} parameters, {trained[steps]} steps of batch {settings[batch]} in {trained[seconds]:.0f} s of
  one processor core, while the learning rate falls as if there were {settings[steps]}.
- Loss: {about[loss]}, plus {settings[token_loss]} times the token loss and {settings[pixel_loss]} times the
  pixel loss of TokenCompose (arXiv 2312.03626), weighted by the share of signal: the attention to the words of an
  object shall lie inside the object, and be as high as the object is likely there. The maps below are localised
  because they were trained to be.
- {about[text]}.
- Rebuild: `python -m attnctl_fast.shapes.train {settings[model]}`, with the settings in `card.json`, which are the
  defaults. Another machine rounds differently and gives another model of the same kind.
"""
_MEASURED = """
Pictures from seeds {first} to {last}, {sampler}, in percent. Strict: every object of the
prompt was found; exact: and no other object; colours: every colour of the prompt was found.

| objects | strict | exact | colours |
|---|---|---|---|
{rates}

How pictures of two-object prompts fail, in percent of all (more than one may be true of a picture): {failures}.

Area under the ROC curve of a word's head-averaged attention map on drawings of two objects, half noised: the word's
own object against the other object, and against all cells that its own object does not touch.

| layer | noun, other | noun, rest | colour, other | colour, rest |
|---|---|---|---|---|
{areas}
"""


def export_pipeline(folder: Path, pipe: Any) -> Any:
    """Write a copy of a pipeline in float16 safetensors, in the layout of `save_pretrained`; return the copy."""
    parts = {name: _half(part) if isinstance(part, nn.Module) else part for name, part in pipe.components.items()}
    for name, part in parts.items():
        if name.startswith("tokenizer"):
            # What the last texts were filled up to is no part of a tokenizer.
            part.backend_tokenizer.no_padding()
            part.backend_tokenizer.no_truncation()
    half = type(pipe)(**parts, **({"requires_safety_checker": False} if "safety_checker" in parts else {}))
    half.save_pretrained(folder, safe_serialization=True)
    for tokenizer in folder.glob("tokenizer*"):
        if (tokenizer / "tokenizer_config.json").is_file() and "CLIP" in type(parts[tokenizer.name]).__name__:
            # Releases 4 of transformers read these two files instead of tokenizer.json, and names with the prefix.
            parts[tokenizer.name].backend_tokenizer.model.save(str(tokenizer))
            encoder = tokenizer.name.replace("tokenizer", "text_encoder")
            _prefix_names(folder / encoder / "model.safetensors", "text_model.")
    for config in folder.glob("*/config.json"):
        # Where a part was loaded from is no one else's business.
        entries = json.loads(config.read_text(encoding="utf-8"))
        entries.pop("_name_or_path", None)
        config.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    # They call T5's tokenizer of this kind by another name, which releases 5 know as well.
    index = folder / "model_index.json"
    index.write_text(index.read_text(encoding="utf-8").replace('"T5Tokenizer"', '"T5TokenizerFast"'), encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    return half


def detection_rates(drawn: Evaluation) -> dict[str, float]:
    """Return the shares of pictures that are `strict`, `exact` and `colours`."""
    return {name: drawn.hits(name) / len(drawn.scores) for name in Score._fields}


def failure_rates(drawn: Evaluation) -> dict[str, float]:
    """Return the shares of pictures that fail in each of the ways of `FAILURES`."""
    kinds = [failures(*pair) for pair in zip(drawn.scenes, drawn.detections, strict=True)]
    return {name: sum(name in found for found in kinds) / len(kinds) for name in FAILURES}


def measure(denoiser: Denoiser, pipe: Any, seeds: Sequence[int]) -> dict[str, Any]:
    """Measure the figures of the model card.

    Detection rates at one, two and three objects, how two-object prompts fail, and localisation per layer.
    """
    drawn = {str(objects): evaluate(pipe, seeds, objects=objects, batch_size=32) for objects in (1, 2, 3)}
    return {
        "seeds": [min(seeds), max(seeds)],
        "sampler": f"{type(pipe.scheduler).__name__}, 25 steps, guidance 5",
        "detection": {objects: detection_rates(pictures) for objects, pictures in drawn.items()},
        "failures": failure_rates(drawn["2"]),
        "localisation_auc": localisation_table(denoiser, pipe, seeds),
    }


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write `card.json` and the same in words, `README.md`, beside the weights."""
    rounded = _rounded(card)
    (folder / "card.json").write_text(json.dumps(rounded, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_in_words(rounded), encoding="utf-8")


def _in_words(card: dict[str, Any]) -> str:
    model = card["settings"]["model"]
    size = next(card["parameters"][name] for name in ("unet", "transformer") if name in card["parameters"])
    text = _README.format(**card, about=denoiser_named(model).about, trained=card["training"][model], size=size)
    if "measured" in card:
        measured = card["measured"]
        first, last = measured["seeds"]
        text += _MEASURED.format(
            first=first,
            last=last,
            sampler=measured["sampler"],
            rates=_table(measured["detection"], ("strict", "exact", "colours"), 100, "{:.1f}"),
            failures=", ".join(f"{name} {100 * share:.1f}" for name, share in measured["failures"].items()),
            areas=_table(measured["localisation_auc"], ("noun", "noun_rest", "colour", "colour_rest"), 1, "{:.3f}"),
        )
    return text


def _table(rows: dict[str, dict[str, float]], columns: Sequence[str], factor: float, form: str) -> str:
    return "\n".join(
        f"| `{name}` | " + " | ".join(form.format(factor * values[column]) for column in columns) + " |"
        for name, values in rows.items()
    )


def _prefix_names(path: Path, prefix: str) -> None:
    """Give every tensor of a text model a prefix that it lacks; releases 5 of transformers read both forms."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    own = (prefix, "text_projection.")
    named = {name if name.startswith(own) else prefix + name: tensor for name, tensor in tensors.items()}
    save_file(named, path, metadata={"format": "pt"})


def _half(module: Any) -> Any:
    # Not module.to(...): diffusers then warns of layers to keep in float32, of which these models have none.
    return torch.nn.Module.to(copy.deepcopy(module), "cpu", torch.float16)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 4) if isinstance(value, float) else value
