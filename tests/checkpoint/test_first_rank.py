"""Export and conversion on several ranks: all ranks may call, or rank 0 alone."""

from __future__ import annotations

import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from sharded_bf16_adamw import convert_fp32, export_fp32, import_fp32, load, save
from sharded_bf16_adamw.checkpoint import export, rank_errors
from sharded_bf16_adamw.checkpoint.rank_errors import call_on_rank_0_via_store

from .trainings import read_folder, trained, true_values


def late(rank: int) -> None:
    """Delay other ranks, so that rank 0 finishes first."""
    time.sleep(0.2 * rank)


def documented_worker(rank: int, world: int, folder: str) -> dict[str, torch.Tensor]:
    """Run the documentation's two lines on two ranks, in both orders of arrival."""
    module, optimizer = trained()
    save(f"{folder}/run", 3, module, optimizer)
    for out, first in (("a", 0), ("b", 1)):
        late(rank ^ first)
        assert export_fp32(f"{folder}/run", f"{folder}/{out}") == Path(folder, out)
        other = trained(seed=9)
        import_fp32(f"{folder}/{out}", *other)
    return true_values(*other)


def test_every_rank_may_export_and_import(tmp_path):
    expected = true_values(*trained())
    for values in run_ranks(2, documented_worker, str(tmp_path)):
        assert values.keys() == expected.keys() and all(
            torch.equal(values[name], expected[name]) for name in values
        )
    for out in ("a", "b"):
        assert read_folder(tmp_path / out).keys() == expected.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "run"]


def rank_0_alone_worker(rank: int, world: int, folder: str) -> float:
    module, optimizer = trained()
    save(f"{folder}/run", 3, module, optimizer)
    if rank == 0:
        export_fp32(f"{folder}/run", f"{folder}/exported")
        convert_fp32(f"{folder}/exported", f"{folder}/converted", fp32=["precise*"])
    total = torch.ones(())
    dist.all_reduce(total)  # would fail if rank 1 were in another collective
    load(f"{folder}/converted", module, optimizer)
    return float(total)


def test_rank_0_alone_may_export_and_convert(tmp_path):
    assert run_ranks(2, rank_0_alone_worker, str(tmp_path)) == [2.0, 2.0]


def converting_worker(rank: int, world: int, folder: str) -> list[Any]:
    module, optimizer = trained()
    save(f"{folder}/run", 3, module, optimizer)
    export_fp32(f"{folder}/run", f"{folder}/exported")
    late(rank)
    return [
        str(convert_fp32(f"{folder}/exported", f"{folder}/converted", fp32=["precise*"])),
        load(f"{folder}/converted", module, optimizer).step,
    ]


def test_every_rank_may_convert(tmp_path):
    assert (
        run_ranks(2, converting_worker, str(tmp_path))
        == [[str(tmp_path / "converted/step-00000000"), 0]] * 2
    )


def failing_worker(rank: int, world: int, folder: str) -> list[str]:
    module, optimizer = trained()
    path = save(f"{folder}/run", 3, module, optimizer)
    export_fp32(path, f"{folder}/exported")
    convert_fp32(f"{folder}/exported", f"{folder}/converted")

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    messages = []
    for function, arguments in (
        (export_fp32, (path, f"{folder}/exported")),
        (export_fp32, (f"{folder}/none", f"{folder}/new")),
        (export_fp32, (path, f"{folder}/new", torch.float16)),
        (export_fp32, (path, f"{folder}/new")),
        (convert_fp32, (f"{folder}/exported", f"{folder}/converted")),
        (convert_fp32, (f"{folder}/none", f"{folder}/other")),
    ):
        with (
            pytest.raises((OSError, ValueError, RuntimeError)) as caught,
            mock.patch.object(export, "write_sharded", no_space),
        ):
            function(*arguments)
        messages.append(f"{type(caught.value).__name__}: {caught.value}".replace(folder, ""))
    export_fp32(path, f"{folder}/new")  # not the outcome of the failed call
    assert os.path.isdir(f"{folder}/new")
    return messages


def test_error_of_rank_0_is_raised_on_all_ranks(tmp_path):
    of_rank_0, of_rank_1 = run_ranks(2, failing_worker, str(tmp_path))
    assert of_rank_0[0] == (
        "FileExistsError: /exported exists already; give the name of a new directory"
    )
    assert [message.partition(":")[0] for message in of_rank_0[1:]] == [
        "FileNotFoundError",
        "ValueError",
        "OSError",
        "FileExistsError",
        "FileNotFoundError",
    ]
    assert of_rank_1[:3] + of_rank_1[4:] == of_rank_0[:3] + of_rank_0[4:]
    assert (
        of_rank_1[3]
        == "RuntimeError: export_fp32 failed on rank 0: OSError: [Errno 28] No space left on "
        "device: '/new'"
    )


def halves_worker(rank: int, world: int, folder: str) -> list[str]:
    """Export each half of the job concurrently; then pass a group without this rank."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = halves[rank // 2]
    module, optimizer = trained()
    save(f"{folder}/run{rank // 2}", 3, module, optimizer, group=mine)
    done: list[str] = []
    export_fp32(
        f"{folder}/run{rank // 2}",
        f"{folder}/{rank // 2}",
        progress=lambda count: done.append("wrote"),
        group=mine,
    )
    with pytest.raises(ValueError, match="this rank is not in the process group given as group"):
        export_fp32(f"{folder}/run0", f"{folder}/other", group=halves[1 - rank // 2])
    return done[:1]


def test_export_on_part_of_the_job(tmp_path):
    assert run_ranks(4, halves_worker, str(tmp_path)) == [["wrote"], [], ["wrote"], []]
    assert read_folder(tmp_path / "0").keys() == read_folder(tmp_path / "1").keys()


def missing_worker(rank: int, world: int, folder: str) -> str:
    if rank == 0:
        dist.barrier()
        return ""
    with (
        mock.patch.object(rank_errors, "_timeout", return_value=timedelta(seconds=0.2)),
        pytest.raises(RuntimeError) as caught,
    ):
        call_on_rank_0_via_store(
            "export_fp32", f"{folder}/out", lambda: pytest.fail("this rank wrote")
        )
    dist.barrier()
    return str(caught.value)


def test_call_without_rank_0_times_out(tmp_path):
    _, message = run_ranks(2, missing_worker, str(tmp_path))
    assert re.fullmatch(
        r"rank 0 has not called export_fp32 for .*/out within 0:00:00.200000; call it on "
        r"every rank, or on rank 0 alone",
        message,
    )
