"""What several test files need."""

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# With other instructions than the processor's own, Inductor would take from its cache what it compiled for those, and
# be wrong.
if "ATEN_CPU_CAPABILITY" in os.environ:
    folder = Path(tempfile.gettempdir()) / f"inductor-{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))

# Triton reads this when it decorates a kernel, so it stands before the first import of one: without a GPU the kernels
# run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from tests.support.interpreter import hasten

    hasten()


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shapes pipeline as it is before training, in the layout of `save_pretrained`."""
    from attnctl_fast.shapes.autoencoder import build_vae
    from attnctl_fast.shapes.denoiser import denoiser_named

    folder = tmp_path_factory.mktemp("untrained")
    denoiser = denoiser_named("unet")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = denoiser.pipeline(build_vae(), denoiser.build())
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Makes uninitialised memory NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
