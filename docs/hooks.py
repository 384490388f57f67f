"""Hooks of mkdocs for the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "sharded_bf16_adamw"
# A Sphinx role, which docstrings use for references and mkdocstrings leaves as it is.
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):(<code>)[~.]?")


def on_config(config: Any) -> Any:
    """Show the version in the title."""
    version = re.search(r'__version__ = "(.*)"', (PACKAGE / "__init__.py").read_text())
    assert version is not None
    config["site_name"] += f" {version[1]}"
    return config


def on_page_content(html: str, **_: Any) -> str:
    """Return the page with ``:class:`.LR``` shown as ``LR``."""
    return ROLE.sub(r"\1", html)
