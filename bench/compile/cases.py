"""What is compiled to see what every kernel takes: operations at the layers of Stable Diffusion, and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.ops.base import case_of, trained, upstream
from bench.ops.inputs import Case
from bench.ops.layers import Layer
from bench.ops.registry import DECLARED

# What a form of an operation is differentiated by, by what stands behind its name: some of its leaves; and the outputs
# that the gradients come from, None for all.
GRADIENTS: dict[str, tuple[tuple[str, ...] | None, tuple[str, ...] | None]] = {
    "gradients": (None, None),
    "bias gradient": (("bias",), None),
    "theta gradient": (("theta",), None),
    # As in the last layer that a loss of the maps reads, and as in the layers before it.
    "query gradient of the maps": (("q",), ("maps",)),
    "query gradient": (("q",), None),
}
CPU = torch.device("cpu")
SOME = (
    *("attention", "target_statistics", "merge_targets", "attention_with_context_gradient", "context_update"),
    *("composed_attention", "region_attention", "regulated_attention, gradients", "attention_with_maps, gradients"),
    *("maps_from_lse", "maps_from_lse, gradients", "normalized_guidance", "normalized_guidance_shared"),
    *("grouped_attention", "grouped_attention, gradients", "entmax_attention"),
)
MOST = (
    *("regulated_attention", "merge_targets", "attention_with_context_gradient", "context_update"),
    *("attention_with_context_gradient_weighted", "composed_attention", "region_attention", "attention, gradients"),
    *("target_statistics, gradients", "regulated_attention, gradients", "attention_with_all_maps"),
    *("attention_with_maps, gradients", "attention_with_maps, query gradient of the maps"),
    *("attention_with_maps, query gradient", "maps_from_lse", "maps_from_lse, gradients", "normalized_guidance"),
    *("grouped_attention", "grouped_attention, gradients", "entmax_attention"),
)
KEYED = (
    *("attention", "target_statistics, more", "regulated_attention", "attention_with_context_gradient"),
    *("attention_with_maps", "biased_attention", "composed_attention", "region_attention", "normalized_guidance"),
    "entmax_attention",
)
ALL = (
    *dict.fromkeys((*SOME, *MOST)),
    *("target_statistics, more", "biased_attention", "biased_attention, gradients", "merge_targets, gradients"),
    *("attention_with_context_gradient, gradients", "composed_attention, gradients", "context_update_paper"),
    *("biased_attention, bias gradient", "regulated_attention, theta gradient", "attention_with_all_maps, gradients"),
    "attention_with_maps_of_heads",
    *(f"{name}, keyed" for name in KEYED),
    *(f"{name}, keyed, gradients" for name in KEYED[:5]),
)
LONG = (
    *("attention", "target_statistics", "regulated_attention", "attention_with_maps"),
    *(f"{name}, keyed" for name in KEYED),
)
JOINED = (
    *("maps_from_lse", "maps_from_lse, gradients", "maps_from_lse, query gradient", "maps_from_lse, keyed"),
    *("maps_from_lse, keyed, gradients", "maps_from_lse_of_heads"),
    *("grouped_attention", "grouped_attention, gradients", "grouped_attention, keyed, gradients"),
)
# Every width, text length and dtype at the grid where the models have it, all forms at one of them, and the widest
# heads that there may be. Kernels do not depend on batch, heads and, but for the solver, the grid.
LAYERS: list[tuple[torch.dtype, Layer, Sequence[str]]] = [
    (torch.float16, Layer("", 2, (16, 16), 64), ALL),
    (torch.float16, Layer("", 2, (64, 64), 40), MOST),
    (torch.float16, Layer("", 2, (32, 32), 80), MOST),
    (torch.float16, Layer("", 2, (16, 16), 160), MOST),
    (torch.float16, Layer("", 2, (32, 32), 64, tokens=154), LONG),
    # Of joint attention: a few columns of many, and many.
    (torch.float16, Layer("", 2, (16, 16), 64, tokens=400), JOINED),
    (torch.float16, Layer("", 2, (16, 16), 64, tokens=600, targets=64), JOINED),
    (torch.float16, Layer("", 2, (16, 16), 128, tokens=400), JOINED),
    (torch.float16, Layer("", 2, (16, 16), 128, tokens=600, targets=64), JOINED),
    (torch.bfloat16, Layer("", 2, (16, 16), 64, tokens=600, targets=64), JOINED),
    (torch.bfloat16, Layer("", 2, (16, 16), 128, tokens=400), JOINED),
    (torch.bfloat16, Layer("", 2, (16, 16), 128, tokens=600, targets=64), JOINED),
    (torch.bfloat16, Layer("", 2, (32, 32), 64), SOME),
    (torch.float32, Layer("", 2, (16, 16), 64), SOME),
    (torch.float32, Layer("", 2, (16, 16), 160), SOME),
    (torch.float16, Layer("", 2, (16, 16), 256), SOME),
    (torch.float32, Layer("", 2, (16, 16), 256), SOME),
]
# Of all heads at once, so by their number: SDXL's two, and joint attention's.
GUIDED = ("normalized_guidance", "normalized_guidance_shared")
LAYERS += [
    *((torch.float16, Layer("", heads, (16, 16), 64), GUIDED[:1]) for heads in (10, 20)),
    *((dtype, Layer("", 24, (16, 16), 128, tokens=400), GUIDED) for dtype in (torch.bfloat16, torch.float32)),
    (torch.float16, Layer("", 64, (16, 16), 256), GUIDED),
    # Texts of PixArt, Sana and HunyuanDiT.
    *(
        (dtype, Layer("", 2, (16, 16), 72, tokens=300), ("entmax_attention",))
        for dtype in (torch.float16, torch.float32)
    ),
]
OFFICIAL = ("regulate", "regulate_again", "regulation_loss_official, bias gradient")
PAPER = ("regulate_paper", "regulate_paper_again")
SOLVED: list[tuple[Layer, Sequence[str]]] = [
    *((Layer("", 2, (side, side), 64), OFFICIAL) for side in (8, 16, 32, 64)),
    *((Layer("", 2, (side, side), 64, targets=8), OFFICIAL) for side in (16, 32, 64)),
    (Layer("", 2, (16, 16), 64), (*PAPER, "gaussian_bias, gradients")),
    (
        Layer("", 2, (16, 16), 64),
        (
            *("regulation_loss_official, gradients", "regulation_loss_paper, bias gradient"),
            "regulation_loss_paper, gradients",
        ),
    ),
    *((Layer("", 2, (side, side), 64), PAPER) for side in (32, 64)),
    *((Layer("", 2, (side, side), 64), ("regulate_scaled", "regulate_scaled_again")) for side in (16, 32, 64)),
]
# Tokens, image tokens along a side, and the dtype of maps that are compared; a prompt has up to 75 tokens.
COMPARED: list[tuple[int, int, torch.dtype, Sequence[str]]] = [
    (12, 16, torch.float32, ("cosine", "normalised_cosine", "absolute")),
    (20, 16, torch.float16, ("cosine",)),
    (20, 32, torch.float32, ("cosine",)),
    (64, 16, torch.float32, ("cosine",)),
]


def kernel_cases() -> list[tuple[str, Callable[[], Any]]]:
    """List what launches every kernel as it is shipped: name and function."""
    found: list[tuple[str, Callable[[], Any]]] = []
    for dtype, layer, names in LAYERS:
        where = f"{_short(dtype)} d{layer.width} N{layer.tokens}"
        found += [(f"{where}, {name}", partial(_launch, name, case_of(layer, dtype, CPU))) for name in names]
    for tokens, side, dtype, variants in COMPARED:
        where = f"{_short(dtype)} M{side * side} n{tokens}"
        case = Case(side * side, dtype=dtype, map_tokens=tokens, strided=True)
        several = replace(case, batch=2)  # whose samples have lengths of their own
        names = [f"similarity_loss_{variant}" for variant in variants]
        found += [(f"{where} B2, {name}", partial(_launch, name, several)) for name in names]
        for name in (*names, "map_similarity", "smooth_maps"):
            found.append((f"{where}, {name}, gradients", partial(_launch, f"{name}, gradients", case)))
    for layer, names in SOLVED:
        case = case_of(layer, torch.float16, CPU)
        found += [(f"M{layer.image_tokens} T{layer.targets}, {name}", partial(_launch, name, case)) for name in names]
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _launch(name: str, case: Case) -> None:
    """Launch the kernels of an operation; behind its name, what of the case differs, and what is differentiated."""
    name, *how = name.split(", ")
    operation, case = DECLARED[name], replace(case, keyed="keyed" in how, more="more" in how)
    t = case.tensors(operation.inputs)
    wanted = next((GRADIENTS[x] for x in how if x in GRADIENTS), None)
    if wanted is None:
        operation.run(case, "triton", t)
        return
    leaves, outputs = wanted
    grads = upstream(operation.run(case, "eager", t))
    grads = grads if outputs is None else {x: grads[x] for x in outputs}
    leaves = leaves or tuple(x for x in operation.leaves if x in t)
    trained(operation, t, leaves, grads, lambda t: operation.bind(case, t, "triton"))()
