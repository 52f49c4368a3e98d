"""The overhead table: on the shapes model in two steps, and on architectures a thousandth of their size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Nothing is downloaded and nothing large is made: the encoders and the autoencoder keep their parts, at small sizes.
SMALL_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_UNET = {"sample_size": 16, "norm_num_groups": 4, "layers_per_block": 1}
SMALL_VAE = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "layers_per_block": 1}


def bench_run(*arguments: Any) -> int:
    from bench import __main__ as run

    status: int = run.main(["overhead", *map(str, arguments)])
    return status


SHAPES = ("--arch", "shapes", "--steps", 2, "--turns", 1)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of the table; those of the authors' code are `test_bench_official`'s."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["kind"] == "overhead"]


def test_every_form_is_a_row(bench: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "overhead.jsonl"
    assert bench_run(*SHAPES, "--methods", "AttendAndExcite", "AttentionRegulation", "--results", path) == 0
    rows = {(row["method"], row["form"]): row for row in read(path)}
    forms = ("published", "stock", "ours")
    expected = {(method, form) for method in ("AttendAndExcite", "AttentionRegulation") for form in forms}
    assert expected | {("plain", "plain")} <= rows.keys()
    for row in rows.values():
        assert {"run", "git", "dirty", "device", "threads", "versions"} <= row.keys()
        assert (row["kind"], row["arch"], row["size"], row["steps"], row["edited"]) == ("overhead", "shapes", 64, 2, 1)
    for key in expected:
        row = rows[key]
        assert row["median"] == row["seconds"][0] > 0 and row["overhead_percent"].keys() == {"median", "low", "high"}
        assert row["published_percent"] == {"AttendAndExcite": 414.6, "AttentionRegulation": 48.8}[row["method"]]
    for form in ("published", "stock"):
        difference = rows["AttendAndExcite", form]["difference"]
        assert difference["image"] < 1e-3 < difference["effect"]
        assert rows["AttentionRegulation", form]["difference"]["loss_percent"] < 0.1
    table = capsys.readouterr().out
    assert "| `AttendAndExcite` | published |" in table and "| +414.6 % |" in table
    assert "chaotic: loss differs by" in table and "shapes, trained weights, 64x64 pixels" in table


def test_json_prints_the_rows(bench: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "overhead.jsonl"
    chosen = ("--methods", "EnergyContext", "--forms", "ours", "--json")
    assert bench_run(*SHAPES, *chosen, "--batch", 2, "--results", path) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row for row in printed if row["kind"] == "overhead"] == read(path)
    assert [(row["method"], row["form"], row["batch"]) for row in read(path)] == [
        ("plain", "plain", 2),
        ("EnergyContext", "ours", 2),
    ]


def test_a_form_that_fails_is_a_row_with_its_error(
    bench: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.pictures import overhead

    def broken(_: Any) -> Any:
        raise RuntimeError("no such | luck")

    monkeypatch.setitem(overhead.RIVALS, "stock", {"EnergyContext": broken})
    path = tmp_path / "overhead.jsonl"
    chosen = ("--methods", "EnergyContext", "--forms", "stock", "ours")
    assert bench_run(*SHAPES, *chosen, "--results", path) == 0
    rows = {row["form"]: row for row in read(path)}
    assert rows["stock"]["failed"] == "RuntimeError: no such | luck" and "seconds" not in rows["stock"]
    assert rows["ours"]["seconds"]
    assert "| `EnergyContext` | stock | failed: RuntimeError: no such \\| luck |" in capsys.readouterr().out


def test_an_interrupt_keeps_what_was_measured(
    bench: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.pictures import overhead

    real, calls = overhead.RIVALS["stock"]["EnergyContext"], []

    def impatient(setting: Any) -> Any:
        calls.append(setting.steps)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(setting)

    monkeypatch.setitem(overhead.RIVALS, "stock", {"EnergyContext": impatient})
    path = tmp_path / "overhead.jsonl"
    chosen = ("--methods", "EnergyContext", "--forms", "stock", "ours", "--turns", 3)
    assert bench_run(*SHAPES, *chosen, "--results", path) == 130
    # Once without counting, a turn that counts, and one the other way round, interrupted after its first picture.
    rows = {row["form"]: row for row in read(path)}
    assert {form: len(row["seconds"]) for form, row in rows.items()} == {"plain": 1, "stock": 1, "ours": 2}
    assert all(row["overhead_percent"] for form, row in rows.items() if form != "plain")
    shown = capsys.readouterr()
    assert "| `EnergyContext` | stock |" in shown.out and "interrupted; what was measured is kept" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", "sd9"), "--arch is 'sd9'; it must be one of sd15, sd2, sdxl, shapes"),
        (("--methods", "Magic"), "--methods is 'Magic'; it must be one of AttentionRegulation"),
        (("--forms", "best"), "--forms is 'best'; it must be one of published, diffusers, stock, ours"),
        (("--dtype", "int8"), "--dtype is 'int8'"),
        (("--steps", "0"), "--steps is 0; it must be at least 1"),
        (("--steps", "4", "--edited", "5"), "--edited is 5; it must be 1 to 4"),
        (("--arch", "shapes", "--size", "65"), "--size is 65; for shapes it must be a multiple of 32"),
        (("--official-dir", "nowhere"), "nowhere"),
        (("--results", "FILE/below.jsonl"), "FILE"),
        (("--device", "abacus"), "--device 'abacus' is not to be had here"),
    ],
)
def test_mistakes_are_one_line(
    bench: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "FILE").write_text("")
    given = [x.replace("FILE", str(tmp_path / "FILE")) for x in arguments]
    if "--results" not in given:
        given += ["--results", str(tmp_path / "overhead.jsonl")]
    assert bench_run(*given) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and message.replace("FILE", str(tmp_path / "FILE")) in shown.err
    assert not shown.out and not list(tmp_path.glob("*.jsonl"))


def test_without_diffusers_the_extra_is_named(
    bench: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnctl_fast.cli import options
    from bench.pictures import overhead

    monkeypatch.setattr(options.util, "find_spec", lambda name: None if name == "diffusers" else object())
    assert bench_run("--results", tmp_path / "overhead.jsonl") == 2
    assert capsys.readouterr().err == (
        'attnctl-fast bench overhead: diffusers not installed; run: pip install "attnctl-fast[diffusers]"\n'
    )
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, overhead.tqdm.__module__.partition(".")[0], None)
    monkeypatch.delitem(sys.modules, "overhead")
    assert bench_run() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install -e '.[diffusers,bench]'" in err


def test_the_command_is_the_script(bench: None, capsys: pytest.CaptureFixture[str]) -> None:
    from attnctl_fast import cli

    assert cli.main(["bench", "overhead", "--arch", "sd9"]) == 2
    assert capsys.readouterr().err.startswith("attnctl-fast bench overhead: --arch is 'sd9'")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "bench" in capsys.readouterr().out


@pytest.fixture
def small(bench: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.pictures import architectures

    for name, config in architectures.CONFIGS.items():
        widths = (8, 8, 16, 16)[: len(config.get("block_out_channels", (0,) * 4))]
        heads = {"attention_head_dim": 2, "block_out_channels": widths, "cross_attention_dim": 16}
        if name == "sdxl":
            layers = {"transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 32}
            times = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 16}
            heads |= layers | times
        monkeypatch.setitem(architectures.CONFIGS, name, config | SMALL_UNET | heads)
        texts = [text | SMALL_TEXT for text in architectures.TEXT_CONFIGS[name]]
        texts = [text | {"projection_dim": 16} if "projection_dim" in text else text for text in texts]
        monkeypatch.setitem(architectures.TEXT_CONFIGS, name, texts)
    monkeypatch.setattr(architectures, "VAE_CONFIG", architectures.VAE_CONFIG | SMALL_VAE)


@pytest.mark.parametrize("arch", ["sd15", "sd2", "sdxl"])
def test_the_sampler_by_hand_is_the_pipeline(small: None, arch: str) -> None:
    from bench.pictures import architectures, sampling

    pipe = architectures.pipeline(arch)
    latents = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    setting = sampling.Setting(pipe, latents, 2, 1)
    images = sampling.sample(setting)
    assert images.shape == (2, 3, 64, 128) and images.std() > 0
    torch.testing.assert_close(images, sampling.call(setting), rtol=0, atol=0)
    assert setting.positions("blue square") == [6, 7] and setting.end() == 8


@pytest.mark.parametrize("arch", ["sd2", "sdxl"])
def test_every_form_on_every_architecture(small: None, tmp_path: Path, arch: str) -> None:
    path = tmp_path / "overhead.jsonl"
    assert bench_run("--arch", arch, "--size", 128, "--steps", 2, "--turns", 1, "--results", path) == 0
    rows = read(path)
    assert not [row for row in rows if "failed" in row]
    from bench.pictures import ours

    for form in ("published", "stock", "ours"):
        assert {row["method"] for row in rows if row["form"] == form} == set(ours.METHODS)
    assert ("AttendAndExcite", "diffusers") in {(row["method"], row["form"]) for row in rows} or arch == "sdxl"


def test_compiled_forms_draw_the_same(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By Dynamo alone, which notices what an arm changes; the other compilers take minutes. What is timed compiles
    nothing."""
    from bench.pictures import overhead

    compiled: list[Any] = []
    late: list[str] = []
    draw = overhead._draw

    def counted(arm: Any, setting: Any) -> None:
        before = len(compiled)
        draw(arm, setting)
        late.extend([f"{arm.method} {arm.form}"] * (len(compiled) - before))

    def compile(module: torch.nn.Module) -> None:
        def backend(graph: Any, _: Any) -> Any:
            compiled.append(module)
            return graph.forward

        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    monkeypatch.setattr(overhead, "_draw", counted)
    path = tmp_path / "overhead.jsonl"
    methods = ("AttentionRegulation", "DenseDiffusion")
    assert (
        bench_run("--arch", "sd2", "--size", 128, *SHAPES[2:], "--methods", *methods, "--compile", "--results", path)
        == 0
    )
    rows = {(row["method"], row["form"]): row for row in read(path)}
    assert len(compiled) > 1 and not late and all(row["compile"] for row in rows.values())
    for form in ("published", "stock"):
        assert rows["AttentionRegulation", form]["difference"]["loss_percent"] < 0.1


