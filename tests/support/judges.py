"""Models that judge pictures, of the real architectures with random weights, saved in folders as a hub has them."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from tests.support import tiny

_SIDE = {"height": 32, "width": 32}
_SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = {**_SHAPE, "image_size": 32, "patch_size": 16}


def _saved(folder: Path, model: Any, processor: Any) -> Path:
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _clip_text(tokens: Any) -> dict[str, Any]:
    special = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    return {**_SHAPE, **special, "vocab_size": len(tokens), "max_position_embeddings": tiny.LENGTH}


def clip(folder: Path, seed: int = 3) -> Path:
    """A CLIP model to whom pictures and prompts are alike: all cosines are positive."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokens = tiny.tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=_clip_text(tokens), vision_config=_VISION, projection_dim=8))
    with torch.no_grad():
        # A direction that both have.
        model.visual_projection.weight.copy_(model.text_projection.weight)
        model.vision_model.post_layernorm.bias.fill_(3)
        model.text_model.final_layer_norm.bias.fill_(3)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=_SIDE)
    return _saved(folder, model, CLIPProcessor(images, tokens))


def owl(folder: Path, seed: int = 3) -> Path:
    """An OWLv2 model."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    tokens = tiny.tokenizer()
    config = Owlv2Config(text_config=_clip_text(tokens), vision_config=_VISION, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Owlv2ForObjectDetection(config)
    return _saved(folder, model, Owlv2Processor(Owlv2ImageProcessor(size=_SIDE), tokens))


def _words(folder: Path) -> Any:
    """A tokenizer that knows some words and spells the others."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    (folder / "vocab.txt").write_text("\n".join([*special, *tiny.WORDS, "?", *letters]))
    return BertTokenizer.from_pretrained(folder, model_max_length=32)


def _blip_text(tokens: Any) -> dict[str, Any]:
    text = {**_SHAPE, "vocab_size": len(tokens), "max_position_embeddings": 64, "projection_dim": 16}
    text |= {"encoder_hidden_size": 16, "bos_token_id": tokens.cls_token_id, "eos_token_id": tokens.sep_token_id}
    return text | {"pad_token_id": tokens.pad_token_id, "sep_token_id": tokens.sep_token_id}


def captions(folder: Path, seed: int = 3) -> Path:
    """A BLIP model that writes captions."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    tokens = _words(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BlipConfig(text_config=_blip_text(tokens), vision_config=_VISION, projection_dim=16)
        model = BlipForConditionalGeneration(config)
    return _saved(folder, model, BlipProcessor(BlipImageProcessor(size=_SIDE), tokens))


def answers(folder: Path, labels: dict[str, float], seed: int = 3) -> Path:
    """A ViLT model that chooses among these answers, by these numbers whatever it sees."""
    from transformers import ViltConfig, ViltForQuestionAnswering, ViltImageProcessor, ViltProcessor

    tokens = _words(folder)
    names = dict(enumerate(labels))
    config = ViltConfig(
        **_VISION,
        vocab_size=len(tokens),
        max_position_embeddings=32,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViltForQuestionAnswering(config)
    with torch.no_grad():
        model.classifier[-1].weight.zero_()
        model.classifier[-1].bias.copy_(torch.tensor(list(labels.values())))
    return _saved(folder, model, ViltProcessor(ViltImageProcessor(size={"shortest_edge": 32}), tokens))


def writes(folder: Path, seed: int = 3) -> Path:
    """A BLIP model that writes answers."""
    from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    tokens = _words(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BlipConfig(text_config=_blip_text(tokens), vision_config=_VISION, projection_dim=16)
        model = BlipForQuestionAnswering(config)
    return _saved(folder, model, BlipProcessor(BlipImageProcessor(size=_SIDE), tokens))
