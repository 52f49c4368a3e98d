"""Packaging. `kernels/` at the root installs as `attnctl_fast.kernels`; its README says why it has no `__init__.py`."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
INIT = (ROOT / "attnctl_fast" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.M)
assert VERSION is not None

DIFFUSERS = [
    "diffusers>=0.40",
    "transformers>=4.56",
    "accelerate>=1.0",
    "safetensors>=0.4",
    "pillow>=10.1",
    "tqdm>=4.60",
]
# What judges pictures: all Apache-2.0 or BSD. OWLv2's processor needs scipy too.
EVALUATE = ["torchmetrics>=1.6", "torch-fidelity>=0.3", "torchvision>=0.26", "scipy>=1.11"]
BENCH = ["matplotlib>=3.9", "networkx>=3.4", "pytest>=8", "tqdm>=4.60"]
# ruff lays out the signatures.
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.30", "ruff>=0.6"]
TEST = ["allpairspy>=2.5", "hypothesis>=6.100", "mypy>=1.10", "peft>=0.17", "pytest-xdist>=3.6", "ruff>=0.6"]
# They drive a browser, where there is one; torchvision stays out, which a torch for CPUs cannot load (tests/support).
TEST += ["playwright>=1.49", "scipy>=1.11"]
# A torch for CUDA or ROCm brings its own; the tests run the kernels without a GPU, in Triton's interpreter.
TRITON = "triton>=3.6; sys_platform == 'linux'"

setup(
    name="attnctl-fast",
    version=VERSION[1],
    description="Attention control for text-to-image diffusion at almost no cost: differentiable torch operations",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "attnctl_fast",
        "attnctl_fast.cli",
        "attnctl_fast.evaluate",
        "attnctl_fast.kernels",
        "attnctl_fast.attach",
        "attnctl_fast.methods",
        "attnctl_fast.ops",
        "attnctl_fast.shapes",
    ],
    package_dir={"attnctl_fast.kernels": "kernels"},
    package_data={
        "attnctl_fast": ["py.typed"],
        "attnctl_fast.evaluate": ["report.html", "report.css", "report.js"],
        "attnctl_fast.kernels": ["README.md", "configs/*.json"],
        "attnctl_fast.shapes": ["weights/**/*"],
    },
    install_requires=["torch>=2.11", "numpy>=1.26"],
    extras_require={
        "diffusers": DIFFUSERS,
        "evaluate": [*DIFFUSERS, *EVALUATE],
        "bench": BENCH,
        "docs": DOCS,
        "test": [*DIFFUSERS, *BENCH, TRITON, *TEST],
    },
    entry_points={"console_scripts": ["attnctl-fast=attnctl_fast.cli:main"]},
)
