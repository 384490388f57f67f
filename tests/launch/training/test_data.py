"""training/data.py: reading and splitting of text, and batches as a function of seed and step."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from training.data import Text, load_text
from training.errors import UsageError


@pytest.fixture
def text() -> Text:
    return Text(
        train=np.arange(200, dtype=np.uint8),
        held_out=np.arange(200, 256, dtype=np.uint8),
        seq_len=8,
    )


def test_batch_depends_only_on_seed_and_step(text):
    first = text.batch(seed=1, step=5, size=6)
    np.random.seed(3)  # the global generators do not matter
    torch.manual_seed(3)
    assert torch.equal(text.batch(seed=1, step=5, size=6), first)
    assert not torch.equal(text.batch(seed=1, step=6, size=6), first)
    assert not torch.equal(text.batch(seed=2, step=5, size=6), first)


def test_batches_are_windows_of_the_training_text(text):
    batches = torch.cat([text.batch(0, step, 50) for step in range(40)])
    assert batches.shape == (2000, 9)
    assert batches.dtype == torch.int64
    assert (batches.diff(dim=1) == 1).all()
    assert batches.min() == 0 and batches.max() == 199, "covers the first and the last byte"


def test_held_out_batches_cover_only_the_held_out_text(text):
    batches = torch.cat([text.held_out_batch(i, batches=3, size=4) for i in range(3)])
    assert batches.shape == (12, 9)
    assert (batches.diff(dim=1) == 1).all()
    assert batches.min() == 200 and batches.max() == 255


def test_directory_is_read_in_sorted_order_without_hidden_files(tmp_path):
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


def test_file_is_read_unchanged(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(100)))
    text = load_text(str(tmp_path / "text"), seq_len=4)
    assert bytes(text.train) + bytes(text.held_out) == bytes(range(100))


def test_default_is_the_standard_library_without_its_tests():
    text = load_text(None, seq_len=128)
    assert len(text.train) > 5_000_000
    everything = text.train.tobytes() + text.held_out.tobytes()
    assert b"class OrderedDict(dict):" in everything
    assert b"class TestOrderedDict" not in everything


def test_error_names_missing_data():
    message = r"--data /no/such/text cannot be read \(No such file or directory"
    with pytest.raises(UsageError, match=message):
        load_text("/no/such/text", seq_len=8)


def test_error_names_an_unreadable_file_in_a_directory(tmp_path, monkeypatch):
    (tmp_path / "secret").write_bytes(b"x" * 500)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    message = rf"--data {tmp_path} cannot be read \(Permission denied: {tmp_path}/secret\)"
    with pytest.raises(UsageError, match=message):
        load_text(str(tmp_path), seq_len=8)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_error_names_an_unreadable_file(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"x" * 500)
    path.chmod(0)
    with pytest.raises(UsageError, match=rf"--data {path} cannot be read \(Permission denied"):
        load_text(str(path), seq_len=8)


@pytest.mark.parametrize("size", [0, 89])
def test_error_about_too_little_data_says_how_much_is_needed(tmp_path, size):
    (tmp_path / "short").write_bytes(b"x" * size)
    message = f"short holds {size} bytes, too few for --seq-len 8: give at least 90"
    with pytest.raises(UsageError, match=message):
        load_text(str(tmp_path / "short"), seq_len=8)
    (tmp_path / "short").write_bytes(b"x" * 90)
    load_text(str(tmp_path / "short"), seq_len=8)
