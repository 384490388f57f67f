"""Rewrite the list of messages in ``docs/troubleshooting.md``: ``python docs/troubleshooting.py``.

Reads the messages from the source, without importing it: texts of errors, of warnings, and of
records at the levels of warning and error. ``tests/test_troubleshooting.py`` fails if the page is
not up to date.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- messages: begin -->", "<!-- messages: end -->"
# Subjects in the order of the page, with the files that belong to them; the first match counts.
SUBJECTS = {
    "Building the optimizer": r"sharded_bf16_adamw/(validation|optimizer|weights|conversion|"
    r"param_groups|param_log|schedule|state|ema)\.py|sharded_bf16_adamw/sharding/build\.py",
    "The step inside the backward pass": r"sharded_bf16_adamw/step_in_backward/",
    "ZeRO": r"sharded_bf16_adamw/sharding/zero/",
    "Sharded models, ranks and replicas": r"sharded_bf16_adamw/sharding/",
    "Kernels and backends": r"sharded_bf16_adamw/(kernels/|env)",
    "Checkpoints": r"sharded_bf16_adamw/(checkpoint/|serialization)",
    "Steps, clipping and precision": r"sharded_bf16_adamw/",
    "The training script": r"launch/(train|elastic)|launch/training/",
    "The planner, comparisons and benchmarks": r"launch/",
}
# Advice for messages that give none, by a part of the message.
ADVICE = {
    "damaged, so it does not count": "`prune` counts undamaged ones only; remove it yourself.",
    "every checkpoint at … is damaged": "Keep what is there: a damaged checkpoint may be partly "
    "usable.",
    "an asynchronous save failed": "The checkpoint before it is still the latest. The text after "
    "the colon is the reason; save again.",
    "it is not the metadata of a checkpoint": "Part of *the checkpoint … cannot be used*.",
    "it is not a table of chunks": "Part of *the checkpoint … cannot be used*.",
    "is a pickled object; only tensors are loaded": "DCP pickles objects that are no tensors; this "
    "package loads none. Part of *the checkpoint … cannot be used*.",
    "which the metadata of tensors does not need": "The file is not one that `save` wrote. Part of "
    "*the checkpoint … cannot be used*.",
    "it is damaged: it": "`newest_good(root)` finds the newest checkpoint that is undamaged.",
    "it is of format": "Load it with the version of this package that wrote it (in its "
    "`manifest.json`, `versions`).",
    "is not what was written": "`newest_good(root)` finds the newest checkpoint that is undamaged.",
    "bytes, not the … that were written": "`newest_good(root)` finds one that is undamaged.",
    "its structure is unknown to this version": "A newer version wrote it: install that.",
    "extra must be plain data that JSON can hold": "Convert tensors and arrays to lists, and own "
    "classes to dicts.",
    "differ between ranks and are saved as on the first rank": "See [tensors that differ between "
    "ranks](checkpoints.md#tensors-that-differ-between-ranks).",
    "there is no file …": "Check the path; ranks may see different disks.",
    "names the file …, which is missing": "Copy the file too, or remove its entry from the index.",
    "says that … is in …, but it is not": "The index belongs to other files: copy them all again.",
    "uses the slower reference backend": "[A step is slow](#a-step-is-slow).",
    "the CPU backend is not available": "[A step is slow](#a-step-is-slow).",
    "the native library was not built (": "Install a C compiler, then this package again.",
    "the native library … does not load": "Install this package again on this machine.",
    "no memory for": "The host is out of memory.",
    "has … elements on … but its parameter": "Make it like the parameter: same size and device.",
    "must be a 0-dim float32 tensor": "Make it with `torch.zeros((), device=param.device)`.",
    "Tensor lr must be 1-element": "Give a float, or `torch.tensor(1e-3)`.",
    "capturable=True needs lr as a one-element": "Pass `lr=torch.tensor(1e-3, device=...)`.",
    "must be a callable from a step": "Give `LR(...)`, `WSD(...)` or a function of the step.",
    "Invalid learning rate: …": "A finite number of at least 0.",
    "Invalid epsilon value": "A finite number of at least 0.",
    "Invalid beta parameter": "A number of at least 0 and below 1.",
    "Invalid weight_decay value": "A finite number of at least 0.",
    "overlap_gather of ZeRO has no effect": "Call the module given as `model=` in each step, "
    "uncompiled, or leave the option out.",
    "the loss or gradient norm was not finite": "[The loss is NaN](#the-loss-is-nan).",
    "is not saved: its loss or gradient norm": "[The loss is NaN](#the-loss-is-nan).",
    "a weight or an optimizer state is not finite": "[The loss is NaN](#the-loss-is-nan).",
    "training goes on, but its values from step": "The reason is before it, such as a full disk.",
    "training goes on without it": "The reason is before it; W&B needs `wandb login`.",
    "no progress bar: tqdm": "`pip install tqdm`; training is the same without.",
    "note: changed since the checkpoint": "Options that differ from the checkpoint's: as you asked "
    "with `--resume auto`, or such that do not change what is trained.",
    "the schedule jumps": "The options given differ from those of the checkpoint; see `--lr`.",
    "stopping after this step": "The run saves and ends; the same command continues it.",
    "no progress for --step-timeout": "A rank hangs or is slow; the stacks that follow say where. "
    "Start the same command again.",
}
MIN_WORDS = 3
# Lists and variables of texts, and functions that return or yield them.
HOLDERS = re.compile(r"problem|message|mismatch|refus|reason|damage", re.IGNORECASE)
MAKERS = re.compile(
    r"problem|message|mismatch|failure|reason|damage|no_match|difference|changes|without_effect|"
    r"_slow_|hint|suggest|report_hang"
)


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of each message in a source file, in its order."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: dict[int, tuple[int, str, str]] = {}  # by node, as an append may be in an assignment
    for node in ast.walk(tree):
        makes = isinstance(node, ast.FunctionDef) and MAKERS.search(node.name)
        candidates = _made(node) if makes else _candidates(node)
        for kind, value in candidates:
            if (text := _text(value)) is not None and len(re.findall(r"\w+", text)) >= MIN_WORDS:
                found.setdefault(id(value), (value.lineno, kind, text))
    for _, kind, text in sorted(found.values()):
        yield kind, text


def _candidates(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield expressions that may be the text of a message, with its kind."""
    if isinstance(node, ast.Call) and node.args:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        if re.search(r"(Error|Exception|Exit)$", name) and name != "AssertionError":
            yield name, node.args[0]
        elif name in ("_error", "error") and isinstance(node.func, ast.Attribute):
            yield "error", node.args[0]
        elif name in ("warn", "warning"):
            yield "warning", node.args[0]
        elif name == "print" and any("stderr" in ast.unparse(k.value) for k in node.keywords):
            yield "note", node.args[0]
        elif name == "append" and HOLDERS.search(ast.unparse(node.func)):
            yield "text", node.args[0]
    elif isinstance(node, ast.Assign):
        names = [ast.unparse(target) for target in node.targets]
        if any(HOLDERS.search(name) or name.endswith("_ERROR") for name in names):
            yield "text", node.value


