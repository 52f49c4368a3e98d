"""How far a method moves a picture from the plain one, by LPIPS (Zhang et al., arXiv 1801.03924), of torchmetrics."""

from __future__ import annotations

import numpy as np
import torch
from PIL.Image import Image

from .scorers import Scores, Subject
from .weights import hub_file, require

NETS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}


class Lpips:
    """A judge that gives `lpips`, the distance from the plain picture of the same prompt and seed; none for that one.

    Args:
        net: the network, one of `NETS`; its weights are those of torchvision.
        device: where it computes.
        allow_pickle: also take a file of weights that is not torchvision's own.

    Raises:
        ImportError: torchmetrics or torchvision is not installed.
    """

    def __init__(self, net: str, device: torch.device, allow_pickle: bool = False) -> None:
        require("--lpips", "torchmetrics", "torchvision")
        self.name, self._net, self._device, self._allow_pickle = f"lpips {net}", net, device, allow_pickle

    def load(self) -> None:
        import torchvision
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        hub_file("--lpips", getattr(torchvision.models, NETS[self._net]).DEFAULT.url, self._allow_pickle)
        self._metric = LearnedPerceptualImagePatchSimilarity(net_type=self._net, normalize=True)

    @torch.inference_mode()
    def __call__(self, subject: Subject) -> Scores:
        if subject.plain is None:
            return {}
        if subject.plain.size != subject.image.size:
            raise ValueError(f"the plain picture is {subject.plain.size}, this one {subject.image.size}")
        metric = self._metric.to(self._device)
        value = metric(*(_pixels(image).to(self._device) for image in (subject.image, subject.plain)))
        metric.reset()
        return {"lpips": value.item()}


def _pixels(image: Image) -> torch.Tensor:
    """Return a picture's pixels from 0 to 1, `[1,3,height,width]`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
