"""The documentation names files that exist."""

import re

import pytest

FILE = re.compile(r"(?<![\w/.-])[\w./-]+\.(?:py|c|h|sh)\b")


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(f"docs/{name}.md" for name in ("architecture", "benchmarks", "checkpoints", "index")),
        *(f"docs/{name}.md" for name in ("numerics", "quality", "strategies", "training", "zero")),
    ],
)
def test_page_names_existing_files(repo, page):
    folders = ("sharded_bf16_adamw", "launch", "tests", "docs")
    known = [repo / "setup.py", *(path for name in folders for path in (repo / name).rglob("*.*"))]
    paths = [f"/{path.relative_to(repo)}" for path in known]
    missing = {
        name
        for name in FILE.findall((repo / page).read_text())
        if not any(path.endswith(f"/{name}") for path in paths)
    }
    assert not missing
