"""The documentation names files that exist, and its Python code runs."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import distributed
import pytest

from sharded_bf16_adamw import __version__

REPO = Path(__file__).resolve().parent.parent
FILE = re.compile(r"(?<![\w/.-])[\w./-]+\.(?:py|c|h|sh)\b")
# A block of Python; the new side of a diff of Python; a hidden check by value.
CODE = re.compile(
    r"^ *```(?P<kind>python|diff)\n(?P<block>.*?)^ *```|^<!-- check: (?P<check>[^\n]*) -->$",
    re.MULTILINE | re.DOTALL,
)
PAGES = [
    str(page.relative_to(REPO))
    for page in (REPO / "README.md", *sorted((REPO / "docs").rglob("*.md")))
    if CODE.search(page.read_text())
]
# Pages whose blocks are lines of examples, which tests/test_integrations.py compares and runs.
QUOTING = {
    f"docs/integrations/{name}.md"
    for name in ("accelerate", "ddp", "hf_trainer", "lightning", "peft", "schedulers")
} | {f"docs/integrations/{name}.md" for name in ("torch_compile", "torchtitan")}
# Pages that name files of other projects.
NAMING_OTHERS_FILES = {
    "docs/migration.md",
    *(f"docs/integrations/{name}.md" for name in ("axolotl", "nemo_automodel", "torchtitan")),
}
# Pages that cannot run, and why.
EXCLUDED = {
    "docs/integrations/axolotl.md": "a plugin of axolotl, which needs a GPU; it is compiled"
}


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(
            page
            for path in sorted((REPO / "docs").rglob("*.md"))
            if (page := str(path.relative_to(REPO))) not in NAMING_OTHERS_FILES
        ),
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


def script(page: str) -> str:
    """Return the code of a page as one script, each line at its place in the page."""
    text = (REPO / page).read_text()
    lines = [""] * (text.count("\n") + 1)
    for match in CODE.finditer(text):
        if match["check"]:
            block, first = f"assert {match['check']}\n", text.count("\n", 0, match.start())
        else:
            block = textwrap.dedent(match["block"])
            if match["kind"] == "diff":
                block = re.sub(r"^-.*|^[+ ]", "", block, flags=re.MULTILINE)
            first = text.count("\n", 0, match.start()) + 1
        lines[first : first + block.count("\n")] = block.splitlines()
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in QUOTING | {*EXCLUDED}])
def test_code_of_page_runs(page, tmp_path):
    """All blocks run in order as one script; on two ranks if they need a process group."""
    code = script(page)
    assert code.strip()
    (tmp_path / "page.py").write_text(code)
    ranks = 2 if "init_process_group(" in code else None
    codes, output = distributed.run_script(tmp_path / "page.py", ranks)
    assert not any(codes), output


@pytest.mark.exhaustive  # test_code_of_page_runs runs the same code in warm processes
def test_code_of_the_readme_runs_under_torchrun(tmp_path):
    """It is started as users do: nothing has imported torch before."""
    (tmp_path / "page.py").write_text(script("README.md"))
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2 page.py"
    result = subprocess.run(
        [sys.executable, *torchrun.split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", EXCLUDED)
def test_code_that_cannot_run_compiles(page):
    compile(script(page), page, "exec")


def test_blocks_keep_their_lines():
    """A traceback names the line of the page; only the new side of a diff runs."""
    for page in ("README.md", "docs/migration.md"):
        shown = (REPO / page).read_text().splitlines()
        lines = script(page).splitlines()
        assert sum(map(bool, lines)) > 15
        for line, code in zip(shown, lines, strict=False):
            assert code == "" or code in line or line == f"<!-- check: {code[7:]} -->"
            assert not (code and line.startswith("-"))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_beside_the_site_exist(repo, page):
    """The site's own are checked when it is built."""
    links = re.findall(r"\]\(([^)#\s]+)", (repo / page).read_text())
    missing = [link for link in links if "://" not in link and not (repo / link).exists()]
    assert links and not missing


def test_site_shows_no_roles(repo):
    spec = importlib.util.spec_from_file_location("hooks", repo / "docs/hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    html = "such as :class:<code>.LR</code>, :func:<code>~torch.compile</code>, a:b:<code>c</code>"
    shown = "such as <code>LR</code>, <code>torch.compile</code>, a:b:<code>c</code>"
    assert hooks.on_page_content(html) == shown
    assert hooks.on_config({"site_name": "name"})["site_name"] == f"name {__version__}"


def test_pages_that_quote_examples_are_those_of_the_integrations():
    integrations = {page for page in PAGES if page.startswith("docs/integrations/")}
    assert integrations == QUOTING | {*EXCLUDED} | {"docs/integrations/index.md"}
