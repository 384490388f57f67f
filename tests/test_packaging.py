"""The sdist and the wheel: what is inside, and a step of the installed wheel without a compiler."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import sharded_bf16_adamw

COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
NAME = f"sharded_bf16_adamw-{sharded_bf16_adamw.__version__}"
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
STEP = """
import sys, warnings
warnings.simplefilter("error", UserWarning)
import sharded_bf16_adamw, torch
assert sharded_bf16_adamw.__file__.startswith(sys.argv[1]), sharded_bf16_adamw.__file__
weight = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
optimizer = sharded_bf16_adamw.AdamW_BF16([weight], lr=0.5, backend="native")
weight.float().square().sum().backward()
optimizer.step()
print(weight[0].item(), sharded_bf16_adamw.__version__)
"""


def has_setuptools():
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return False
    return int(version.partition(".")[0]) >= 77


pytestmark = [
    pytest.mark.skipif(not has_setuptools(), reason="setuptools 77 is not installed"),
]


def run(*command, cwd, **variables):
    env = {key: value for key, value in os.environ.items() if key not in ("CC", "PYTHONPATH")}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**env, **variables},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_wheel(source, folder, **variables):
    """Build a wheel of a folder of sources, as pip does, into a new folder in ``folder``."""
    wheels = folder / "wheels"
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    wheels.mkdir()
    run("-c", code, cwd=source, **variables)
    (wheel,) = wheels.iterdir()
    return wheel


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def step_native(wheel, folder):
    """Install the wheel into an empty folder and take a step, with no program in PATH."""
    target = folder / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    empty = folder / "empty"
    empty.mkdir()
    return run("-c", STEP, target, cwd=empty, PYTHONPATH=str(target), PATH=str(empty))


@pytest.fixture(scope="module")
def sources(tmp_path_factory, repo):
    """Return a copy of the sources: a build writes into them."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        shutil.copy(repo / name, folder)
    shutil.copytree(
        repo / "sharded_bf16_adamw",
        folder / "sharded_bf16_adamw",
        ignore=shutil.ignore_patterns("__pycache__"),  # a _native.so of an older build stays
    )
    (folder / "tests").mkdir()
    (folder / "tests/test_nothing.py").touch()
    return folder


@pytest.fixture(scope="module")
def sdist(sources):
    run("-c", "from setuptools import build_meta; build_meta.build_sdist('.')", cwd=sources)
    return sources / f"{NAME}.tar.gz"


def test_sdist_has_the_sources(sdist, repo):
    with tarfile.open(sdist) as archive:
        names = set(archive.getnames())
    csrc = "sharded_bf16_adamw/kernels/csrc"
    expected = {*SOURCES, "tests/test_nothing.py", "sharded_bf16_adamw/py.typed"}
    expected |= {f"{csrc}/{path.name}" for path in (repo / csrc).iterdir()}
    assert {f"{NAME}/{name}" for name in expected} <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
def test_one_wheel_serves_every_python_and_steps_without_a_compiler(sdist, tmp_path, repo):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    fast = tmp_path / "fast"  # the optimizer of the compiler takes most of its time
    fast.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    fast.chmod(0o755)
    wheel = build_wheel(tmp_path / NAME, tmp_path, CC=str(fast))
    python, abi, platform = wheel.stem.removeprefix(f"{NAME}-").split("-")
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    package = repo / "sharded_bf16_adamw"
    modules = {f"sharded_bf16_adamw/{path.relative_to(package)}" for path in package.rglob("*.py")}
    native = {"sharded_bf16_adamw/kernels/_native.so", "sharded_bf16_adamw/py.typed"}
    assert {name for name in names_in(wheel) if ".dist-info/" not in name} == modules | native
    output = step_native(wheel, tmp_path)
    assert output.split() == ["0.494140625", sharded_bf16_adamw.__version__]


def test_wheel_built_without_a_compiler_has_no_older_library(sources, tmp_path):
    wheel = build_wheel(sources, tmp_path, CC="false")
    assert not [name for name in names_in(wheel) if name.endswith(".so")]
