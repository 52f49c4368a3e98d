"""How far a method's pictures are, as a whole, from those of a folder: FID (Heusel et al., arXiv 1706.08500)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .weights import hub_file, require

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_BATCH = 16


class Fid:
    """The Frechet distance of torchmetrics, on the Inception features of torch-fidelity.

    Args:
        folder: of the pictures to compare with; those in folders within it count too.
        dims: how many features; fewer than the usual 2048 need fewer pictures.
        device: where it computes.
        allow_pickle: also take a file of weights that is not torch-fidelity's own.

    Raises:
        ImportError: torchmetrics, torch-fidelity or torchvision is not installed.
        ValueError: there are fewer than two pictures in the folder.
    """

    def __init__(self, folder: Path, dims: int, device: torch.device, allow_pickle: bool = False) -> None:
        require("--fid", "torchmetrics", "torch_fidelity", "torchvision")
        self._files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
        if len(self._files) < 2:
            raise ValueError(f"--fid {folder} holds {len(self._files)} pictures; name a folder with two or more")
        about = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in self._files)
        self.name = f"fid {dims} {hashlib.sha256(about.encode()).hexdigest()[:12]}"
        self._dims, self._device, self._allow_pickle = dims, device, allow_pickle

    def fetch(self) -> Path:
        """Return the file of weights, fetched where it is missing; errors as in `hub_file`."""
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        return hub_file("--fid", URL_INCEPTION_V3, self._allow_pickle)

    def load(self) -> None:
        """Load the weights and look at the folder's pictures.

        Raises:
            OSError, ValueError: the weights cannot be had or used, or a picture cannot be read.
        """
        from torchmetrics.image.fid import FrechetInceptionDistance

        weights = self.fetch()
        self._metric = FrechetInceptionDistance(
            self._dims, reset_real_features=False, feature_extractor_weights_path=str(weights)
        ).to(self._device)
        self._update(self._files, real=True)

    def __call__(self, pictures: Sequence[Path]) -> float:
        """Return the distance of at least two pictures."""
        self._metric.reset()
        self._update(pictures, real=False)
        return float(self._metric.compute())

    @torch.inference_mode()
    def _update(self, paths: Iterable[Path], real: bool) -> None:
        batch: list[torch.Tensor] = []
        for path in paths:
            with Image.open(path) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            if batch and (len(batch) == _BATCH or batch[0].shape != pixels.shape):
                self._metric.update(torch.stack(batch).to(self._device), real=real)
                batch = []
            batch.append(pixels)
        if batch:
            self._metric.update(torch.stack(batch).to(self._device), real=real)
