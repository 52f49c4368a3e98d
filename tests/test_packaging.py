"""What gets installed, what importing it imports, and that `kernels/` never stands in for Hugging Face's package."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
EXTRAS = ("", "diffusers", "evaluate", "bench", "docs", "test")


def run(*command, cwd, **environment):
    """Run offline, away from the settings of an enclosing make or interpreter, and return the standard output."""
    dropped = {"PYTHONPATH", "PYTHONSAFEPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code, *, cwd, **environment):
    return run(sys.executable, "-c", code, cwd=cwd, **environment)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the package is built from, so that building leaves nothing behind in the repository."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("attnctl_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build_wheel(source, folder):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_wheel_holds_every_file_of_the_package(wheel):
    names = names_in(wheel)
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "attnctl_fast").rglob("*.py")}
    expected |= {f"attnctl_fast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    configurations = {path.name for path in (ROOT / "kernels" / "configs").glob("*.json")}
    assert "default.json" in configurations
    expected |= {f"attnctl_fast/kernels/configs/{name}" for name in configurations}
    weights = [path for path in (ROOT / "attnctl_fast" / "shapes" / "weights").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in weights)
    expected |= {f"attnctl_fast/evaluate/report.{kind}" for kind in ("html", "css", "js")}
    expected |= {path.relative_to(ROOT).as_posix() for path in weights}
    assert expected | {"attnctl_fast/py.typed", "attnctl_fast/kernels/README.md"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_puts_nothing_beside_the_package(wheel):
    assert {name.split("/")[0].split("-")[0] for name in names_in(wheel)} == {"attnctl_fast"}
    assert "attnctl_fast/kernels/__init__.py" not in names_in(wheel)


def test_sdist_builds_the_same_wheel(checkout, wheel, tmp_path):
    code = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = (tmp_path / "source").iterdir()
    (tmp_path / "wheel").mkdir()
    assert names_in(build_wheel(source, tmp_path / "wheel")) == names_in(wheel)


LOCATE = """
import importlib.util, json, attnctl_fast, attnctl_fast.kernels
spec = importlib.util.find_spec("kernels")
print(json.dumps({
    "package": attnctl_fast.__file__,
    "kernels": list(attnctl_fast.kernels.__path__),
    "file": getattr(attnctl_fast.kernels, "__file__", None),
    "theirs": None if spec is None else spec.origin,
    "found": spec is not None,
}))
"""


def test_installed_wheel_imports_kernels(wheel, tmp_path):
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    where = json.loads(python(LOCATE, cwd=tmp_path, PYTHONPATH=str(target)))
    assert Path(where["package"]) == target / "attnctl_fast" / "__init__.py"
    assert where["kernels"] == [str(target / "attnctl_fast" / "kernels")]
    assert where["file"] is None


@pytest.mark.parametrize("mode", ["default", "strict", "compat"])
def test_editable_install_imports_kernels(mode, checkout, tmp_path):
    source = shutil.copytree(checkout, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    target = tmp_path / "site"
    settings = [] if mode == "default" else ["--config-settings", f"editable_mode={mode}"]
    options = ["--no-deps", "--no-build-isolation", "--target", target, *settings]
    run(sys.executable, "-m", "pip", "install", *options, "--editable", source, cwd=tmp_path)
    # .pth files only count in site folders; -S keeps out whatever this environment has installed.
    code = f"import sys, site; site.addsitedir({str(target)!r})\n" + LOCATE
    where = json.loads(run(sys.executable, "-S", "-c", code, cwd=tmp_path))
    assert Path(where["package"]).resolve().is_relative_to(source.resolve())
    assert {Path(path).resolve().is_relative_to(source.resolve()) for path in where["kernels"]} == {True}
    assert where["file"] is None
    # Only the compat mode puts the checkout itself on the path.
    assert where["found"] == (mode == "compat") and where["theirs"] is None


def test_uninstalled_checkout_imports_kernels_which_are_no_module_of_that_name():
    where = json.loads(python(LOCATE, cwd=ROOT))
    assert Path(where["package"]) == ROOT / "attnctl_fast" / "__init__.py"
    assert where["kernels"] == [str(ROOT / "kernels")]
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not where["theirs"] or not Path(where["theirs"]).is_relative_to(ROOT)


def test_kernels_package_of_hugging_face_wins_at_the_root(tmp_path):
    theirs = tmp_path / "kernels" / "__init__.py"
    theirs.parent.mkdir()
    theirs.write_text("")
    # With -c, the current folder stands before PYTHONPATH: the order in which a folder of ours could shadow theirs.
    code = "import sys; assert not sys.path[0]; import attnctl_fast.kernels, kernels; print(kernels.__file__)"
    assert python(code, cwd=ROOT, PYTHONPATH=str(tmp_path)).strip() == str(theirs)


def test_hugging_face_libraries_import_at_the_root():
    code = (
        "from diffusers import StableDiffusionPipeline\n"
        "from diffusers.utils import is_kernels_available as diffusers_finds\n"
        "from transformers import CLIPTextModel\n"
        "from transformers.utils import is_kernels_available as transformers_finds\n"
        "print(diffusers_finds() or transformers_finds())\n"
    )
    found = python(code, cwd=ROOT).splitlines()[-1] == "True"
    assert not found or any(package.name == "kernels" for package in distributions())


IMPORTED = """
import importlib, sys, json, torch
before = set(sys.modules)
for name in ("attnctl_fast", "attnctl_fast.ops", "attnctl_fast.cli"):
    importlib.import_module(name)
    print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