def test_no_form_at_all_is_a_mistake(bench: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        bench_run(*SHAPES, "--methods", "TSAM", "--forms", "diffusers", "--results", tmp_path / "overhead.jsonl") == 2
    )
    assert "there is no form diffusers of TSAM here" in capsys.readouterr().err


def test_peak_memory_is_what_was_taken_at_most(bench: None) -> None:
    from bench.harness.memory import peak_megabytes

    with peak_megabytes(torch.device("cpu")) as peak:
        torch.ones(64 << 20, dtype=torch.uint8)
        torch.ones(16 << 20, dtype=torch.uint8)
        taken = peak()
    if taken is None:
        pytest.skip("nobody counts memory here")
    assert 60 < taken < 90


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


def test_an_overhead_is_over_the_plain_picture_beside_it(bench: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.pictures import overhead

    arms = [[overhead.Arm("A", "stock", None), overhead.Arm("A", "ours", None)], [overhead.Arm("B", "ours", None)]]
    # In the order in which they are drawn: the second turn goes the other way round.
    seconds = iter([10.0, 11.0, 12.0, 20.0, 30.0, 15.0, 14.0, 10.0, 26.0, 40.0])
    order: list[tuple[str, str]] = []
    kept: list[list[tuple[str, int]]] = []

    def draw(arm: Any, _: Any) -> None:
        order.append((arm.method, arm.form))
        arm.seconds.append(next(seconds))
        arm.megabytes.append(100.0 + 7 * (arm.form == "ours"))
        arm.images = torch.full((1,), {"plain": 0.1, "stock": 0.3, "ours": 0.4}[arm.form])

    monkeypatch.setattr(overhead, "_draw", draw)
    monkeypatch.setattr(overhead, "_warm_up", lambda arm, setting: None)
    monkeypatch.setattr(overhead, "warm_ups", lambda setting: 1)
    plain = overhead.plain_arm()
    setting = overhead.Setting(None, torch.zeros(1, 4, 8, 8), 2, 1)
    monkeypatch.setattr(overhead, "_short", lambda setting: setting)

    def keep(group: Any) -> None:
        kept.append([(row["method"], len(row["seconds"])) for row in overhead.rows(plain, [group])])

    overhead.measure(setting, plain, arms, 2, lambda name: None, keep)
    assert order[:3] == [("plain", "plain"), ("A", "stock"), ("A", "ours")]
    assert order[5:] == [("A", "ours"), ("A", "stock"), ("plain", "plain"), ("B", "ours"), ("plain", "plain")]
    # Each method's rows as soon as it has drawn, with all that it drew until then.
    assert kept[0] == [("plain", 1), ("A", 1), ("A", 1)] and kept[1] == [("plain", 2), ("B", 1)]
    assert kept[3] == [("plain", 4), ("B", 2)]
    rows = {(row["method"], row["form"]): row for row in overhead.rows(plain, arms)}
    assert rows["plain", "plain"]["overhead_percent"] is None and rows["plain", "plain"]["median"] == 15.0
    assert rows["A", "stock"]["overhead_percent"] == pytest.approx({"median": 25.0, "low": 10.0, "high": 40.0})
    assert rows["A", "ours"]["overhead_percent"] == pytest.approx({"median": 35.0, "low": 20.0, "high": 50.0})
    assert rows["B", "ours"]["overhead_percent"] == pytest.approx({"median": 7.5, "low": -35.0, "high": 50.0})
    assert rows["A", "ours"]["extra_mb"] == 7.0 and rows["A", "stock"]["extra_mb"] == 0.0
    assert rows["A", "stock"]["difference"] == pytest.approx({"image": 0.1, "effect": 0.3}, rel=1e-5)


def test_turns_go_on_while_a_method_fits_into_the_time(bench: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.pictures import overhead

    arms = [[overhead.Arm("A", "stock", None), overhead.Arm("A", "ours", None)], [overhead.Arm("B", "ours", None)]]
    now = [0.0]

    def draw(arm: Any, _: Any) -> None:
        now[0] += 10
        arm.seconds.append(10.0)

    monkeypatch.setattr(overhead.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(overhead, "_draw", draw)
    monkeypatch.setattr(overhead, "_warm_up", lambda arm, setting: None)
    monkeypatch.setattr(overhead, "warm_ups", lambda setting: 1)
    monkeypatch.setattr(overhead, "_short", lambda setting: setting)
    setting = overhead.Setting(None, torch.zeros(1, 4, 8, 8), 2, 1)
    overhead.measure(setting, overhead.plain_arm(), arms, 9, lambda name: None, lambda group: None, until=95.0)
    # A takes 30 s and B 20: the second turn has no time for B.
    assert [len(arm.seconds) for group in arms for arm in group] == [2, 2, 1] and now[0] == 80


def test_the_last_row_of_a_form_in_a_run_counts(bench: None, tmp_path: Path) -> None:
    from bench.pictures import overhead_rows

    path = tmp_path / "overhead.jsonl"
    chosen = ("--methods", "EnergyContext", "AttendAndExcite", "--forms", "ours")
    assert bench_run(*SHAPES[:-1], 2, *chosen, "--results", path) == 0
    written = read(path)
    assert [(row["method"], len(row["seconds"])) for row in written] == [
        *(("plain", 1), ("EnergyContext", 1), ("plain", 2), ("AttendAndExcite", 1)),
        *(("plain", 3), ("EnergyContext", 2), ("plain", 4), ("AttendAndExcite", 2)),
    ]
    shown = overhead_rows.select_overhead(written)
    assert sorted((row["method"], len(row["seconds"])) for row in shown) == [
        ("AttendAndExcite", 2),
        ("EnergyContext", 2),
        ("plain", 4),
    ]
