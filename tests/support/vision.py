"""The command line with torchvision and torch-fidelity, which torchmetrics needs, and random weights for both.

    python -m tests.support.vision reproduce table1 ...

torchvision of the package index is compiled for CUDA. With a torch for CPUs it does not import, and where it is
installed neither does transformers: so it lies in a folder of its own, `out/vision`, that `.ci/run` fills and that
ATTNCTL_VISION names where it is elsewhere, and only this process sees it.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

# Its definitions end with its last reference.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
FOLDER = Path(os.environ.get("ATTNCTL_VISION", Path(__file__).resolve().parents[2] / "out" / "vision"))
NEEDED = (
    "torchvision and torch-fidelity: pip install --no-deps --target out/vision torchvision torch-fidelity torchmetrics "
    "lightning-utilities"
)


def there() -> bool:
    """Whether this can run."""
    return (FOLDER / "torch_fidelity").is_dir() or find_spec("torch_fidelity") is not None


def import_torchvision() -> Any:
    """torchvision, also where its compiled operations do not load: none of them is used here."""
    sys.path.append(str(FOLDER))
    try:
        return import_module("torchvision")
    except RuntimeError:
        # "operator torchvision::nms does not exist": those that it asks for while it is imported.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return import_module("torchvision")


def write_weights(torchvision: Any) -> None:
    """Random weights of SqueezeNet and Inception, where torch keeps those that it has fetched."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(torchvision.models.squeezenet1_1().state_dict(), folder / url.rpartition("/")[2])
    cls = inception.FeatureExtractorInceptionV3
    load, cls.load_state_dict = cls.load_state_dict, lambda *_: None
    fetch, inception.load_state_dict_from_url = inception.load_state_dict_from_url, lambda *_, **__: None
    made = cls("random", ["64"])
    cls.load_state_dict, inception.load_state_dict_from_url = load, fetch
    torch.save(made.state_dict(), folder / inception.URL_INCEPTION_V3.rpartition("/")[2])


if __name__ == "__main__":
    write_weights(import_torchvision())
    from attnctl_fast.cli import main

    sys.exit(main(sys.argv[1:]))
