"""The compiled kernels against their limits and the committed figures, and what notices that they changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def resources(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import resources

    yield resources


def run(*options, **environment):
    """bench/resources.py in a process whose kernels are compiled, not interpreted."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "resources.py"), *map(str, options)]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True)


def test_shipped_kernels_stay_within_the_committed_figures():
    done = run("--check")
    assert done.returncode == 0, done.stderr


SCRIPT = """
import torch, triton
import triton.language as tl
from attnctl_fast.kernels._launch import launch

@triton.jit
def helper(x):
    return x + 1.0

@triton.jit
def _sum_fwd_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tile = helper(tl.load(x_ptr + places))
    tl.store(y_ptr + places, 3.0 * tile * tl.sum(tile))

x = torch.empty(16384)
launch(_sum_fwd_kernel, (1,), x.device, {"num_warps": WARPS}, x, x, BLOCK=SIZE)
"""


def compiled(folder, text, **sizes):
    for name, value in sizes.items():
        text = text.replace(name, str(value))
    folder.mkdir(exist_ok=True)
    script = folder / "kernel.py"
    script.write_text(text)
    return run("--script", script, "--targets", "sm_90", XDG_CACHE_HOME=str(folder), TRITON_CACHE_DIR=str(folder))


def test_only_what_changed_is_compiled(tmp_path):
    first = compiled(tmp_path, SCRIPT, SIZE=64, WARPS=1)
    assert first.returncode == 0 and "1 kernels, 1 compiled" in first.stderr, first.stderr
    assert "sum_fwd: kernel" in first.stdout and "sm_90" in first.stdout
    moved = compiled(tmp_path, "# a comment\n" + SCRIPT, SIZE=64, WARPS=1)
    assert "1 kernels, 0 compiled" in moved.stderr and moved.stdout == first.stdout
    called = SCRIPT.replace("x + 1.0", "x + 2.0")
    assert "1 kernels, 1 compiled" in compiled(tmp_path, called, SIZE=64, WARPS=1).stderr
    assert "1 kernels, 1 compiled" in compiled(tmp_path, SCRIPT, SIZE=64, WARPS=2).stderr


def test_a_spill_fails(tmp_path):
    done = compiled(tmp_path, SCRIPT, SIZE=16384, WARPS=1)
    assert done.returncode == 1 and "bytes per thread" in done.stderr, done.stderr


def test_what_cannot_be_launched_or_compiled_is_named(tmp_path):
    done = compiled(tmp_path, SCRIPT.replace("3.0 * tile", "tl.dot(tile, tile)"), SIZE=64, WARPS=1)
    assert done.returncode == 1 and "sm_90 sum_fwd: kernel" in done.stderr
    done = compiled(tmp_path, "raise ValueError('broken')")
    assert done.returncode == 1 and "ValueError: broken" in done.stderr


def test_growth_and_limits(resources):
    def figures(**changed):
        numbers = {"registers": 100, "spilled": 0, "shared": 65536, "matrix": 8, "code": 8192} | changed
        return {("gfx942", "a"): resources.Resources(**numbers)}

    committed = {place: ("key", x) for place, x in figures().items()}
    assert not list(resources.over_limits(figures()))
    assert "spills 4 bytes" in next(resources.over_limits(figures(spilled=4)))
    assert "65537 bytes of shared memory, over the limit of 65536" in next(resources.over_limits(figures(shared=65537)))
    for small in ({}, {"registers": 110}, {"registers": 40}, {"code": 10240}, {"shared": 72089}):
        assert not list(resources.grown(figures(**small), committed)), small
    for large in ({"registers": 111}, {"code": 10241}, {"shared": 72090}, {"matrix": 0}):
        assert len(list(resources.grown(figures(**large), committed))) == 1, large
    assert "only in resources.json" in next(resources.grown({}, committed))
    assert "missing from resources.json" in next(resources.grown(figures(), {}))


def test_committed_figures_are_read_as_they_were_written(resources, monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "COMMITTED", tmp_path / "resources.json")
    assert resources.read_committed() == ("", {})

    class Job:
        key = "0123"

    figures = {(target, "a: b"): resources.Resources(1, 0, 2, 3, 4) for target in resources.TARGETS}
    resources.write_committed(figures, dict.fromkeys(figures, Job))
    version, entries = resources.read_committed()
    assert version == resources.triton.__version__
    assert entries == {place: ("0123", found) for place, found in figures.items()}


def test_every_kernel_that_is_configured_is_compiled(resources):
    """And the other way round."""
    kernels = {name.partition(":")[0] for _, name in resources.read_committed()[1]}
    assert kernels == set(resources._launch.read_table("default"))
