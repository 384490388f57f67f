"""``launch/`` holds commands only; CONTRIBUTING.md lists them. Modules are in its packages."""

from __future__ import annotations

import re
from pathlib import Path


def is_command(path: Path) -> bool:
    text = path.read_text()
    return text.startswith("#!") or '\nif __name__ == "__main__":' in text


def test_launch_holds_the_listed_commands_only(repo: Path) -> None:
    text = (repo / "CONTRIBUTING.md").read_text().partition("## Commands in `launch/`")[2]
    files = [path for path in (repo / "launch").iterdir() if path.is_file()]
    assert {path.name for path in files} == set(re.findall(r"(\w+\.(?:py|sh))", text))
    assert all(map(is_command, files))
    assert not any(map(is_command, (repo / "launch").glob("*/*.py")))
