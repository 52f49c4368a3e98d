"""What methods add to a step, by a clock that the work itself moves, on UNets a thousandth of the size."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench.harness.intervals import confident
from bench.pictures import architectures, contest, ours, overhead, sampling, stopwatch
from bench.pictures.attention_layers import layers_of, replaced
from bench.pictures.contest import Added, Arm, Contest
from bench.pictures.overhead_rows import KIND, select_overhead
from bench.pictures.still import Still
from tests.support.architectures import small


@pytest.fixture(scope="module")
def pipes() -> Iterator[Callable[[str], Any]]:
    """Pipelines of the real structure at small widths, each made once."""
    made: dict[str, Any] = {}
    with small() as patch:
        real = architectures.pipeline

        def once(name: str, *options: Any) -> Any:
            if name not in made or len(options) > 1 and options[1] != torch.float32:
                made[name] = real(name, *options)
            return made[name]

        patch.setattr(architectures, "pipeline", once)
        yield once


@pytest.fixture
def setting(pipes: Callable[[str], Any]) -> sampling.Setting:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return sampling.Setting(pipes("sd2"), latents, 1, 1)


class Clock:
    """Stands still but for what `works` says."""

    def __init__(self) -> None:
        self.now = 0.0

    def works(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (stopwatch, contest, overhead):
        monkeypatch.setattr(module, "time", found)
    return found


@pytest.fixture
def costly(setting: sampling.Setting, clock: Clock) -> Iterator[list[str]]:
    """Every ResNet block takes a second and every attention layer a tenth; the names of those that ran."""
    ran: list[str] = []
    handles = []
    attention = {layer.module for layer in layers_of(setting.pipe).values()}
    for name, module in setting.pipe.unet.named_modules():
        seconds = 1.0 if type(module).__name__ == "ResnetBlock2D" else 0.1 if module in attention else 0.0
        if seconds:
            processor = module.conv1 if seconds == 1.0 else module.to_q

            def work(*_: Any, name: str = name, seconds: float = seconds) -> None:
                ran.append(name)
                clock.works(seconds)

            handles.append(processor.register_forward_hook(work))
    yield ran
    for handle in handles:
        handle.remove()


def left_behind(pipe: Any) -> list[str]:
    """Attributes that stand in for methods."""
    parts = {"pipe": pipe, "vae": pipe.vae, "scheduler": pipe.scheduler, **dict(pipe.unet.named_modules())}
    names = ("forward", "encode_prompt", "decode", "step", "set_timesteps")
    return [f"{part}.{name}" for part, owner in parts.items() for name in names if name in vars(owner)]


class Slow:
    """A processor that takes a quarter of a second more."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self.inner, self.clock = inner, clock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.works(0.25)
        return self.inner(*args, **kwargs)


def slow(setting: sampling.Setting, clock: Clock) -> sampling.Drawn:
    layers = layers_of(setting.pipe, cross=True)
    with replaced(layers, {name: Slow(layer.module.processor, clock) for name, layer in layers.items()}):
        return sampling.Drawn(sampling.sample(setting))


def guided(setting: sampling.Setting, clock: Clock) -> sampling.Drawn:
    """One more evaluation before each step, of one row."""

    def before(latents: Any, step: int, timestep: Any, text: Any) -> Any:
        with torch.enable_grad():
            sampling.evaluate(setting, latents, timestep, text)
        return latents

    return sampling.Drawn(sampling.sample(setting, before=before))


def doubled(setting: sampling.Setting, clock: Clock) -> sampling.Drawn:
    """Two evaluations of one row in place of one of two."""

    def predict(latents: Any, step: int, timestep: Any, negative: Any, positive: Any) -> Any:
        return sum(sampling.evaluate(setting, latents, timestep, text) for text in (negative, positive))

    return sampling.Drawn(sampling.sample(setting, predict=predict))


