"""The parser of `attnctl-fast`, its options, and the commands that draw nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnctl_fast
from attnctl_fast import cli
from attnctl_fast.cli import method_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--token-weights", "bag=x"),
            "must be WORD=FACTOR with a factor of at least 0, such as crown=2.5, got 'bag=x'",
        ),
        (("--token-weights", "=2"), "must be WORD=FACTOR with a factor of at least 0, such as crown=2.5, got '=2'"),
        (("--token-weights", "bag=-1"), "such as crown=2.5, got 'bag=-1'"),
        (("--steps", "many"), "must be a whole number of at least 1, got 'many'"),
        (("--seed", "1.5"), "must be a whole number from 0 to 2**63 - 1, got '1.5'"),
        (("--guidance-scale", "nan"), "must be a finite number, got 'nan'"),
        (("--scale", "much"), "must be a finite number of at least 0, got 'much'"),
        (("--edit-start", "half"), "must be a number from 0 to 1, got 'half'"),
        (("--pairs", "red"), "must be MODIFIER:NOUN, such as red:ball or big:red:ball, got 'red'"),
        (("--groups", "red++ball"), "must be words with '+' between them, got 'red++ball'"),
        (("--masks", "ball"), "must be PHRASE=FILE, such as ball=ball.png, got 'ball'"),
        (("--boxes", "ball=0,0,1"), "such as ball=0,0.5,0.4,1 for the lower left, got 'ball=0,0,1'"),
        (("--boxes", "ball=0.5,0,0.5,1"), "must be PHRASE=LEFT,TOP,RIGHT,BOTTOM in shares of the picture"),
    ],
)
def test_a_wrong_value_is_named_with_the_remedy(capsys, options, message):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--model", "m", "--prompt", "p", *options])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"argument {options[0]}: {message}") or message in line, line
    assert "invalid" not in line


def test_the_table_of_methods_fits_their_classes():
    for name, method in method_options.METHODS.items():
        assert set(method.options) <= method_options.OPTIONS.keys() and set(method.needs) <= set(method.options), name
        cls = getattr(attnctl_fast.methods, method.cls)
        assert ("convention" in method.options) <= (hasattr(cls, "official") and hasattr(cls, "paper")), name
    assert all(method_options.methods_with(option) for option in method_options.OPTIONS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", "m", "--prompt", "p", "--method", "paint"],
        ["generate", "--model", "m", "--prompt", "p", "--method", "energy", "--token-weights", "crown"],
        ["generate", "--model", "m", "--prompt", "p", "--method", "compose", "--edit-start", "2"],
        ["generate", "--model", "m", "--prompt", "p", "--method", "syngen", "--pairs", "red"],
        ["generate", "--model", "m", "--prompt", "p", "--method", "conform", "--groups", "red++ball", "dog"],
        ["generate", "--model", "m", "--prompt", "p", "--targets", "t", "--num-images", "0"],
        ["maps", "--model", "m"],
        ["generate", "--model", "m", "--prompt", "p", "--targets", "t", "--strength", "-1"],
        ["generate", "--model", "m", "--prompt", "p", "--targets", "t", "--seed", "-1"],
        ["generate", "--model", "m", "--prompt", "p", "--targets", "t", "--dtype", "int8"],
        ["demo", "--count", "none"],
        ["paint"],
        [],
    ],
)
def test_wrong_usage_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: attnctl-fast" in capsys.readouterr().err


def test_missing_extras_are_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "diffusers" else object())
    assert cli.main(["demo"]) == 2
    assert 'diffusers not installed; run: pip install "attnctl-fast[diffusers]"' in capsys.readouterr().err


def test_version_and_info(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"attnctl-fast {attnctl_fast.__version__}\n"
    assert cli.main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__ and lines["implementation"] in ("reference", "eager", "triton")


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "attnctl_fast", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"attnctl-fast {attnctl_fast.__version__}\n")
    done = subprocess.run([sys.executable, "-m", "attnctl_fast"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_nothing_below_imports_the_command_or_the_sweep():
    package = Path(attnctl_fast.__file__).parent
    for path in package.rglob("*.py"):
        name = path.relative_to(package)
        imported = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
        ]
        # `..cli` seen from a room, `.cli` from the package itself.
        rooms = {(node.module or "").split(".")[0] for node in imported if node.level == len(name.parts)}
        if name.parts[0] != "evaluate" and name.name != "__main__.py":
            assert not rooms & {"cli", "evaluate"}, name
