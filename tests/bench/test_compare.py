"""`bench compare`: slowdowns are found, identical trees pass, and nothing is left behind."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.harness.checkout import git_state

ROOT = Path(__file__).resolve().parents[2]
# Each call of an operation does its work four times.
SLOWED = """

_once = {0}


def {0}(*given, **how):
    for _ in range(3):
        _once(*given, **how)
    return _once(*given, **how)
"""
WAITING = """

_at_once = {0}


def {0}(*given, **how):
    import time

    time.sleep(0.0002)
    return _at_once(*given, **how)
"""
BROKEN = """

def {0}(*given, **how):
    raise RuntimeError("broken on purpose")
"""


def git(root: Path, *words: str) -> str:
    name = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "core.hooksPath=/dev/null")
    return subprocess.run(["git", *name, *words], cwd=root, check=True, capture_output=True, text=True).stdout


def append(root: Path, operation: str, text: str) -> None:
    with (root / "attnctl_fast" / "ops" / f"{operation}.py").open("a", encoding="utf-8") as file:
        file.write(text.format(operation))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What compare runs, in a repository of its own: `lacking` has no region_attention and `slow` a slow
    gaussian_bias, `main` is this tree."""
    root = tmp_path_factory.mktemp("repository").resolve()
    skipped = shutil.ignore_patterns("__pycache__", "weights", "results", "resources.json")
    for name in ("attnctl_fast", "kernels", "bench"):
        shutil.copytree(ROOT / name, root / name, ignore=skipped)
    (root / ".gitignore").write_text("__pycache__/\n")
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=main")
    for branch, operation, text in (
        ("lacking", "__init__", "\ndel region_attention\n"),
        ("slow", "gaussian_bias", SLOWED),
    ):
        git(root, "checkout", "--quiet", "-b", branch, "main")
        append(root, operation, text)
        git(root, "commit", "--quiet", "--all", f"--message={branch}")
    git(root, "checkout", "--quiet", "main")
    return root


@pytest.fixture
def checkout(repository: Path) -> Iterator[Path]:
    """The repository, which has to have no worktree but its own in the end, and no branch changed."""
    branches = git(repository, "for-each-ref")
    yield repository
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert git(repository, "for-each-ref") == branches
    assert git(repository, "symbolic-ref", "HEAD").strip() == "refs/heads/main"
    git(repository, "reset", "--quiet", "--hard")
    git(repository, "clean", "--quiet", "-d", "--force")


