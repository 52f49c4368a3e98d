"""The command `attnctl-fast`: one module for each of its commands, and what they share."""

from .main import main

__all__ = ["main"]
