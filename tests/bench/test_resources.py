"""The compiled kernels against their limits and the committed figures, and what notices that they changed."""

import os

import pytest

from tests.support import compiled

pytest.importorskip("triton")


@pytest.fixture
def resources(monkeypatch):
    from bench.compile import resources

    yield resources


def run(*options, **environment):
    """`bench resources` where kernels are compiled."""
    return compiled.run(
        "import sys; from bench.__main__ import main; sys.exit(main())", "resources", *options, **environment
    )


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


def shown(folder, text, **sizes):
    for name, value in sizes.items():
        text = text.replace(name, str(value))
    folder.mkdir(exist_ok=True)
    script = folder / "kernel.py"
    script.write_text(text)
    return run("--script", script, "--targets", "sm_90", XDG_CACHE_HOME=str(folder), TRITON_CACHE_DIR=str(folder))


def test_only_what_changed_is_compiled(tmp_path):
    first = shown(tmp_path, SCRIPT, SIZE=64, WARPS=1)
    assert first.returncode == 0 and "1 kernels, 1 compiled" in first.stderr, first.stderr
    assert "sum_fwd: kernel" in first.stdout and "sm_90" in first.stdout
    moved = shown(tmp_path, "# a comment\n" + SCRIPT, SIZE=64, WARPS=1)
    assert "1 kernels, 0 compiled" in moved.stderr and moved.stdout == first.stdout
    called = SCRIPT.replace("x + 1.0", "x + 2.0")
    assert "1 kernels, 1 compiled" in shown(tmp_path, called, SIZE=64, WARPS=1).stderr
    assert "1 kernels, 1 compiled" in shown(tmp_path, SCRIPT, SIZE=64, WARPS=2).stderr


def test_a_spill_fails(tmp_path):
    done = shown(tmp_path, SCRIPT, SIZE=16384, WARPS=1)
    assert done.returncode == 1 and "bytes per thread" in done.stderr, done.stderr


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;          /* 0x00000a0000017a02 */
        /*0010*/              @!P0 EXIT ;                          /* 0x000000000000894d */
        /*0020*/                   IADD3 R0, R0, 0x1, RZ ;         /* 0x0000000100007810 */
        /*0030*/               @P1 BRA 0x60 ;                      /* 0x0000002000001947 */
        /*0040*/                   HMMA.16816.F32 R4, R8, R2, R4 ; /* 0x000000020804723c */
        /*0050*/               @P2 BRA P3, 0x40 ;                  /* 0xffffffe000002947 */
        /*0060*/               @P0 BRA 0x20 ;                      /* 0xffffffb000000947 */
        /*0070*/                   BRA.DIV UR4, 0xa0 ;             /* 0x0000002000007947 */
        /*0080*/                   EXIT ;                          /* 0x000000000000794d */
        /*0090*/                   BRA 0x90;                       /* 0xfffffffc00fc7947 */
        /*00a0*/                   BRA 0x20 ;                      /* 0xffffffb000007947 */
