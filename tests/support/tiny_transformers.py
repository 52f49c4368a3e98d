"""Tiny diffusers pipelines on transformers, with random weights: PixArt, Sana, HunyuanDiT, SD 3, FLUX.1, Chroma,
Qwen-Image, AuraFlow, CogView 4, FLUX.2, Lumina 2, Z-Image, Wan and LTX-Video, a fraction of a second each on a CPU.

Their latents are 16x16 by default (LTX: 8x8), and have other shapes with `size`; their images have 8x8 tokens, and
Sana's 16x16. Videos have three frames of latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support import tiny, tiny_text

KINDS = (
    "pixart_alpha",
    "pixart_sigma",
    "sana",
    "hunyuan",
    "sd3",
    "flux",
    "chroma",
    "qwen",
    "auraflow",
    "cogview4",
    "flux2",
    "flux2_klein",
    "lumina2",
    "wan",
    "zimage",
    "ltx",
)
VIDEOS = ("wan", "ltx")
# Kinds whose latents are packed, 2x2 of them in a token.
PACKED = ("flux", "chroma", "qwen", "flux2", "flux2_klein")
PROMPT = "a photo of a bag and an apple"
SIDE = 16  # of the latents
T5_LENGTH = 24  # of the T5 text, where a call may say it
FRAMES = 3  # of a video's latents
CLASSES = {
    "pixart_alpha": "PixArtAlphaPipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
    "sana": "SanaPipeline",
    "hunyuan": "HunyuanDiTPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "chroma": "ChromaPipeline",
    "qwen": "QwenImagePipeline",
    "auraflow": "AuraFlowPipeline",
    "cogview4": "CogView4Pipeline",
    "flux2": "Flux2Pipeline",
    "flux2_klein": "Flux2KleinPipeline",
    "lumina2": "Lumina2Pipeline",
    "wan": "WanPipeline",
    "zimage": "ZImagePipeline",
    "ltx": "LTXPipeline",
}
JOINT = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 32}
ROTARY = (4, 6, 6)


def _vae(channels: int, blocks: int = 2) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    ).eval()


def _sana_vae(channels: int = 4) -> Any:
    from diffusers import AutoencoderDC

    pair: dict[str, Any] = {}
    for part in ("encoder", "decoder"):
        pair |= {
            f"{part}_block_types": "ResBlock",
            f"{part}_block_out_channels": (8, 8),
            f"{part}_layers_per_block": (1, 1),
            f"{part}_qkv_multiscales": ((), ()),
        }
    return AutoencoderDC(latent_channels=channels, **pair, scaling_factor=0.41407).eval()


def _flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def _sharpened(model: Any, sharper: float = 4.0, stronger: float = 3.0, attention: str = "attn") -> Any:
    """Give the attention to the text peaks, and an effect on the output that tests can see.

    sharper: factor of queries and keys; of their norms' weights its square root. stronger: of values and outputs.
    attention: what the layers of joint attention are called.
    """
    scales = {
        sharper: (
            "attn2.to_q.weight",
            "attn2.to_k.weight",
            f"{attention}.to_q.weight",
            f"{attention}.to_k.weight",
            "add_k_proj.weight",
        ),
        sharper**0.5: ("norm_q.weight", "norm_k.weight", "norm_added_k.weight"),
        stronger: ("attn2.to_v.weight", "attn2.to_out.0.weight", "add_v_proj.weight", f"{attention}.to_out.0.weight"),
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for scale, ends in scales.items():
                if name.endswith(ends):
                    parameter.mul_(scale)
            # Of ControlNets, which begin with none.
            if "controlnet_" in name and name.endswith("weight"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _t5(parts: dict[str, Any], suffix: str = "", width: int = 32) -> None:
    parts[f"tokenizer{suffix}"] = tokens = tiny_text.t5_tokenizer()
    parts[f"text_encoder{suffix}"] = tiny_text.t5_encoder(tokens, width)


def _clip(parts: dict[str, Any], suffix: str = "", projection: bool = True) -> None:
    parts[f"tokenizer{suffix}"] = tokens = tiny.tokenizer("!" if suffix else tiny.EOS)
    parts[f"text_encoder{suffix}"] = tiny._text_encoder(tokens, projection)


def _pixart(cls: str, alpha: bool) -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    parts: dict[str, Any] = {"vae": _vae(4), "scheduler": DPMSolverMultistepScheduler()}
    _t5(parts)
    # With 128 the 1024-pixel models of PixArt-alpha are told the picture's size.
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=32,
        sample_size=128 if alpha else SIDE,
        use_additional_conditions=alpha,
        interpolation_scale=1,
    )
    return parts | {"transformer": _sharpened(model)}


def _sana(cls: str) -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel

    tokens = tiny_text.gemma_tokenizer()
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=SIDE,
    )
    return {
        "vae": _sana_vae(),
        "tokenizer": tokens,
        "text_encoder": tiny_text.gemma_encoder(tokens),
        "transformer": _sharpened(model),
        "scheduler": DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    }


def _hunyuan(cls: str) -> dict[str, Any]:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel

    tokens = tiny_text.bert_tokenizer()
    # The pipeline knows no other size of a latent cell than 8 pixels.
    parts: dict[str, Any] = {"vae": _vae(4, 4), "tokenizer": tokens, "text_encoder": tiny_text.bert_encoder(tokens)}
    _t5(parts, "_2")
    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        in_channels=4,
        patch_size=2,
        sample_size=SIDE,
        # The last has a skip connection from the first.
        num_layers=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
    )
    scheduler = DDPMScheduler(beta_end=0.02, prediction_type="v_prediction", steps_offset=1)
    unsafe = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return parts | unsafe | {"transformer": _sharpened(model), "scheduler": scheduler}


def _sd3(cls: str, t5: bool = True, dual: bool = False) -> dict[str, Any]:
    from diffusers import SD3ControlNetModel, SD3Transformer2DModel

    parts: dict[str, Any] = {"vae": _vae(16), "scheduler": _flow(shift=3.0)}
    _clip(parts)
    _clip(parts, "_2")
    if t5:
        _t5(parts, "_3")
    else:
        parts |= {"tokenizer_3": None, "text_encoder_3": None}
    config: dict[str, Any] = {
        **JOINT,
        "sample_size": SIDE,
        "in_channels": 16,
        "num_layers": 3,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
    }
    if dual:
        config |= {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    parts["transformer"] = _sharpened(SD3Transformer2DModel(**config))
    if "ControlNet" in cls:
        parts["controlnet"] = _sharpened(SD3ControlNetModel(**(config | {"num_layers": 2})))
    return parts


def _flux(cls: str, schnell: bool = False) -> dict[str, Any]:
    from diffusers import FluxControlNetModel, FluxTransformer2DModel

    scheduler = _flow(shift=1.0) if schnell else _flow(shift=3.0, use_dynamic_shifting=True)
    parts: dict[str, Any] = {"vae": _vae(16), "scheduler": scheduler}
    _clip(parts, projection=False)
    _t5(parts, "_2")
    config: dict[str, Any] = {
        **JOINT,
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "pooled_projection_dim": 16,
        "guidance_embeds": not schnell,
        "axes_dims_rope": ROTARY,
    }
    # Latents, the masked picture's, and the mask.
    filling = {"in_channels": 64 + 64 + 4 * tiny.SCALE**2, "out_channels": 64} if "Fill" in cls else {}
    parts["transformer"] = _sharpened(FluxTransformer2DModel(**config | filling))
    if "ControlNet" in cls:
        parts["controlnet"] = _sharpened(FluxControlNetModel(**config))
    return parts


def _chroma(cls: str) -> dict[str, Any]:
    from diffusers import ChromaTransformer2DModel

    parts: dict[str, Any] = {"vae": _vae(16), "scheduler": _flow(shift=3.0)}
    _t5(parts)
    model = ChromaTransformer2DModel(
        **JOINT,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        axes_dims_rope=ROTARY,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return parts | {"transformer": _sharpened(model)}


def _qwen(cls: str) -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, QwenImageControlNetModel, QwenImageTransformer2DModel

    tokens = tiny_text.qwen_tokenizer()
    vae = AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False])
    config: dict[str, Any] = {**JOINT, "joint_attention_dim": 16, "axes_dims_rope": ROTARY}
    parts = {
        "vae": vae.eval(),
        "tokenizer": tokens,
        "text_encoder": tiny_text.qwen_encoder(tokens),
        "transformer": _sharpened(QwenImageTransformer2DModel(**config, num_layers=3)),
        "scheduler": _flow(shift=3.0, use_dynamic_shifting=True),
    }
    if "ControlNet" in cls:
        parts["controlnet"] = _sharpened(QwenImageControlNetModel(**config, num_layers=2))
    return parts


def _with_template(pipe: Any) -> None:
    """Have the text begin with the prompt, as it does with Qwen's own tokenizer."""
    before, _ = pipe.prompt_template_encode.split("{}")
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(before).input_ids)