@pytest.mark.parametrize("form", [slow, guided, doubled])
def test_standing_still_leaves_the_added_part_as_it_is(
    setting: sampling.Setting, clock: Clock, costly: list[str], form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "MOST", 4)
    found, ran = {}, {}
    for still in (False, True):
        arm = Arm("EnergyContext", "stock", lambda x: form(x, clock))
        race = Contest(setting, still=still)
        with race.running():
            race.time_plain()
            if still:
                arm.touched = race._still.touched(lambda: form(setting, clock), 2)
            costly.clear()
            race.race([arm], until=clock.now + 1e9)
        found[still], ran[still] = arm.added, set(costly)
        assert race.plain == pytest.approx([race.plain[0]] * 3) and race.plain[0] > 10
    cross = layers_of(setting.pipe, cross=True)
    assert len(found[True]) >= 3
    for one in (*found[False], *found[True]):
        assert one == pytest.approx(found[False][0], abs=1e-6)
    assert found[True][0].once == found[True][0].resting == 0
    whole = {"slow": 0.25 * len(cross), "guided": race.plain[0], "doubled": race.plain[0]}[form.__name__]
    assert found[True][0].edited == pytest.approx(whole)
    if form is slow:
        assert arm.touched == frozenset(cross) and ran[True] == set(cross) < ran[False]
    assert arm.touched == {"slow": frozenset(cross), "guided": frozenset(), "doubled": None}[form.__name__]
    assert not left_behind(setting.pipe)


def test_what_a_form_touches_is_seen(setting: sampling.Setting) -> None:
    still = Still(setting.pipe)
    draws = {
        "hook": contest.RIVALS["published"]["AttentionRegulation"],
        "engine": lambda x: ours.draw("AttentionRegulation", x),
        "processors": contest.RIVALS["published"]["EnergyContext"],
        "pass": lambda x: ours.draw("AttendAndExcite", x),
    }
    larger = replace(setting, latents=torch.randn(1, 4, 16, 16))
    found = {name: still.touched(lambda draw=draw: draw(larger), 2) for name, draw in draws.items()}
    assert found["hook"] == found["engine"] and found["hook"] and all("attn2" in name for name in found["hook"])
    assert found["processors"] == frozenset(layers_of(setting.pipe)) and found["pass"] == frozenset()
    assert not left_behind(setting.pipe)


def test_still_parts_return_what_was_recorded(setting: sampling.Setting) -> None:
    still = Still(setting.pipe)
    still.record(setting)
    timestep, text = torch.tensor(500), torch.randn(2, 77, 16)
    unet = setting.pipe.unet
    with torch.no_grad():
        real = [unet(torch.randn(2, 4, 8, 8), timestep, text).sample for _ in range(2)]
        with still.around(()):
            same = [unet(torch.randn(2, 4, 8, 8), timestep, text).sample.clone() for _ in range(3)]
    assert not torch.equal(*real) and torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    with pytest.raises(RuntimeError, match="no luck"), still.around(()):
        raise RuntimeError("no luck")
    assert not left_behind(setting.pipe)


@pytest.mark.parametrize("arch", ["sd15", "sd2", "sdxl"])
def test_the_sampler_by_hand_is_the_pipeline(pipes: Callable[[str], Any], arch: str) -> None:
    latents = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    task = sampling.Setting(pipes(arch), latents, 2, 1)
    images = sampling.sample(task)
    assert images.shape == (2, 3, 64, 128) and images.std() > 0
    torch.testing.assert_close(images, sampling.call(task), rtol=0, atol=0)
    assert task.positions("blue square") == [6, 7] and task.end() == 8


@pytest.mark.parametrize("arch", ["sd2", "sdxl"])
def test_every_form_draws_the_same_picture(pipes: Callable[[str], Any], arch: str) -> None:
    task = sampling.Setting(pipes(arch), torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 1, 1)
    forms = contest.arms(task, ours.METHODS, ("published", "diffusers", "stock", "ours"))
    race = Contest(task, still=True)
    with race.running():
        for group in forms:
            race.check(group, task)
    every = [arm for group in forms for arm in group]
    assert not [(arm.method, arm.form, arm.failed) for arm in every if arm.failed is not None]
    assert len(every) == 33 + (arch == "sd2") and all(arm.difference for arm in every if arm.form != "ours")


def bench_run(*arguments: Any) -> int:
    return command.main(["overhead", *map(str, arguments)])


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of the table; those of the authors' code are `test_bench_official`'s."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["kind"] == KIND]


TINY = ("--arch", "sd2", "--size", 128, "--seconds", 1000)


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch, pipes: Any) -> None:
    monkeypatch.setattr(contest, "MOST", 3)
    monkeypatch.setattr(contest, "MOST_STEPS", 1)


