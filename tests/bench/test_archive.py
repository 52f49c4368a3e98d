"""Compiled kernels in a folder: packed by one process, found by Triton's own lookup in another, which has no GPU."""

import json
import subprocess

import pytest

from tests.support import compiled

pytest.importorskip("triton")
# Two kernels instead of all.
FEW = """
import json, sys, torch
from pathlib import Path
from bench.compile import archive, compiler, precompile
from bench.gpu import plan
from bench.ops.layers import SMALL
from bench.ops.registry import launch
name = "gaussian_bias_all"
plan.cases = lambda: [(name, lambda: launch(name, SMALL, torch.float16, torch.device("cpu")))]
folder, gpu = Path(sys.argv[1]), compiler.TARGETS["sm_90"].gpu
"""
PACK = "sys.exit(precompile.run(precompile.parser().parse_args(['--cache', str(folder), '--processes', '1'])))"
INSTALL = "sys.exit(precompile.run(precompile.parser().parse_args(['--cache', str(folder), '--install'])))"
# Triton looks its kernels up where it cannot compile any.
FIND = """
from triton import knobs
from triton.compiler import ASTSource
def make_ir(*_, **__):
    raise AssertionError("not in the cache")
ASTSource.make_ir = make_ir
jobs, errors = precompile.jobs(gpu, None)
assert not errors
def hits():
    found = []
    knobs.compilation.listener = lambda **event: found.append(event["cache_hit"])
    for named in jobs:
        try:
            kernel = named.job.compile()
            assert kernel.kernel[:4] == b"\\x7fELF" and kernel.metadata.name == kernel.src.name
        except AssertionError:
            found.append(False)
    return found
before = hits()
installed = archive.install(folder, 1)
missing = archive.compile_jobs(jobs, 1)
print(json.dumps([before, installed, hits(), missing]))
"""


def run(tmp_path, name, script):
    # A cache and a home of its own, so that Triton knows nothing from before.
    elsewhere = dict.fromkeys(("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"), str(tmp_path))
    done = compiled.run(FEW + script, tmp_path / "kernels", TRITON_CACHE_DIR=str(tmp_path / name), **elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_that_travelled_are_found_where_nothing_can_be_compiled(tmp_path, monkeypatch):
    _without_launchers(tmp_path)
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "notes.txt").write_text("not ours")
    (folder / "0123.kernel").write_text("of other sources")
    said = run(tmp_path, "here", PACK)
    assert "2 kernels recorded" in said and f"2 kernels in {folder}" in said and "2 compiled now" in said
    files = sorted(folder.glob("*.kernel"))
    assert len(files) == 2 and (folder / "notes.txt").is_file()
    assert all(file.stat().st_size < 60_000 for file in files)
    assert "0 compiled now" in run(tmp_path, "here again", PACK)

    # A kernel whose key is no longer that of its sources is left alone.
    (folder / "0123.kernel").write_bytes(files[0].read_bytes())
    before, (installed, stale, _), after, errors = json.loads(run(tmp_path, "there", FIND))
    assert before == [False, False] and (installed, stale) == (2, 1)
    assert after == [True, True] and errors == []
    assert "('installed', 2) ('stale', 1)" in run(tmp_path, "elsewhere", INSTALL)


def _without_launchers(folder):
    """Launchers of Triton before 3.7 are linked with the driver's library: here one that has only the names."""
    names = "GetErrorString PointerGetAttribute CtxGetCurrent DeviceGet DevicePrimaryCtxRetain CtxSetCurrent"
    source = "".join(f"int cu{name}(void) {{ return 0; }}\n" for name in (*names.split(), "FuncSetAttribute"))
    (folder / "cuda.c").write_text(source)
    command = ["gcc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "cuda.c"]
    try:
        subprocess.run(list(map(str, command)), check=True)
    except FileNotFoundError:
        pytest.skip("no gcc, which Triton needs for its launchers")