def _auraflow(cls: str) -> dict[str, Any]:
    from diffusers import AuraFlowTransformer2DModel

    tokens = tiny_text.t5_tokenizer()
    model = AuraFlowTransformer2DModel(
        **JOINT,
        sample_size=SIDE,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    return {
        "vae": _vae(4),
        "tokenizer": tokens,
        "text_encoder": tiny_text.t5_encoder(tokens, cls="UMT5EncoderModel"),
        "transformer": _sharpened(model, stronger=300.0),
        "scheduler": _flow(shift=1.73),
    }


def _cogview4(cls: str) -> dict[str, Any]:
    from diffusers import CogView4Transformer2DModel

    tokens = tiny_text.glm_tokenizer()
    model = CogView4Transformer2DModel(
        in_channels=16,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=SIDE,
        rope_axes_dim=(16, 16),
    )
    return {
        "vae": _vae(16),
        "tokenizer": tokens,
        "text_encoder": tiny_text.glm_encoder(tokens),
        "transformer": _sharpened(model, stronger=12.0, attention="attn1"),
        "scheduler": _flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    }


def _flux2(cls: str) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    klein = "Klein" in cls
    tokens = tiny_text.qwen_tokenizer() if klein else tiny_text.mistral_tokenizer()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        norm_num_groups=4,
    )
    model = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        # Three of the encoder's layers side by side.
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    return {
        "vae": vae.eval(),
        "tokenizer": tokens,
        "text_encoder": (tiny_text.qwen3_encoder if klein else tiny_text.mistral_encoder)(tokens),
        "transformer": _sharpened(model),
        "scheduler": _flow(shift=3.0, use_dynamic_shifting=True),
    }


