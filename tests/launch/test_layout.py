"""CONTRIBUTING.md says which files of launch/ are commands and which are modules."""

from __future__ import annotations

import re
from pathlib import Path


def test_every_file_is_listed_as_what_it_is(repo: Path) -> None:
    text = (
        (repo / "CONTRIBUTING.md")
        .read_text()
        .partition("## Commands and modules")[2]
        .partition("\n## ")[0]
    )
    commands, modules = (
        re.findall(r"`(\w+\.(?:py|sh))`", part)
        for part in text.split("The other files are modules")
    )
    files = {path.name: path.read_text() for path in (repo / "launch").glob("*.*")}
    runs = {
        name
        for name, source in files.items()
        if source.startswith("#!") or '\nif __name__ == "__main__":' in source
    }
    assert set(commands) == runs
    assert set(modules) - runs == files.keys() - runs
