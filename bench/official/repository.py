"""A user's clone of an authors' repository: importing its files, and what a comparison with one of its functions is."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.ops.layers import Layer
from bench.pictures.attention_layers import heads_to_channels

Results = tuple[Tensor, ...]
SEED = 0


# That of Stable Diffusion 1.5 at 512 px which all three repositories read or edit, for a guidance batch.
LAYER, TEXT_WIDTH = Layer("SD 1.5", 8, (16, 16), 160, batch=2), 768


class Clone(NamedTuple):
    """A clone: the repository's name and the folder."""

    repository: str
    root: Path

    def load(self, module: str, unused: tuple[str, ...] = ()) -> ModuleType:
        """Run a file of the clone, given as a dotted name from its root, as the module that it is there.

        `sys.path` and `sys.modules` are afterwards as before, but for packages from elsewhere that it has imported.
        Nothing is written into the clone.

        Args:
            unused: packages that the file imports and that the functions to be measured do not use. Where they are not
                installed, empty ones stand in.

        Raises:
            ImportError: the file is not there, or something that it imports is not.
        """
        file = Path(*module.split(".")).with_suffix(".py")
        if not (self.root / file).is_file():
            raise ImportError(f"{file} is not in the clone")
        with _importing(self.root, unused):
            loaded = importlib.import_module(module)
        if not Path(loaded.__file__ or "").is_relative_to(self.root.resolve()):
            raise ImportError(f"{module} is {loaded.__file__}, an installed package that hides the clone's {file}")
        return loaded


class Comparison(NamedTuple):
    """Their function and ours on the same inputs, each returning what must be equal.

    `tolerance`: of the largest difference of a result, over ours' largest number.
    """

    shape: str
    theirs: Callable[[], Results]
    ours: Callable[[], Results]
    tolerance: float


class Adapter(NamedTuple):
    """A function of a repository: its name there, the operation or step of ours that does the same, and how to compare
    the two on a device."""

    function: str
    operation: str
    build: Callable[[Clone, torch.device], Comparison]


class _Empty(ModuleType):
    """Stands in for a package that is imported and not used."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextlib.contextmanager
def _importing(root: Path, unused: tuple[str, ...]) -> Iterator[None]:
    """The clone's files hide everything of the same name, a file `utils.py` or a folder `models`, say."""
    own = {path.stem for path in root.iterdir() if path.is_dir() or path.suffix == ".py"}
    own |= {name for name in unused if name not in sys.modules and importlib.util.find_spec(name) is None}
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in own}
    ahead = [str(root.resolve()), *sys.path]
    with mock.patch.object(sys, "path", ahead), mock.patch.object(sys, "dont_write_bytecode", True):
        sys.modules.update({name: _Empty(name) for name in unused if name in own})
        importlib.invalidate_caches()
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] in own]:
                del sys.modules[name]
            sys.modules.update(hidden)


def attention_layer(device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """diffusers' cross-attention of `LAYER` with random weights, and its inputs: image tokens [2,M,C] and text
    [2,77,C_text]."""
    from diffusers.models.attention_processor import Attention

    generator = torch.Generator().manual_seed(SEED)
    heads, width = LAYER.heads, LAYER.width
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        attn = Attention(heads * width, TEXT_WIDTH, heads=heads, dim_head=width).eval().requires_grad_(False)
    for projection in (attn.to_q, attn.to_k):
        # Logits with a standard deviation of about 2, so that the maps are not flat.
        projection.weight.mul_(6**0.5)
    image = torch.randn(2, LAYER.image_tokens, heads * width, generator=generator)
    text = torch.randn(2, LAYER.tokens, TEXT_WIDTH, generator=generator)
    return attn.to(device), image.to(device), text.to(device)


def projected(attn: Any, out: Tensor) -> Tensor:
    """The layer's output [B,M,C] of attention [B,H,M,d]."""
    return attn.to_out[0](heads_to_channels(out))