def _lumina2(cls: str) -> dict[str, Any]:
    from diffusers import Lumina2Transformer2DModel

    tokens = tiny_text.gemma_tokenizer()
    model = Lumina2Transformer2DModel(
        sample_size=SIDE,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=ROTARY,
        axes_lens=(64, 32, 32),
        cap_feat_dim=16,
    )
    return {
        "vae": _vae(16),
        "tokenizer": tokens,
        "text_encoder": tiny_text.gemma_encoder(tokens),
        "transformer": _sharpened(model),
        "scheduler": _flow(shift=6.0),
    }


def _wan(cls: str, expand: bool = False) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    tokens = tiny_text.t5_tokenizer()
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    return {
        "vae": AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
        "tokenizer": tokens,
        "text_encoder": tiny_text.t5_encoder(tokens, cls="UMT5EncoderModel"),
        "transformer": _sharpened(model),
        "expand_timesteps": expand,
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


def _ltx(cls: str) -> dict[str, Any]:
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    # Four levels, for the pipeline draws in multiples of 32 pixels.
    vae = AutoencoderKLLTXVideo(
        latent_channels=16,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    model = LTXVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=32,
    )
    parts = {"vae": vae.eval(), "transformer": _sharpened(model)}
    _t5(parts)
    return parts | {"scheduler": _flow(shift=3.0, use_dynamic_shifting=True)}


def _zimage(cls: str) -> dict[str, Any]:
    from diffusers import ZImageTransformer2DModel

    tokens = tiny_text.qwen_tokenizer()
    model = ZImageTransformer2DModel(
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=list(ROTARY),
        axes_lens=[128, 32, 32],
    )
    return {
        "vae": _vae(16),
        "tokenizer": tokens,
        "text_encoder": tiny_text.qwen3_encoder(tokens),
        "transformer": _sharpened(model, stronger=30.0, attention="attention"),
        "scheduler": _flow(use_dynamic_shifting=True),
    }


BUILD: dict[str, Callable[..., dict[str, Any]]] = {
    "pixart_alpha": lambda cls: _pixart(cls, alpha=True),
    "pixart_sigma": lambda cls: _pixart(cls, alpha=False),
    "sana": _sana,
    "hunyuan": _hunyuan,
    "sd3": _sd3,
    "flux": _flux,
    "chroma": _chroma,
    "qwen": _qwen,
    "auraflow": _auraflow,
    "cogview4": _cogview4,
    "flux2": _flux2,
    "flux2_klein": _flux2,
    "lumina2": _lumina2,
    "wan": _wan,
    "zimage": _zimage,
    "ltx": _ltx,
}


def pipeline(
    kind: str, cls: str | None = None, *, seed: int = 0, parts: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A pipeline of this kind.

    cls: of this diffusers class, such as an image-to-image one. parts: in place of its components. options: sd3 takes
    `t5=False` for none, `dual=True` for SD 3.5 medium's second attention and normed queries and keys; flux takes
    `schnell=True`, wan `expand=True` for a time of every token.
    """
    import diffusers

    name = cls or CLASSES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = BUILD[kind](name, **options)
        pipe = getattr(diffusers, name)(**(built | (parts or {})))
    pipe.set_progress_bar_config(disable=True)
    if kind == "qwen":
        _with_template(pipe)
    if kind == "flux2":
        pipe.system_message = "a photo."
    if kind == "lumina2":
        pipe.system_prompt = "a photo."
    return pipe


def latent_channels(kind: str) -> int:
    return 16 if kind in ("sd3", "cogview4", "lumina2", "zimage", *VIDEOS, *PACKED) else 4


def default_size(kind: str) -> tuple[int, int]:
    return (SIDE // 2, SIDE // 2) if kind == "ltx" else (SIDE, SIDE)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def picture_file(height: int, width: int) -> Any:
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(picture(height, width)))[0]


def mask_image(height: int, width: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., height // 4 : -height // 4, width // 4 :] = 1
    return mask


def arguments(kind: str, pipe: Any, size: tuple[int, int] | None = None, **options: Any) -> dict[str, Any]:
    """What `call` calls the pipeline with."""
    names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
    scale = next(getattr(pipe, name) for name in names if getattr(pipe, name, None))
    height, width = (side * scale for side in size or default_size(kind))
    given: dict[str, Any] = {
        "prompt": PROMPT,
        "height": height,
        "width": width,
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(1),
        "max_sequence_length": {"lumina2": 48, "zimage": 64}.get(kind, T5_LENGTH),
        "text_encoder_out_layers": (0, 1, 2),
        "use_resolution_binning": False,
        "clean_caption": False,
        "complex_human_instruction": tiny_text.INSTRUCTION,
        "image": picture(height, width),
        "control_image": picture(height, width),
        "mask_image": mask_image(height, width),
        "strength": 1.0,
        "num_frames": 1 + {"wan": 4, "ltx": 8}.get(kind, 1) * (FRAMES - 1),
    }
    known = inspect.signature(type(pipe).__call__).parameters
    if kind.startswith("flux2"):
        # Of FLUX.2 a picture to look at.
        del given["image"]
    return {name: value for name, value in given.items() if name in known} | options


def call(kind: str, pipe: Any, **options: Any) -> torch.Tensor:
    """The final latents: of some kinds packed, `[B, cells, channels]`. `size`: (height, width) of the latents."""
    given = arguments(kind, pipe, **options)
    # Z-Image writes into lists of prompts.
    given = {name: list(x) if isinstance(x, list) else x for name, x in given.items()}
    return next(iter(pipe(**given).values()))


def saved(kind: str, folder: Path) -> Path:
    """The folder, with a pipeline of this kind in the layout of `save_pretrained`."""
    pipe = pipeline(kind)
    if kind == "pixart_sigma":
        # Of the sizes that its pipeline knows.
        pipe.transformer.register_to_config(sample_size=32)
    pipe.save_pretrained(folder)
    return folder


def of_any_size(patch: Any) -> None:
    """Have pipelines that draw in sizes of their own only draw in any."""
    from diffusers.image_processor import PixArtImageProcessor
    from diffusers.pipelines.hunyuandit import pipeline_hunyuandit

    same = staticmethod(lambda height, width, ratios: (height, width))
    patch.setattr(PixArtImageProcessor, "classify_height_width_bin", same)
    patch.setattr(pipeline_hunyuandit, "map_to_standard_shapes", lambda width, height: (width, height))
