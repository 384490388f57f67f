"""Each example of docs/examples runs by the commands in its docstring; the pages quote it.

An example whose framework is not installed is skipped: `pip install -e '.[test,integrations]'`.
"""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import distributed
import pytest
import torch

from sharded_bf16_adamw import AdamW_BF16

DOCS = Path(__file__).resolve().parent.parent / "docs"
EXAMPLES = sorted((DOCS / "examples").glob("with_*.py"))
PAGES = sorted(page for page in (DOCS / "integrations").glob("*.md") if page.stem != "index")
FRAMEWORKS = {
    "with_accelerate": "accelerate",
    "with_fabric": "lightning",
    "with_hf_trainer": "transformers",
    "with_lightning": "lightning",
    "with_peft": "peft",
    "with_torchtitan": "torchtitan",
}
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
}
UNWANTED = ("AdamW_BF16 is bfloat16, so it trains in float32", "are float32 now")
COMMAND = re.compile(r"^ *((?:python|torchrun) .*docs/examples/.*)$", re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(example: Path) -> list[str]:
    return COMMAND.findall(ast.get_docstring(ast.parse(example.read_text())) or "")


def script_of(command: str) -> Path:
    (script,) = (word for word in shlex.split(command) if word.endswith(".py"))
    return DOCS.parent / script


ALL_COMMANDS = [c for example in EXAMPLES for c in commands(example)]
TORCH_ALONE = [c for c in ALL_COMMANDS if script_of(c).stem not in FRAMEWORKS]


@pytest.mark.parametrize("command", TORCH_ALONE)
def test_example_of_torch_alone(command):
    """It runs in processes that have imported torch, which takes longer than the example."""
    launcher, *arguments = shlex.split(command)
    ranks = (
        int(arguments[arguments.index("--nproc-per-node") + 1]) if launcher == "torchrun" else None
    )
    codes, output = distributed.run_script(script_of(command), ranks)
    assert not any(codes), output
    assert not any(warning in output for warning in UNWANTED)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, marks=[pytest.mark.exhaustive] if c in TORCH_ALONE else [])
        for c in ALL_COMMANDS
    ],
)
def test_example(command, repo):
    launcher, *arguments = shlex.split(command)
    framework = FRAMEWORKS.get(script_of(command).stem)
    if framework is not None and importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    result = subprocess.run(
        [*LAUNCHERS[launcher], *arguments],
        cwd=repo,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert not any(warning in result.stderr for warning in UNWANTED)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_has_a_command_and_an_assertion_by_value(example):
    assert commands(example)
    assert any(isinstance(node, ast.Assert) for node in ast.parse(example.read_text()).body)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_page_quotes_its_examples(page):
    """A page names its examples by their commands, and its Python blocks are lines of them."""
    text = page.read_text()
    examples = {
        DOCS.parent / command.split(".py")[0].split()[-1] for command in COMMAND.findall(text)
    }
    sources = [path.with_suffix(".py").read_text() for path in examples]
    known = {line.strip() for source in sources for line in source.splitlines()}
    for block in PYTHON.findall(text):
        if sources:
            assert {line.strip() for line in block.splitlines()} <= known | {""}
        else:
            compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_page_is_in_the_table_and_in_the_navigation(page, repo):
    assert f"]({page.name})" in (DOCS / "integrations/index.md").read_text()
    assert f"integrations/{page.name}\n" in (repo / "mkdocs.yml").read_text()


def test_torch_adamw_takes_the_state_and_keeps_a_stale_correction():
    """docs/integrations/index.md says so; if torch changes that, the page must change."""
    weight = torch.nn.Parameter(torch.linspace(1, 2, 64).bfloat16())

    def step(optimizer):
        weight.float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    ours = AdamW_BF16([weight], lr=1e-3)
    step(ours)
    correction = ours.state[weight]["correction"].clone()
    torchs = torch.optim.AdamW([weight], lr=1e-3)
    torchs.load_state_dict(ours.state_dict())
    step(torchs)
    again = AdamW_BF16([weight], lr=1e-3)
    again.load_state_dict(torchs.state_dict())
    assert correction.any() and torch.equal(again.state[weight]["correction"], correction)
    again.reset_correction()
    assert not again.state[weight]["correction"].any()