"""
ASSEMBLY = """
kernel:                                 ; @kernel
\ts_load_dword s0, s[0:1], 0x0
.LBB0_1:                                ; =>This Loop Header: Depth=1
\tv_mfma_f32_16x16x4_f32 a[0:3], v0, v1, a[0:3]
\ts_cbranch_scc1 .LBB0_3
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
\tv_add_f32_e32 v0, v0, v1             ; a comment
\ts_cbranch_vccnz .LBB0_2
.LBB0_3:
\ts_cbranch_scc0 .LBB0_1
\ts_endpgm
\t.section\t.rodata
"""


def test_the_largest_loop_holds_those_in_it_and_no_path_of_parted_threads(resources):
    from bench.compile.loops import amd, largest, nvidia

    assert [x.name for x in nvidia(SASS)].count("HMMA") == 1 and len(nvidia(SASS)) == 11
    assert largest(nvidia(SASS)) == 5
    assert largest(nvidia(SASS.replace("@P0 BRA 0x20", "@P0 BRA 0x70"))) == 2
    assert largest(nvidia(SASS.replace("@P0 BRA 0x20", "@P0 CALL.REL.NOINC 0x20"))) == 5
    assert largest(nvidia("")) == 0
    assert len(amd(ASSEMBLY)) == 7 and largest(amd(ASSEMBLY)) == 5
    assert largest(amd(ASSEMBLY.replace("scc0 .LBB0_1", "scc0 .LBB0_3"))) == 2


def test_a_loop_is_counted(tmp_path):
    def loop(text):
        done = shown(tmp_path, text, SIZE=64, WARPS=1)
        assert done.returncode == 0, done.stderr
        header, row = done.stdout.splitlines()
        return int(row.split()[-header.split()[::-1].index("loop") - 1])

    assert loop(SCRIPT) == 0
    looped = SCRIPT.replace("BLOCK: tl", "n, BLOCK: tl").replace("x, x, BLOCK", "x, x, 5, BLOCK")
    looped = looped.replace("    tl.store", "    for i in range(n):\n        tile = tl.exp(tile) + i\n    tl.store")
    assert 4 < loop(looped) < 400


def test_what_cannot_be_launched_or_compiled_is_named(tmp_path):
    done = shown(tmp_path, SCRIPT.replace("3.0 * tile", "tl.dot(tile, tile)"), SIZE=64, WARPS=1)
    assert done.returncode == 1 and "sm_90 sum_fwd: kernel" in done.stderr
    done = shown(tmp_path, "raise ValueError('broken')")
    assert done.returncode == 1 and "ValueError: broken" in done.stderr


def test_a_compiler_that_dies_is_an_error(resources):
    """As LLVM does by abort(); a pool that waits for it would wait for ever."""
    done = dict(resources.in_parallel([lambda: 1, os.abort, lambda: 2], 1))
    assert done[0] == 1 and "process died" in done[1] and set(done) == {0, 1, 2}


def test_growth_and_limits(resources):
    def figures(**changed):
        numbers = {"registers": 100, "spilled": 0, "shared": 65536, "matrix": 8, "loop": 900, "code": 8192} | changed
        return {("gfx942", "a"): resources.Resources(**numbers)}

    committed = {place: ("key", x) for place, x in figures().items()}
    assert not list(resources.over_limits(figures()))
    assert "spills 4 bytes" in next(resources.over_limits(figures(spilled=4)))
    assert "65537 bytes of shared memory, over the limit of 65536" in next(resources.over_limits(figures(shared=65537)))
    for small in ({}, {"registers": 110}, {"registers": 40}, {"loop": 990}, {"code": 10240}, {"shared": 72089}):
        assert not list(resources.grown(figures(**small), committed)), small
    for large in ({"registers": 111}, {"loop": 991}, {"code": 10241}, {"shared": 72090}, {"matrix": 0}):
        assert len(list(resources.grown(figures(**large), committed))) == 1, large
    assert "only in resources.json" in next(resources.grown({}, committed))
    assert "missing from resources.json" in next(resources.grown(figures(), {}))


def test_committed_figures_are_read_as_they_were_written(resources, monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "COMMITTED", tmp_path / "resources.json")
    assert resources.read_committed() == ("", {})

    class Job:
        key = "0123"

    figures = {(target, "a: b"): resources.Resources(1, 0, 2, 3, 5, 4) for target in resources.TARGETS}
    resources.write_committed(figures, dict.fromkeys(figures, Job))
    version, entries = resources.read_committed()
    assert version == resources.triton.__version__
    assert entries == {place: ("0123", found) for place, found in figures.items()}
    path = resources.COMMITTED
    path.write_text(path.read_text().replace('"loop", ', ""))
    assert resources.read_committed() == ("", {}), "figures of another version of the file"


def test_every_kernel_that_is_configured_is_compiled(resources):
    """And the other way round."""
    kernels = {name.partition(":")[0] for _, name in resources.read_committed()[1]}
    assert kernels == set(resources._launch.read_table("default"))