print(torch.cuda.is_initialized())
"""


def test_importing_imports_nothing_else_and_needs_no_extra():
    *lines, cuda = python(IMPORTED, cwd=ROOT).splitlines()
    package, operations, commands = map(json.loads, lines)
    assert "attnctl_fast" in package
    assert [name for name in package if name not in {"attnctl_fast", *sys.stdlib_module_names}] == []
    for new in (operations, commands):
        assert not {"triton", "diffusers", "transformers", "PIL", "tqdm"} & set(new)
    assert cuda == "False"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what import and find_spec take for a module that is not there
import torch, attnctl_fast as ac
from attnctl_fast import ops
q, k, v = torch.rand(3, 1, 2, 16, 8).unbind()
stats = ops.target_statistics(q, k, v, [3], pinned_ids=[0])
ops.merge_targets(stats, v, [3], ops.regulate(stats, (4, 4)).bias, pinned_ids=[0])
for refused in (lambda: ops.attention(q, k, v, impl="triton"), lambda: ac.use("triton").__enter__()):
    try:
        refused()
    except ValueError as error:
        print(error)
"""


def test_without_triton_all_but_its_kernels_works():
    said = python(WITHOUT_TRITON, cwd=ROOT, ATTNCTL_IMPL="").splitlines()
    assert said == ["impl is 'triton', but Triton is not installed: pip install triton, or use 'eager'"] * 2


def test_the_implementation_of_the_environment_needs_triton_too():
    code = (
        WITHOUT_TRITON.partition("stats = ")[0] + "try:\n    ops.attention(q, k, v)\nexcept ValueError as e: print(e)"
    )
    said = python(code, cwd=ROOT, ATTNCTL_IMPL="triton")
    assert said.startswith("the environment variable ATTNCTL_IMPL is 'triton', but Triton is not installed")


def test_triton_on_a_cpu_says_how_to_run_it_there():
    code = "import torch; from attnctl_fast import ops; ops.attention(*torch.rand(3, 1, 2, 4, 8), impl='triton')"
    code = f"try:\n    {code}\nexcept ValueError as e: print(e)"
    said = python(code, cwd=ROOT, TRITON_INTERPRET="")
    assert "the tensors are on cpu" in said and "TRITON_INTERPRET=1" in said and "'eager'" in said


def test_console_script_is_the_command_line(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "attnctl-fast = attnctl_fast.cli:main" in archive.read(entry).decode()


def requirements_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(entry).decode())
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


def test_the_core_needs_torch_and_numpy_only(wheel):
    core = {r.name for r in requirements_of(wheel) if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert core == {"torch", "numpy"}


def test_every_requirement_is_pinned_for_every_python(wheel):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for version in PYTHONS:
        here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": version})]
        pinned = {pin.name: str(pin.specifier) for pin in here}
        assert len(pinned) == len(here), f"two pins for one package on Python {version}"
        assert all(specifier.startswith("==") for specifier in pinned.values())
        for wanted in requirements_of(wheel):
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in EXTRAS):
                assert wanted.specifier.contains(pinned[wanted.name].removeprefix("==")), (version, wanted)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
@pytest.mark.parametrize("found", ["Python 3.9.18", "Python 3.14.0", None])
def test_make_names_the_versions_it_works_with(found, tmp_path):
    interpreter = tmp_path / "python"
    if found:
        interpreter.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{found}"\nexit 1\n')
        interpreter.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", f"PYTHON={interpreter}", f"VENV={tmp_path / 'venv'}", "demo"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.10 to 3.13" in done.stderr
    assert (found or "missing") in done.stderr
    assert not (tmp_path / "venv").exists()


@needs_make
def test_make_installs_again_only_after_a_change(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    names = ["setup.py", "pyproject.toml", "constraints.txt", ".venv/bin/python", ".venv/.installed-torch"]
    for name in [*names, *(f".venv/.installed-{extra}" for extra in ("demo", "docs", "test"))]:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    for goal in ("demo", "docs", "test"):
        assert "pip" not in run("make", "-n", goal, cwd=tmp_path)
    for changed in ("setup.py", "pyproject.toml", "constraints.txt"):
        os.utime(tmp_path / changed, (2, 2))
        for goal, extra in (("demo", ".[diffusers]"), ("docs", ".[docs]"), ("test", ".[test]")):
            assert extra in run("make", "-n", goal, cwd=tmp_path)
        os.utime(tmp_path / changed, (1, 1))


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text().splitlines()
