"""Published methods of attention control, one frozen dataclass each."""

from .attention_regulation import AttentionRegulation

__all__ = ["AttentionRegulation"]
