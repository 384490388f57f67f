"""launch/data.py: what is read, how it is split, and batches that depend on seed and step alone."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from training.data import Text, UsageError, load_text


@pytest.fixture
def text() -> Text:
    return Text(
        train=np.arange(200, dtype=np.uint8),
        held_out=np.arange(200, 256, dtype=np.uint8),
        seq_len=8,
    )


def test_a_batch_depends_on_seed_and_step_alone(text):
    first = text.batch(seed=1, step=5, size=6)
    np.random.seed(3)  # the global generators do not matter
    torch.manual_seed(3)
    assert torch.equal(text.batch(seed=1, step=5, size=6), first)
    assert not torch.equal(text.batch(seed=1, step=6, size=6), first)
    assert not torch.equal(text.batch(seed=2, step=5, size=6), first)


def test_batches_are_windows_of_the_training_part(text):
    batches = torch.cat([text.batch(0, step, 50) for step in range(40)])
    assert batches.shape == (2000, 9)
    assert batches.dtype == torch.int64
    assert (batches.diff(dim=1) == 1).all()
    assert batches.min() == 0 and batches.max() == 199, (
        "the first and the last byte are both trained on"
    )


def test_held_out_batches_cover_the_held_out_part_alone(text):
    batches = torch.cat([text.held_out_batch(i, batches=3, size=4) for i in range(3)])
    assert batches.shape == (12, 9)
    assert (batches.diff(dim=1) == 1).all()
    assert batches.min() == 200 and batches.max() == 255


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path):
    for name, content in (
        ("b/two", b"2" * 30),
        ("a", b"1" * 30),
        (".git/hidden", b"x" * 30),
        (".hidden", b"x" * 30),
        ("c", b"3" * 40),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    text = load_text(str(tmp_path), seq_len=4)
    assert bytes(text.train) + bytes(text.held_out) == b"1" * 30 + b"3" * 40 + b"2" * 30
    assert len(text.held_out) == 10, "the last tenth"


def test_a_file_is_read_as_it_is(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(100)))
    text = load_text(str(tmp_path / "text"), seq_len=4)
    assert bytes(text.train) + bytes(text.held_out) == bytes(range(100))


def test_the_default_is_the_standard_library_without_its_tests():
    text = load_text(None, seq_len=128)
    assert len(text.train) > 5_000_000
    everything = text.train.tobytes() + text.held_out.tobytes()
    assert b"class OrderedDict(dict):" in everything
    assert b"class TestOrderedDict" not in everything


def test_missing_data_is_named():
    with pytest.raises(
        UsageError, match=r"--data /no/such/text cannot be read \(No such file or directory"
    ):
        load_text("/no/such/text", seq_len=8)


def test_an_unreadable_file_within_a_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "secret").write_bytes(b"x" * 500)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(data.Path, "read_bytes", refuse)
    with pytest.raises(
        UsageError,
        match=rf"--data {tmp_path} cannot be read \(Permission denied: {tmp_path}/secret\)",
    ):
        load_text(str(tmp_path), seq_len=8)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"x" * 500)
    path.chmod(0)
    with pytest.raises(UsageError, match=rf"--data {path} cannot be read \(Permission denied"):
        load_text(str(path), seq_len=8)


@pytest.mark.parametrize("size", [0, 89])
def test_too_little_data_says_how_much_is_needed(tmp_path, size):
    (tmp_path / "short").write_bytes(b"x" * size)
    with pytest.raises(
        UsageError, match=rf"short holds {size} bytes, too few for --seq-len 8: give at least 90"
    ):
        load_text(str(tmp_path / "short"), seq_len=8)
    (tmp_path / "short").write_bytes(b"x" * 90)
    load_text(str(tmp_path / "short"), seq_len=8)  # which is then enough
