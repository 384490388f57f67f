"""Imports go one way: launch -> checkpoint -> optimizer -> {sharding, kernels, schedule}.

The last three never import each other.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ALLOWED = {
    "profiling": set(),
    "schedule": set(),
    "names": set(),
    "bf16_split": set(),
    "param_groups": {"names"},
    "conversion": {"names", "bf16_split", "param_groups", "sharding"},
    "kernels": {"profiling"},
    "sharding": {"profiling"},
    "validation": set(),
    "gradients": {"sharding", "validation"},
    "state": {"sharding", "validation"},
    "grad_norm": {"gradients", "kernels", "sharding"},
    "step_plan": {"gradients", "kernels", "sharding", "state", "validation"},
    "precision_sample": {"kernels", "sharding"},
    "param_log": {"sharding"},
    "step_in_backward": {"grad_norm", "gradients", "kernels", "schedule", "sharding", "state"}
    | {"step_plan", "validation"},
    "serialization": {"kernels", "param_log", "sharding", "state", "step_in_backward"}
    | {"validation"},
    "weights": {"conversion", "serialization", "sharding", "state"},
    "precision_stats": {"gradients", "grad_norm", "kernels", "precision_sample", "schedule"}
    | {"sharding", "state", "step_plan", "validation", "weights"},
    "optimizer": {"gradients", "grad_norm", "kernels", "param_log", "precision_stats", "profiling"}
    | {"schedule", "sharding", "step_in_backward", "step_plan", "validation"},
    "ema": {"kernels", "optimizer", "sharding"},
    "env": {"kernels"},
    "checkpoint": {"profiling", "kernels", "names", "optimizer", "bf16_split", "sharding", "state"},
}


def imported_layers(file: Path, package: Path) -> set[str]:
    """Return the layers of the package that ``file`` imports, except its own."""
    parts = file.relative_to(package).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            target = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
            found.update([target[0]] if target[0] else [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "sharded_bf16_adamw"
        ):
            found.add((node.module or "").partition(".")[2].partition(".")[0])
    return found - {parts[0], "", "__version__"}


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


def test_importing_the_package_imports_no_triton(repo):
    code = (
        "import sys, sharded_bf16_adamw; "
        "print(any('sharded_bf16_adamw.kernels.triton' in name for name in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
