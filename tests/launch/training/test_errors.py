"""Exit codes, and errors printed once, which all commands of launch/ share."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from training import errors
from training.errors import RunError, UsageError, exit_code


def fail(error: Exception) -> int:
    raise error


@pytest.mark.parametrize(
    ("rank", "local_rank", "has_joined", "prints"),
    [
        ("0", "0", False, True),
        ("1", "1", False, False),
        ("0", "0", True, True),
        ("8", "0", False, True),  # of another machine, where something else may be missing
        ("8", "0", True, False),
        ("9", "1", False, False),  # torchrun stops it
    ],
)
def test_error_is_printed_once(monkeypatch, capsys, rank, local_rank, has_joined, prints):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(dist, "is_initialized", lambda: has_joined)
    assert exit_code(lambda: fail(UsageError("no such thing.")), lambda: True) == 2
    assert exit_code(lambda: fail(RunError("a full disk.")), lambda: True) == 1
    expected = "error: no such thing.\nerror: a full disk.\n" if prints else ""
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("ends", [True, False])
def test_rank_waits_for_the_first_one_of_its_machine_to_print(monkeypatch, capsys, ends):
    """torchrun stops this rank once the first has ended; else only this rank has an error."""
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    slept = []
    monkeypatch.setattr(errors.time, "sleep", slept.append)
    monkeypatch.setattr(errors.time, "monotonic", lambda: sum(slept))
    is_stopped = lambda: ends and len(slept) == 3  # noqa: E731
    assert exit_code(lambda: fail(UsageError("no such thing.")), is_stopped) == 2
    assert capsys.readouterr().err == ("" if ends else "error: no such thing.\n")
    assert len(slept) == 3 if ends else sum(slept) >= errors.REPORT_S


@pytest.mark.parametrize(
    ("command", "size"),
    [
        (lambda: torch.empty(1 << 60, dtype=torch.uint8), " for 1152921504606846976 bytes more"),
        (
            lambda: fail(
                torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of "
                    "79.10 GiB of which 1.25 GiB is free."
                )
            ),
            " for 2.50 GiB more",
        ),
        (lambda: fail(torch.OutOfMemoryError("HIP is full")), ""),
    ],
    ids=("cpu", "cuda", "other"),
)
def test_full_memory_is_one_sentence_of_the_rank_that_met_it(command, size, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as raised:
        exit_code(command)
    assert raised.value.code == 1
    error = capsys.readouterr().err
    start = f"error: rank 3: the device has no memory{size}: use more ranks, "
    assert error.startswith(start) and error.count("\n") == 1


def test_other_runtime_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a fault"):
        exit_code(lambda: fail(RuntimeError("a fault")))
