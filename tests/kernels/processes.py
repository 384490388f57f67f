"""Processes that import Triton anew, which reads TRITON_INTERPRET at import."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


def pool(interpret: str) -> ProcessPoolExecutor:
    """Return a pool of one new process that imports Triton with TRITON_INTERPRET set."""
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", interpret)
        executor.submit(_patch_once_per_launch if interpret == "1" else int).result()  # starts it
    return executor


def _patch_once_per_launch() -> None:
    """Keep the interpreter from patching Triton's language anew in each function of a kernel.

    The patching takes half of its time. An interpreter with other internals is left unchanged.
    """
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patched: dict[frozenset[str], Any] = {}  # by the names of the modules that are patched

    def patch_once(function: Any) -> Any:
        modules = (getattr(value, "__name__", "") for value in function.__globals__.values())
        seen = frozenset(name for name in modules if name.startswith("triton.language"))
        if seen not in patched:
            patched[seen] = scope = patch_language(function)
            restore = scope.restore

            def restore_at_end() -> None:
                patched.clear()
                restore()

            scope.restore = restore_at_end
        return patched[seen]

    interpreter._patch_lang = patch_once
