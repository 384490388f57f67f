"""Imports go one way: launch -> checkpoint -> optimizer -> {sharding, kernels, schedule}.

The last three never import each other.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sharded_bf16_adamw

ALLOWED = {
    "torch_types": set(),
    "profiling": set(),
    "schedule": set(),
    "names": {"torch_types"},
    "bf16_split": set(),
    "param_groups": {"names"},
    "conversion": {"names", "bf16_split", "param_groups", "sharding"},
    "kernels": {"profiling"},
    "sharding": {"torch_types", "profiling"},
    "validation": set(),
    "gradients": {"sharding", "validation"},
    "state": {"torch_types", "sharding", "validation"},
    "grad_norm": {"torch_types", "gradients", "kernels", "sharding"},
    "step_plan": {"torch_types", "gradients", "kernels", "sharding", "state", "validation"},
    "precision_sample": {"kernels", "sharding"},
    "param_log": {"sharding"},
    "step_in_backward": {
        "torch_types",
        "grad_norm",
        "gradients",
        "kernels",
        "schedule",
        "sharding",
        "state",
    }
    | {"step_plan", "validation"},
    "serialization": {"kernels", "param_log", "sharding", "state", "step_in_backward"}
    | {"validation"},
    "weights": {"conversion", "serialization", "sharding", "state"},
    "precision_stats": {"gradients", "grad_norm", "kernels", "precision_sample", "schedule"}
    | {"sharding", "state", "step_plan", "validation", "weights"},
    "optimizer": {"gradients", "grad_norm", "kernels", "param_log", "precision_stats", "profiling"}
    | {"schedule", "sharding", "step_in_backward", "step_plan", "validation"},
    "ema": {"torch_types", "kernels", "optimizer", "sharding"},
    "env": {"kernels"},
    "checkpoint": {"profiling", "kernels", "names", "optimizer", "bf16_split", "sharding", "state"},
}


def imported_layers(file: Path, package: Path) -> set[str]:
    """Return the layers of the package that ``file`` imports, without its own layer."""
    parts = file.relative_to(package).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            target = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
            found.update([target[0]] if target[0] else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            names = (alias.name.partition(".") for alias in node.names)
            found.update(
                rest.partition(".")[0] for top, _, rest in names if top == "sharded_bf16_adamw"
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "sharded_bf16_adamw"
        ):
            found.add((node.module or "").partition(".")[2].partition(".")[0])
    return found - {parts[0], "", "__version__"}


def test_every_layer_is_checked(repo):
    package = repo / "sharded_bf16_adamw"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(ALLOWED) == modules | folders


@pytest.mark.parametrize("layer", ALLOWED)
def test_layer_imports_only_lower_layers(repo, layer):
    package = repo / "sharded_bf16_adamw"
    files = (
        [package / f"{layer}.py"]
        if (package / f"{layer}.py").exists()
        else sorted((package / layer).rglob("*.py"))
    )
    assert files
    for file in files:
        assert imported_layers(file, package) <= ALLOWED[layer], file


def test_importing_the_package_imports_nothing_slow(repo):
    """DTensor, FSDP and DCP take as long to import as half of torch; they load when used."""
    code = """
import sys, torch
before = set(sys.modules)
import sharded_bf16_adamw
ours = [name for name in set(sys.modules) - before if name.startswith("sharded_bf16_adamw")]
print(sorted(name for name in ours if "triton" in name or "checkpoint" in name))
slow = ("tensor", "checkpoint", "fsdp", "_functional_collectives")
print([name for name in slow if "torch.distributed." + name in set(sys.modules) - before])
print(sharded_bf16_adamw.save.__module__, sharded_bf16_adamw.checkpoint.__name__)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == [
        "[]",
        "[]",
        "sharded_bf16_adamw.checkpoint.saving sharded_bf16_adamw.checkpoint",
    ]


def test_every_public_name_is_found():
    for name in sharded_bf16_adamw.__all__:
        assert getattr(sharded_bf16_adamw, name) is not None
        assert name in dir(sharded_bf16_adamw)
    with pytest.raises(AttributeError, match="module 'sharded_bf16_adamw' has no attribute 'sav'"):
        _ = sharded_bf16_adamw.sav
