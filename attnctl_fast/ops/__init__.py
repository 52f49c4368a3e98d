"""Attention-control primitives as differentiable, compilable torch operations."""

from .attention import attention
from .biased_attention import biased_attention
from .gaussian_bias import basis_shape, default_sigma, gaussian_bias
from .merge_targets import merge_targets
from .regulate import Regulation, regulate
from .regulated_attention import regulated_attention
from .regulation_loss import regulation_loss
from .target_statistics import TargetStatistics, target_statistics

__all__ = [
    "Regulation",
    "TargetStatistics",
    "attention",
    "basis_shape",
    "biased_attention",
    "default_sigma",
    "gaussian_bias",
    "merge_targets",
    "regulate",
    "regulated_attention",
    "regulation_loss",
    "target_statistics",
]
