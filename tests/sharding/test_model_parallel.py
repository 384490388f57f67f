"""Pipelines, rank-local experts and models on a part of the job match one process."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import pytest
import torch
from bits import same_bits
from distributed import run_ranks
from torch import Tensor

from sharded_bf16_adamw import (
    gather_full_state_dict,
    import_fp32,
    load,
    save,
    scatter_full_state_dict,
)

from .model_parallel_cases import BY_NAME, CASES, CLIP, STEPS, Case, one_process, train, value

BEGIN, END = (
    "<!-- table of model parallelism: begin -->",
    "<!-- table of model parallelism: end -->",
)
COLUMNS = (
    "norm",
    "guard",
    "bits after 20 steps",
    "gather, scatter",
    "save, load",
    "load in one process",
    "load from one process",
    "import",
)


def folder_of(root: str, rank: int, world: int, group: Any) -> str:
    return root if group is None else f"{root}/half{rank // (world // 2)}"


def worker(rank: int, world: int, name: str, root: str, whole: str) -> dict[str, Any]:
    case = BY_NAME[name]
    model = case.build(rank, world, 0)
    norms = train(model, range(STEPS))
    trained = model.everything()

    steps = {key: value for key, value in trained.items() if key.endswith(".step")}
    save(
        folder_of(root, rank, world, model.group),
        STEPS,
        model.model,
        model.optimizer,
        group=model.group,
    )
    full = gather_full_state_dict(model.model, model.optimizer, group=model.group)
    model.give_gradients(STEPS, broken=rank == world - 1)
    model.optimizer.step(zero_grad=True)
    guard = model.optimizer.skipped_steps, same_bits(model.everything(), trained)

    again = case.build(rank, world, 7)
    load(folder_of(root, rank, world, model.group), again.model, again.optimizer, group=model.group)
    loaded = same_bits(again.everything(), trained)

    other = case.build(rank, world, 8)
    scatter_full_state_dict(other.model, other.optimizer, full or None, group=model.group)
    scattered = {
        key: value
        for key, value in other.everything().items()
        if key.rpartition(".")[2] in ("exp_avg", "step", "correction")
    }
    del other
    from_one = imported = None
    if case.reloads:
        fresh = case.build(rank, world, 10)
        import_fp32(source_of(case), fresh.model, fresh.optimizer, group=model.group)
        imported = fresh.everything()
        back = case.build(rank, world, 9)
        load(whole, back.model, back.optimizer, group=model.group)
        from_one = back.everything()
    return {
        "norms": norms,
        "trained": trained,
        "guard": guard,
        "loaded": loaded,
        "scattered": all(torch.equal(value, trained[key]) for key, value in scattered.items())
        and len(scattered) >= len(steps),
        "full": full,
        "from_one": from_one,
        "imported": imported,
    }


def source_of(case: Case) -> dict[str, Tensor]:
    """Return the float32 weights of another training."""
    return {name: value(name, shape, 3).float() * 1.1 for name, shape in case.shapes.items()}


@functools.cache
def expected(shapes: tuple[str, ...], seed: int) -> tuple[dict[str, Tensor], list[float]]:
    case = next(case for case in CASES if tuple(case.shapes) == shapes)
    model = one_process(case.shapes, seed)
    norms = train(model, range(STEPS))
    return model.everything(), norms


def matches(result: dict[str, Tensor], reference: dict[str, Tensor]) -> bool:
    """Return whether every tensor of a rank equals that of one process, or its slice."""
    for key, tensor in result.items():
        name, _, rest = key.partition("[")
        start, _, extra = rest.partition("]")
        whole = reference[name + extra]
        if start and whole.dim():
            whole = whole[int(start) : int(start) + tensor.shape[0]]
        if not torch.equal(tensor, whole):
            return False
    return True


@functools.cache
def outcome(case: Case) -> dict[str, str]:
    """Return a cell for each column."""
    with tempfile.TemporaryDirectory() as root:
        reference, _ = expected(tuple(case.shapes), 0)
        model = one_process(case.shapes)
        train(model, range(STEPS))
        save(f"{root}/whole", STEPS, model.model, model.optimizer)
        results = run_ranks(case.world, worker, case.name, f"{root}/parts", f"{root}/whole")
        halves = "half" in case.name
        references = [
            expected(tuple(case.shapes), rank // (case.world // 2) if halves else 0)
            for rank in range(case.world)
        ]
        right_norms = all(
            result["norms"] == own for result, (_, own) in zip(results, references, strict=True)
        )
        guard = [result["guard"] for result in results]
        # Of the two models on the halves of a job, only one has the bad gradient.
        skipped = [
            (int(not halves or rank >= case.world // 2), not halves or rank >= case.world // 2)
            for rank in range(case.world)
        ]
        bits = all(
            matches(result["trained"], own)
            for result, (own, _) in zip(results, references, strict=True)
        )
        one = "not possible"
        if case.reloads:
            path = f"{root}/parts/half0" if halves else f"{root}/parts"
            here = one_process(case.shapes, 5)
            load(path, here.model, here.optimizer)
            one = "yes" if same_bits(here.everything(), reference) else "no"
        back = imported = "not possible"
        if case.reloads:
            here = one_process(case.shapes, 6)
            import_fp32(source_of(case), here.model, here.optimizer)
            imported = (
                "yes"
                if all(matches(result["imported"], here.everything()) for result in results)
                else "no"
            )
            back = (
                "yes" if all(matches(result["from_one"], reference) for result in results) else "no"
            )
        full = results[0]["full"].get("state", {})
        gathered = all(result["scattered"] for result in results) and (
            not case.reloads
            or (
                full.keys() == case.shapes.keys()
                and all(
                    torch.equal(value, reference[f"{name}.{key}"])
                    for name, state in full.items()
                    for key, value in state.items()
                )
            )
        )
    return {
        "norm": "yes" if right_norms else "no",
        "guard": "yes" if guard == skipped else "no",
        "bits after 20 steps": "yes" if bits else "no",
        "gather, scatter": "yes" if gathered else "no",
        "save, load": "yes" if all(result["loaded"] for result in results) else "no",
        "load in one process": one,
        "load from one process": back,
        "import": imported,
    }


def table() -> str:
    """Return Markdown, a row for each case."""
    lines = [f"| job | ranks | {' | '.join(COLUMNS)} |", "|---|--:|" + "---|" * len(COLUMNS)]
    for case in CASES:
        cells = [outcome(case)[column] for column in COLUMNS]
        lines.append(f"| {case.name} | {case.world} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_model_parallel_matches_single_process(case):
    impossible = (
        set() if case.reloads else {"load in one process", "load from one process", "import"}
    )
    assert outcome(case) == {
        column: "not possible" if column in impossible else "yes" for column in COLUMNS
    }


def test_some_steps_clip_and_some_do_not():
    for case in CASES:
        _, norms = expected(tuple(case.shapes), 0)
        clipped = [norm > CLIP for norm in norms]
        assert any(clipped) and not all(clipped), case.name


def test_docs_show_the_table(repo):
    text = (repo / "docs" / "strategies.md").read_text()
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert shown == table(), "run python docs/strategies.py"