def test_every_form_is_a_row(few_rounds: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "overhead.jsonl"
    methods = ("AttendAndExcite", "AttentionRegulation", "ComposableDiffusion")
    assert bench_run(*TINY, "--methods", *methods, "--forms", "published", "ours", "--results", path) == 0
    rows = {(row["method"], row["form"]): row for row in read(path)}
    assert list(rows) == [
        ("plain", "plain"),
        *((method, form) for method in ("AttentionRegulation",) for form in ("published", "ours")),
        *((method, form) for method in methods[::2] for form in ("published", "ours")),
    ]
    for row in rows.values():
        assert {"run", "git", "dirty", "device", "threads", "versions"} <= row.keys() and "failed" not in row
        assert (row["arch"], row["size"], row["dtype"], row["still"]) == ("sd2", 128, "float32", True)
    plain = rows.pop(("plain", "plain"))
    for (method, _), row in rows.items():
        assert row["edited"] == {"ComposableDiffusion": 50}.get(method, 25)
        assert row["rounds"] == len(row["samples"]) == 2 and not row["ranks"]
        for name in ("step", "image", "percent"):
            assert row[name]["low"] <= row[name]["middle"] <= row[name]["high"]
        images = [once + row["edited"] * at + (50 - row["edited"]) * rest for at, rest, once in row["samples"]]
        assert row["image"]["middle"] == pytest.approx(sum(images) / 2)
        share = 100 * row["image"]["middle"] / 50 / plain["step"]["middle"]
        assert row["percent"]["middle"] == pytest.approx(share)
    assert rows["AttendAndExcite", "published"]["published_percent"] == 414.6
    shown = capsys.readouterr()
    assert "| `AttendAndExcite` | published |" in shown.out and "| +414.6 % |" in shown.out
    assert "chaotic: loss differs by" in shown.out and "sd2, random weights, 128x128 pixels" in shown.out
    assert shown.err.startswith("about 1000 s")


def test_a_form_that_fails_or_draws_another_picture_is_not_timed(
    few_rounds: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []

    def broken(setting: sampling.Setting) -> sampling.Drawn:
        raise RuntimeError("no such | luck")

    def other(setting: sampling.Setting) -> sampling.Drawn:
        drawn.append(setting)
        return sampling.Drawn(sampling.sample(replace(setting, latents=0.9 * setting.latents)))

    monkeypatch.setitem(contest.RIVALS, "stock", {"Composition": broken})
    monkeypatch.setitem(contest.RIVALS, "published", {"Composition": other})
    path = tmp_path / "overhead.jsonl"
    assert bench_run(*TINY, "--batch", 2, "--methods", "Composition", "--results", path) == 0
    rows = {row["form"]: row for row in read(path)}
    assert all(row["batch"] == 2 for row in rows.values())
    assert rows["stock"]["failed"] == "RuntimeError: no such | luck" and "step" not in rows["stock"]
    assert rows["published"]["failed"].startswith("draws another picture: latent ") and len(drawn) == 1
    assert rows["ours"]["step"]
    assert "| `Composition` | stock | failed: RuntimeError: no such \\| luck |" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_kill_keeps_what_was_measured(
    few_rounds: None,
    pipes: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    path = tmp_path / "overhead.jsonl"
    real, calls = contest.RIVALS["stock"]["Composition"], []

    def killed(setting: sampling.Setting) -> sampling.Drawn:
        calls.append(len(read(path)))
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(setting)

    monkeypatch.setattr(contest, "LONG", 0.0)
    monkeypatch.setitem(contest.RIVALS, "stock", contest.RIVALS["stock"] | {"Composition": killed})
    chosen = ("--methods", "EnergyContext", "Composition", "--forms", "stock", "--results", path)
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as left:
            bench_run(*TINY, *chosen)
        assert left.value.code == 128 + number
    else:
        # A shell has its jobs in the background ignore it, and so what runs within.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            assert bench_run(*TINY, *chosen) == 130
        finally:
            signal.signal(signal.SIGINT, before)
    # Composition was checked, had its first round, and was ended in the second; what came before is there.
    assert calls == [1, 2, 2]
    assert [row["method"] for row in read(path)] == ["plain", "EnergyContext"]
    assert "| `EnergyContext` | stock |" in capsys.readouterr().out
    assert not left_behind(pipes("sd2"))


def test_what_the_time_has_no_room_for_is_named(
    few_rounds: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "overhead.jsonl"
    chosen = ("--methods", "EnergyContext", "Composition", "--forms", "ours", "--seconds", 0, "--results", path)
    assert bench_run("--arch", "sd2", "--size", 128, *chosen) == 0
    assert [row["method"] for row in read(path)] == ["plain"]
    assert "left out, as the time was up: EnergyContext ours, Composition ours" in capsys.readouterr().err


def arm(*added: Added, method: str = "AttentionRegulation") -> Arm:
    return Arm(method, "ours", lambda setting: sampling.Drawn(setting.latents), added=list(added))


def test_a_picture_has_edited_steps_resting_ones_and_a_call() -> None:
    row = overhead.row(arm(Added(2.0, 0.1, 3.0), Added(2.0, 0.1, 3.0)), plain=4.0)
    # 25 of 50 steps are edited.
    assert row["image"]["middle"] == pytest.approx(3 + 50 + 2.5) and row["percent"]["middle"] == pytest.approx(27.75)
    steps = {name: ours.edited_steps(name, 50) for name in ours.METHODS}
    assert steps == {
        **{"AttentionRegulation": 25, "EnergyContext": 50, "Composition": 50, "AttendAndExcite": 25},
        **{"DenseDiffusion": 15, "ComposableDiffusion": 50, "SynGen": 25, "TSAM": 30, "CONFORM": 30},
        **{"FOCUS": 50, "NAG": 50},
    }


def test_a_difference_that_may_be_zero_is_shown_as_such() -> None:
    common = {"kind": KIND, "arch": "sd2", "size": 512, "dtype": "float32", "batch": 1, "compile": False, "git": "abc"}
    common |= {"still": True, "dirty": False, "device": "a CPU", "threads": 2, "versions": {"torch": "2"}}
    plain = {**common, "method": "plain", "form": "plain", "step": {"middle": 4.0}}
    rows = [plain]
    for noise in (0.5, 3.0):
        made = arm(*(Added(1.0 + noise * sign, 0.0, 0.0) for sign in (-1, 1) * 4))
        rows.append({**common, **overhead.row(made, plain=4.0)})
    told, unknown = overhead.overhead_table(rows).splitlines()[2:4]
    assert "| +1.0 (+0.50 to +1.5) | +25 (+12 to +38) | +12 % (+6.2 to +19) |" in told
    assert "| not distinguishable from zero (-2.0 to +4.0) |" in unknown


def test_intervals_of_few_and_of_many() -> None:
    assert confident([1.0, 3.0]) == pytest.approx((2 - 12.706, 2, 2 + 12.706))
    assert confident([1.0, 2.0, 3.0])[2] == pytest.approx(2 + 4.303 / 3**0.5)
    assert confident([3, 1, 2, 6, 5, 4])[::2] == (1, 6) and confident([-1.0] * 9) == (-1, -1, -1)
    with pytest.raises(ValueError, match="one round has no interval"):
        confident([1.0])


def test_the_commit_with_most_forms_is_shown() -> None:
    common = {"kind": KIND, "arch": "sd2", "size": 512, "dtype": "float32", "batch": 1, "compile": False}
    common |= {"device": "a CPU", "threads": 2, "versions": {}, "git": "1", "dirty": False}
    rows = [
        {**common, "run": run, "method": method, "form": "ours", **more}
        for run, method, more in [("1", "A", {}), ("1", "B", {}), ("2", "A", {}), ("2", "B", {"failed": "no"})]
    ]
    other = {**rows[0], "git": "2", "run": "3"}
    assert [row["run"] for row in select_overhead([*rows, other, {"kind": "official"}])] == ["2", "1"]
    changed = [{**row, "dirty": True} for row in rows]
    assert [row["run"] for row in select_overhead([*changed, other])] == ["1", "1"]
    assert [row["arch"] for row in select_overhead([{**rows[0], "arch": "shapes"}, *rows[:1]])] == ["sd2"]
    assert select_overhead([{**row, "failed": "no"} for row in rows]) == []


@pytest.mark.full
def test_compiled_forms_are_timed_when_all_is_compiled(
    few_rounds: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: sampling.Setting
) -> None:
    """By Dynamo alone, which notices what an arm changes; the other compilers take minutes."""
    compiled: list[Any] = []
    late: list[str] = []
    timed = Contest._timed

    def counted(self: Contest, arm: Arm) -> Any:
        before = len(compiled)
        result = timed(self, arm)
        if arm.added:
            late.extend([f"{arm.method} {arm.form}"] * (len(compiled) - before))
        return result

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    def compile(module: torch.nn.Module) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    monkeypatch.setattr(Contest, "_timed", counted)
    path = tmp_path / "overhead.jsonl"
    chosen = ("--methods", "AttentionRegulation", "--forms", "published", "ours", "--compile", "--results", path)
    try:
        assert bench_run(*TINY, *chosen) == 0
    finally:
        setting.pipe.unet._compiled_call_impl = None
    assert len(compiled) > 1 and not late
    assert all(row["compile"] and not row["still"] and "failed" not in row for row in read(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", "sd9"), "--arch is 'sd9'; it must be one of sd15, sd2, sdxl, shapes"),
        (("--methods", "Magic"), "--methods is 'Magic'; it must be one of AttentionRegulation"),
        (("--forms", "best"), "--forms is 'best'; it must be one of published, diffusers, stock, ours"),
        (("--dtype", "int8"), "--dtype is 'int8'"),
        (("--batch", "0"), "--batch is 0; it must be at least 1"),
        (("--arch", "shapes", "--size", "65"), "--size is 65; for shapes it must be a multiple of 32"),
        (("--official-dir", "nowhere"), "nowhere"),
        (("--results", "FILE/below.jsonl"), "FILE"),
        (("--device", "abacus"), "--device 'abacus' is not to be had here"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "FILE").write_text("")
    given = [x.replace("FILE", str(tmp_path / "FILE")) for x in arguments]
    if "--results" not in given:
        given += ["--results", str(tmp_path / "overhead.jsonl")]
    assert bench_run(*given) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and message.replace("FILE", str(tmp_path / "FILE")) in shown.err
    assert not shown.out and not list(tmp_path.glob("*.jsonl"))


def test_no_form_at_all_is_a_mistake(pipes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--methods", "TSAM", "--forms", "diffusers", "--results", tmp_path / "overhead.jsonl")
    assert bench_run(*TINY, *chosen) == 2
    assert "there is no form diffusers of TSAM here" in capsys.readouterr().err


def test_without_diffusers_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnctl_fast.cli import options

    with monkeypatch.context() as patch:
        patch.setattr(options.util, "find_spec", lambda name: None if name == "diffusers" else object())
        assert bench_run("--results", tmp_path / "overhead.jsonl") == 2
    assert capsys.readouterr().err == (
        'attnctl-fast bench overhead: diffusers not installed; run: pip install "attnctl-fast[diffusers]"\n'
    )
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        # The package remembers its modules too; both forget this one, and both know it again afterwards.
        patch.delitem(sys.modules, "bench.pictures.overhead")
        patch.delattr("bench.pictures.overhead")
        patch.setitem(sys.modules, "tqdm", None)
        assert bench_run() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install -e '.[diffusers,bench]'" in err


def test_the_command_is_the_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from attnctl_fast import cli

    ran: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda path, argv, environment: ran.append(argv))
    cli.main(["bench", "overhead", "--arch", "sd9"])
    assert ran == [[sys.executable, "-m", "bench", "overhead", "--arch", "sd9"]]
    assert bench_run("--arch", "sd9") == 2
    assert capsys.readouterr().err.startswith("attnctl-fast bench overhead: --arch is 'sd9'")


def test_without_a_checkout_the_command_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnctl_fast import cli

    installed = tmp_path / "site-packages" / "attnctl_fast" / "cli" / "main.py"
    monkeypatch.setattr(sys.modules["attnctl_fast.cli.main"], "__file__", str(installed))
    assert cli.main(["bench", "overhead"]) == 2
    assert capsys.readouterr().err == (
        "attnctl-fast bench: the benchmarks are in the repository; run it from a checkout\n"
    )
