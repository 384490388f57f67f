"""launch/bench/resident.py: the peak growth of the process, recorded by Linux or sampled."""

import threading
from pathlib import Path

import pytest
import torch
from bench import gather, resident

CPU = torch.device("cpu")
NBYTES = 256 << 20
pytestmark = pytest.mark.skipif(not resident.STATUS.exists(), reason="only Linux has this file")


def growth(while_held=lambda: None):
    """Return the peak growth while a tensor of NBYTES is allocated and freed."""
    used = resident.used_bytes(CPU)
    with resident.peak_bytes(CPU) as peak:
        held = torch.ones(NBYTES, dtype=torch.uint8)
        while_held()
        del held
    return peak[0] - used


def test_linux_records_the_peak_of_freed_memory():
    if not resident._reset_peak():
        pytest.skip("this process may not reset its peak")
    torch.ones(2 * NBYTES, dtype=torch.uint8)  # an earlier peak does not count
    assert growth() == pytest.approx(NBYTES, rel=0.1)


def test_memory_is_sampled_where_the_peak_cannot_be_reset(monkeypatch):
    monkeypatch.setattr(resident, "CLEAR_REFS", Path("/proc/self/none"))
    sampled, main, status = threading.Semaphore(0), threading.current_thread(), resident._status

    def counted(key):
        found = status(key)
        if threading.current_thread() is not main:
            sampled.release()
        return found

    monkeypatch.setattr(resident, "_status", counted)

    def two_samples():
        for _ in range(2):
            assert sampled.acquire(timeout=60)

    assert growth(two_samples) == pytest.approx(NBYTES, rel=0.1)


def test_gather_ends_its_sampler_if_the_call_fails(monkeypatch):
    def fail():
        raise OSError("a rank has died")

    monkeypatch.setattr(resident, "CLEAR_REFS", Path("/proc/self/none"))
    monkeypatch.setattr(gather.dist, "barrier", lambda: None)
    before = threading.enumerate()
    with pytest.raises(OSError, match="a rank has died"):
        gather.peak_of(fail)
    assert threading.enumerate() == before


def test_no_bytes_are_reported_if_the_system_has_none(monkeypatch):
    monkeypatch.setattr(resident, "STATUS", Path("/proc/self/none"))
    with resident.peak_bytes(CPU) as peak:
        pass
    assert resident.used_bytes(CPU) is None and not peak
