"""Attention-control primitives as differentiable, compilable torch operations."""

from .attention import attention
from .attention_with_context_gradient import attention_with_context_gradient
from .attention_with_maps import attention_with_maps
from .biased_attention import biased_attention
from .composed_attention import composed_attention
from .context_energy import ContextEnergy, context_energy
from .context_update import context_update
from .entmax_attention import entmax_attention
from .gaussian_bias import basis_shape, default_sigma, gaussian_bias
from .grouped_attention import grouped_attention
from .map_similarity import map_similarity
from .maps_from_lse import maps_from_lse
from .merge_targets import merge_targets
from .normalized_guidance import normalized_guidance
from .region_attention import region_attention
from .regulate import Regulation, regulate
from .regulated_attention import regulated_attention
from .regulation_loss import regulation_loss
from .similarity_loss import similarity_loss
from .smooth_maps import smooth_maps
from .target_statistics import TargetStatistics, target_statistics

__all__ = [
    "ContextEnergy",
    "Regulation",
    "TargetStatistics",
    "attention",
    "attention_with_context_gradient",
    "attention_with_maps",
    "basis_shape",
    "biased_attention",
    "composed_attention",
    "context_energy",
    "context_update",
    "default_sigma",
    "entmax_attention",
    "gaussian_bias",
    "grouped_attention",
    "map_similarity",
    "maps_from_lse",
    "merge_targets",
    "normalized_guidance",
    "region_attention",
    "regulate",
    "regulated_attention",
    "regulation_loss",
    "similarity_loss",
    "smooth_maps",
    "target_statistics",
]