@pytest.fixture
def compare(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`bench compare` of the repository, in this process; its modules can be imported."""
    monkeypatch.setattr("bench.compare.main.ROOT", checkout)
    monkeypatch.setattr("bench.harness.rows.git_state", partial(git_state, checkout))

    def run(*words: str) -> int:
        return main(["compare", *words])

    return run


def small(*operations: str) -> list[str]:
    return ["--only", *operations, "--shapes", "tiny", "--rounds", "8", "--device", "cpu", "--no-instructions"]


def simulated_pair(
    ratios: list[float], counts: dict[str, int] | None = None, waits: dict[int, float] | None = None
) -> type:
    """In the place of `pair.Pair`: no processes, and the next of `ratios` between the trees in each set of rounds.
    `waits`: what waiting makes of it, by the ratios that are left then (otherwise 1)."""
    from bench.compare import pair

    class Simulated:
        def __init__(self, *trees: Path) -> None:
            self.closed = False

        def build(self, case: pair.Case) -> dict[str, str]:
            return {}

        def calls(self) -> int:
            return 1

        def counts(self, case: pair.Case, calls: int) -> dict[str, int]:
            if counts is None:
                raise pair.Failure("base", "no valgrind")
            return counts

        def times(self, calls: int, rounds: int, tick: Callable[[], Any] = lambda: None) -> pair.Times:
            assert not self.closed
            ratio, noise = ratios.pop(0), random.Random(0)
            found = [ratio * math.exp(noise.gauss(0, 0.01)) for _ in range(rounds)]
            waited = [(waits or {}).get(len(ratios), 1.0) * math.exp(noise.gauss(0, 0.01)) for _ in range(rounds)]
            return pair.Times([1.0] * rounds, found, found, found, waited)

        def __exit__(self, *_: object) -> None:
            self.closed = True

    return Simulated


def read(file: Path) -> dict[str, dict[str, Any]]:
    return {row["op"]: row for row in map(json.loads, file.read_text().splitlines())}


def test_a_slowed_operation_is_found(
    compare: Callable[..., int],
    checkout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("bench.compare.main.CONFIRMATIONS", 1)
    append(checkout, "gaussian_bias", SLOWED)
    append(checkout, "smooth_maps", BROKEN)
    append(checkout, "map_similarity", WAITING)
    changes = git(checkout, "diff")
    file = tmp_path / "rows.jsonl"
    operations = ("gaussian_bias", "context_update", "region_attention", "smooth_maps", "map_similarity")
    assert compare("lacking", *small(*operations), "--results", str(file)) == 1
    assert git(checkout, "diff") == changes
    rows = read(file)
    assert list(rows) == list(operations)
    assert rows["gaussian_bias"]["verdict"] == "slower"
    assert len(rows["gaussian_bias"]["ratio"]) == 2
    assert all(found["low"] > 1.05 for found in rows["gaussian_bias"]["ratio"])
    assert rows["context_update"]["verdict"] != "slower"
    assert rows["map_similarity"]["verdict"] == "slower by waiting"
    assert all(found["low"] > 1.05 for found in rows["map_similarity"]["wait_ratio"])
    assert "region_attention" in rows["region_attention"]["failed"]["base"]
    assert rows["smooth_maps"]["failed"] == {"current": "RuntimeError: broken on purpose"}
    assert (
        rows["gaussian_bias"]["dirty"]
        and rows["gaussian_bias"]["base"] == git(checkout, "rev-parse", "lacking").strip()
    )
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["gaussian_bias"].endswith("SLOWER")
    assert lines["map_similarity"].endswith("SLOWER by waiting")
    assert "BASE cannot run it" in lines["region_attention"]
    assert "this tree cannot run it: RuntimeError: broken on purpose" in lines["smooth_maps"]


def test_an_identical_tree_passes(compare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("HEAD", *small("gaussian_bias", "attention")) == 0
    out = capsys.readouterr().out
    assert "attention " in out and "SLOWER" not in out and "cannot" not in out


def test_a_speedup_needs_tests_that_pass(
    compare: Callable[..., int],
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bench.compare import main as regressions
    from bench.compare import suites

    monkeypatch.setattr(regressions, "Pair", simulated_pair([0.8] * 9))
    (checkout / "tests" / "ops").mkdir(parents=True)
    test = checkout / "tests" / "ops" / "test_bias.py"
    file = tmp_path / "rows.jsonl"
    words = ["slow", *small("gaussian_bias"), "--results", str(file)]
    for content, said, verdict in (
        (
            "assert not 'ops.gaussian_bias'",
            "refused: its tests fail: FAILED tests/ops/test_bias.py::test_it",
            "refused",
        ),
        ("assert 'ops.gaussian_bias'", "0.8", "faster"),
    ):
        test.write_text(f"def test_it():\n    {content}\n")
        assert compare(*words) == 0
        assert said in capsys.readouterr().out
        assert read(file)["gaussian_bias"]["verdict"] == verdict
    test.unlink()
    assert suites.refusal(checkout, "gaussian_bias_all") == "no file tests/ops/test_*.py names gaussian_bias"
    assert compare(*words, "--no-tests") == 0
    assert read(file)["gaussian_bias"]["verdict"] == "faster, untested"


def test_every_operation_has_tests(compare: Callable[..., int]) -> None:
    from bench.compare import main as regressions
    from bench.compare import suites

    assert [name for name in regressions.OPERATIONS if not suites.suites(ROOT, name)] == []


def test_an_interrupt_keeps_what_was_measured(
    compare: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bench.compare import pair

    started: list[subprocess.Popen[str]] = []
    calls = pair.Pair.calls

    def interrupted(self: pair.Pair) -> int:
        started.extend(process.process for process in self.sides.values())
        if len(started) > 2:
            raise KeyboardInterrupt
        return calls(self)

    monkeypatch.setattr(pair.Pair, "calls", interrupted)
    file = tmp_path / "rows.jsonl"
    assert compare("HEAD", *small("gaussian_bias", "attention"), "--results", str(file)) == 130
    assert list(read(file)) == ["gaussian_bias"]
    assert all(process.poll() is not None for process in started)


def test_a_termination_leaves_nothing_behind(compare: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """`checkout` looks for the worktree."""
    from bench.compare import main as regressions

    made: list[Path] = []
    Simulated = simulated_pair([])

    class Terminated(Simulated):  # type: ignore[misc, valid-type]
        def __init__(self, *trees: Path) -> None:
            super().__init__(*trees)
            made.append(trees[0])

        def calls(self) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            return 1

    monkeypatch.setattr(regressions, "Pair", Terminated)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        compare("HEAD", *small("gaussian_bias"))
    assert left.value.code == 128 + signal.SIGTERM
    assert made and not made[0].exists()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "failed, status",
    [
        ({"base": "no such shape"}, 2),
        ({"base": "no memory", "current": "no memory"}, 2),
        ({"current": "no such shape"}, 1),
    ],
)
def test_a_comparison_of_nothing_does_not_pass(
    compare: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failed: dict[str, str],
    status: int,
) -> None:
    from bench.compare import main as regressions

    Simulated = simulated_pair([])
    Simulated.build = lambda self, case: failed  # type: ignore[attr-defined]
    monkeypatch.setattr(regressions, "Pair", Simulated)
    assert compare("HEAD", *small("gaussian_bias", "attention")) == status
    said = capsys.readouterr()
    assert "2 failed" in said.out
    if status == 2:
        assert f"nothing could be compared: BASE cannot run it: {failed['base']}" in said.err


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere"], "BASE is 'nowhere', which is no commit here"),
        (["--", "--all"], "BASE is '--all', which is no commit here"),
        (["HEAD", "--only", "atention"], "'atention'; known are attention, "),
        (["HEAD", "--shapes", "sd9"], "'sd9'; known are sd15-64"),
        (
            ["HEAD", *small("attention", "regulate"), "--rounds", "5"],
            "--rounds is 5; intervals for 2 cases need 6 or more",
        ),
        (["HEAD", "--threshold", "0"], "--threshold is 0.0"),
    ],
)
def test_mistakes(compare: Callable[..., int], capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert compare(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_worktrees(compare: Callable[..., int], checkout: Path, tmp_path: Path) -> None:
    from bench.compare.worktree import resolve, worktree

    with pytest.raises(ValueError, match="is not a git checkout"):
        resolve(tmp_path, "HEAD")
    with pytest.raises(ValueError, match="is not a git checkout"):
        resolve(checkout / "bench", "HEAD")
    commit = resolve(checkout, "slow")
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error), worktree(checkout, commit) as tree:
            assert "_once" in (tree / "attnctl_fast" / "ops" / "gaussian_bias.py").read_text()
            raise error
        assert not tree.exists()
        assert len(git(checkout, "worktree", "list").splitlines()) == 1
    with pytest.raises(OSError, match="git worktree add failed"), worktree(checkout, "0" * 40):
        pass


def test_a_process_without_its_package_or_that_dies(
    compare: Callable[..., int], checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bench.compare import main as regressions
    from bench.compare import pair

    # In a tree without the package, or with only its first file, the rest comes from where PYTHONPATH says.
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    package = checkout / "attnctl_fast"
    case = pair.Case("gaussian_bias", regressions.SHAPES["tiny"], "float32", "cpu", "eager")
    for first_file, said in (
        (None, rf"ImportError: attnctl_fast[\w.]* comes from {package}/[\w/]+\.py, not from {tmp_path}"),
        ("raise ImportError('on purpose')", "ImportError: on purpose"),
        ("import os; os._exit(3)", "it ended with status 3: silently"),
        (
            f"__path__.append({str(package)!r})\nfrom attnctl_fast import _impl\n",
            rf"ImportError: attnctl_fast\.\w+ comes from {package}/[\w/]+\.py, not from {tmp_path}",
        ),
    ):
        tree = tmp_path / str(len(list(tmp_path.iterdir())))
        (tree / "attnctl_fast").mkdir(parents=True)
        if first_file is None:
            (tree / "attnctl_fast").rmdir()
        else:
            (tree / "attnctl_fast" / "__init__.py").write_text(first_file)
        process = pair.Process("base", tree)
        try:
            with pytest.raises(pair.Failure, match=said):
                process.ask("build", **case._asdict())
        finally:
            process.close()
    process = pair.Process("base", checkout)
    try:
        with pytest.raises(pair.Failure, match="has built nothing to run"):
            process.ask("time", calls=1)
        process.ask("build", **case._asdict())
        process.process.kill()
        process.process.wait()
        for order in ("time", "count"):
            with pytest.raises(pair.Failure, match="it ended with status -9"):
                process.ask(order, calls=1)
        with pytest.raises(pair.Failure, match="has no form 'fused'"):
            process.ask("build", **case._replace(impl="fused")._asdict())
        answer = process.ask("build", **case._asdict())
        assert 0 <= answer["relative_error"] < 1e-5
        assert process.ask("time", calls=2)["seconds"] > 0
    finally:
        process.close()


@pytest.mark.parametrize(
    "ratios, counts, waits, verdict",
    [
        ([1.0], None, {}, "same"),
        ([1.2, 1.2, 1.2], None, {}, "slower"),
        ([1.2, 1.0], None, {}, "same"),
        ([1.2, 1.2, 1.0], None, {}, "same"),
        ([1.2, 0.8], None, {}, "unclear"),
        ([0.8, 0.8, 0.8], None, {}, "faster"),
        ([1.07, 1.07, 1.07], {"base": 10_000, "current": 10_004}, {}, "same"),
        ([1.2, 1.2, 1.2], {"base": 10_000, "current": 10_800}, {}, "slower"),
        ([1.0], {"base": 10_000, "current": 11_000}, {}, "slower"),
        ([0.8, 0.8, 0.8], {"base": 10_000, "current": 11_000}, {}, "faster"),
        ([1.2, 1.2, 1.05], {"base": 10_000, "current": 10_004}, {}, "same"),
        ([1.15, 1.15, 1.09], {"base": 10_000, "current": 10_004}, {}, "same"),
        ([1.15, 1.15, 1.15], {"base": 10_000, "current": 10_004}, {}, "slower, same instructions"),
        ([0.8, 0.8, 0.8], {"base": 10_000, "current": 10_004}, {}, "same"),
        ([1.0, 1.0, 1.0], None, {2: 1.2, 1: 1.2, 0: 1.2}, "slower by waiting"),
        ([1.0, 1.0, 1.0], {"base": 10_000, "current": 10_004}, {2: 1.2, 1: 1.2, 0: 1.2}, "slower by waiting"),
        ([0.8, 0.8, 0.8], None, {2: 1.2, 1: 1.2, 0: 1.2}, "slower by waiting"),
        ([1.0, 1.0], None, {1: 1.2}, "same"),
        ([1.0], None, {0: 0.8}, "same"),
    ],
)
def test_a_change_is_confirmed_in_fresh_processes(
    compare: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ratios: list[float],
    counts: dict[str, int] | None,
    waits: dict[int, float],
    verdict: str,
) -> None:
    from bench.compare import main as regressions

    left = list(ratios)
    monkeypatch.setattr(regressions, "Pair", simulated_pair(left, counts, waits))
    arguments = regressions.parser().parse_args(["HEAD", "--device", "cpu", "--rounds", "12", "--instructions"])
    case = regressions.chosen(arguments)[0]
    with regressions.Comparison(tmp_path, arguments, 0.01, True) as comparison:
        row = comparison.row(case)
    assert row["verdict"] == verdict
    assert row["uncounted"] == (None if counts else "under valgrind: no valgrind")
    assert not left


@pytest.mark.full
@pytest.mark.skipif(shutil.which("callgrind_annotate") is None, reason="needs valgrind, and minutes")
def test_counts_by_valgrind(compare: Callable[..., int], checkout: Path) -> None:
    from bench.compare import main as regressions
    from bench.compare import pair

    case = pair.Case("gaussian_bias", regressions.SHAPES["tiny"], "float32", "cpu", "eager")
    base = checkout / "out" / "base"
    shutil.copytree(checkout / "attnctl_fast", base / "attnctl_fast")
    for name in ("bench", "kernels"):
        (base / name).symlink_to(checkout / name)
    append(checkout, "gaussian_bias", SLOWED)
    with pair.Pair(base, checkout) as both:
        counts = both.counts(case, 4)
    assert 2 < counts["current"] / counts["base"] < 4.1


def simulated(noise: random.Random, slowdown: float, spread: float, rounds: int = 24) -> list[float]:
    """Ratios of rounds of a machine that gets slower or faster all the time, wanders, and now and then stands still for
    somebody else; `spread`: of a sample's own noise."""
    from bench.compare.intervals import turns

    drift, wandering, ratios = noise.uniform(-0.02, 0.02), 0.0, []
    for index, order in enumerate(turns(rounds)):
        seconds = {"base": 0.0, "current": 0.0}
        for place, side in enumerate(order):
            wandering = 0.9 * wandering + noise.gauss(0, spread / 4)
            tail = noise.expovariate(3) if noise.random() < spread / 2 else 0.0
            speed = slowdown if side == "current" else 1.0
            seconds[side] += speed * math.exp(drift * (4 * index + place) + wandering + noise.gauss(0, spread) + tail)
        ratios.append(seconds["current"] / seconds["base"])
    return ratios


@pytest.mark.parametrize("spread", [0.02, 0.1])
def test_noise_is_no_slowdown(compare: Callable[..., int], spread: float) -> None:
    from bench.compare.intervals import interval, verdict
    from bench.compare.main import CONFIRMATIONS

    noise, covered = random.Random(0), 0
    for _ in range(200):
        sets = [interval(simulated(noise, 1.0, spread), 0.05) for _ in range(1 + CONFIRMATIONS)]
        assert verdict(sets, [], None, 0.05) in ("same", "unclear")
        covered += sets[0].low <= 1 <= sets[0].high
    assert 180 <= covered <= 198


@pytest.mark.parametrize("slowdown, expected", [(1.1, "slower"), (1 / 1.1, "faster")])
def test_a_slowdown_is_no_noise(compare: Callable[..., int], slowdown: float, expected: str) -> None:
    from bench.compare.intervals import interval, verdict
    from bench.compare.main import CONFIRMATIONS

    noise, found = random.Random(0), []
    for _ in range(200):
        sets = [interval(simulated(noise, slowdown, 0.02), 0.05) for _ in range(1 + CONFIRMATIONS)]
        found.append(verdict(sets, [], None, 0.05))
    assert found.count(expected) >= 195
    assert set(found) <= {expected, "unclear"}


def test_intervals(compare: Callable[..., int]) -> None:
    from bench.compare.intervals import interval, turns, verdict, waiting
    from bench.compare.main import widened
    from bench.harness.intervals import Interval, fewest_rounds

    assert list(turns(2)) == [("base", "current", "current", "base"), ("current", "base", "base", "current")]
    # Of every table of the signed-rank test: at 5 %, 8 samples have the critical value 3; the 4th of 36 means counts.
    logs = [1, 2, 4, 8, 16, 32, 64, 128]
    means = sorted((x + y) / 2 for i, x in enumerate(logs) for y in logs[: i + 1])
    found = interval([math.exp(x) for x in logs], 0.05)
    assert [math.log(x) for x in found] == pytest.approx([means[3], (means[17] + means[18]) / 2, means[-4]])
    assert interval([3, 1, 2, 6, 5, 4], 0.05)[::2] == pytest.approx((1, 6))
    assert fewest_rounds(0.05) == 6
    with pytest.raises(ValueError, match="--rounds 6"):
        interval([1.0] * 5, 0.05)
    assert verdict([Interval(0.97, 1, 1.04)], [], None, 0.05) == "same"
    assert verdict([Interval(0.97, 1, 1.06)], [], None, 0.05) == "unclear"
    assert widened(1) == widened(3200) == 0.05
    # Three sets miss on the one side with (error / 2)**3.
    assert 50_000 * (widened(50_000) / 2) ** 3 == pytest.approx(0.05)
    base = {"seconds": 1.0, "waited": 0.25}
    assert waiting(base, {"seconds": 2.0, "waited": 0.25}) == 1
    assert waiting(base, {"seconds": 1.0, "waited": 1.5}) == 2
    assert waiting(base, {"seconds": 0.5, "waited": 0.75}) == 1