def _made(function: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield what a function returns, yields or appends to a list."""
    for node in ast.walk(function):
        value: ast.expr | None = None
        if isinstance(node, ast.Return | ast.Yield):
            value = node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".append"):
            value = node.args[0]
        if isinstance(value, ast.IfExp):
            yield from (("text", value.body), ("text", value.orelse))
        elif value is not None:
            yield "text", value


def _text(node: ast.expr) -> str | None:
    """Return a string or f-string with ``…`` for each value in it, or None."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None and right is None else f"{left or '…'}{right or '…'}"
    return None


def sections() -> str:
    """Return the generated part of the page."""
    by_subject: dict[str, dict[str, list[str]]] = {subject: {} for subject in SUBJECTS}
    for root in ("sharded_bf16_adamw", "launch"):
        for path in sorted((REPO / root).rglob("*.py")):
            name = path.relative_to(REPO).as_posix()
            lines = dict.fromkeys(_line(kind, text) for kind, text in messages(path))
            if lines:
                subject = next(s for s, files in SUBJECTS.items() if re.match(files, name))
                by_subject[subject][name] = list(lines)
    parts = []
    for subject, files in by_subject.items():
        parts.append(f"### {subject}")
        for name, lines in files.items():
            parts += [f"In `{name}`:", "\n".join(lines)]
    return "\n\n".join(parts)


def _line(kind: str, text: str) -> str:
    """Return a message as an item of a list, with advice if there is any."""
    text = re.sub(r"%[sdr]", "…", " ".join(text.split()))
    quote = "``" if "`" in text else "`"
    advice = next((advice for part, advice in ADVICE.items() if part in text), None)
    return f"- {kind}: {quote}{text}{quote}" + (f" — {advice}" if advice else "")


def main() -> None:
    sys.path.insert(0, str(REPO / "launch"))
    from bench.markers import write_between_markers

    write_between_markers(PAGE, BEGIN, END, sections())


if __name__ == "__main__":
    main()
