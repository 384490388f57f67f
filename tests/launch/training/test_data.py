"""training/data.py: kinds of data, their tokens, and batches as a function of seed and step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import distributed
import numpy as np
import pytest
import torch
from training import data
from training.data import MemmapTokens, TokenDataset, find_files, load_dataset
from training.errors import UsageError


@pytest.fixture
def text() -> TokenDataset:
    return TokenDataset(np.arange(256, dtype=np.uint8), num_train_tokens=200, seq_len=8)


def load(path: object, seq_len: int = 4, **options: object) -> TokenDataset:
    return load_dataset(find_files(None if path is None else str(path)), seq_len, **options)


def ids(text: TokenDataset) -> list[int]:
    return text.tokens[:].tolist()


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
    batches = torch.cat([text.held_out_batch(i, num_batches=3, size=4) for i in range(3)])
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
    text = load(tmp_path)
    assert bytes(text.tokens[:]) == b"1" * 30 + b"3" * 40 + b"2" * 30
    assert text.num_train_tokens == 90, "the last tenth is held out"


def test_file_is_read_unchanged(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(1, 101)))
    assert bytes(load(tmp_path / "text").tokens[:]) == bytes(range(1, 101))


def test_default_is_the_standard_library_without_its_tests():
    text = load(None)
    assert text.num_train_tokens > 5_000_000
    everything = text.tokens[:].tobytes()
    assert b"class OrderedDict(dict):" in everything
    assert b"class TestOrderedDict" not in everything


def test_tokens_are_those_of_the_concatenated_files_for_every_window(tmp_path):
    parts = [[1, 2, 3], [], [4], [], [5, 6, 7, 8], []]
    for number, part in enumerate(parts):
        np.array(part, "<u2").tofile(tmp_path / f"{number}.bin")
    tokens = MemmapTokens(sorted(tmp_path.iterdir()), np.dtype("uint16"))
    assert len(tokens) == 8 and len(MemmapTokens([], np.dtype("uint16"))) == 0
    for start in range(9):
        for stop in range(start, 9):
            assert tokens[start:stop].tolist() == list(range(start + 1, stop + 1))


def test_files_are_mapped_and_not_read(tmp_path):
    """A batch touches its windows only, even in a sparse file of 1 TB."""
    path = tmp_path / "huge.bin"
    path.touch()
    os.truncate(path, 1 << 40)
    text = load(path, seq_len=16)
    assert text.batch(0, 0, 4).shape == (4, 17) and len(text.tokens) == 1 << 39


@pytest.mark.parametrize(
    ("vocab_size", "given", "written"),
    [(256, None, "<u2"), (65536, None, "<u2"), (65537, None, "<u4"), (300, "uint32", "<u4")],
)
def test_bin_files_hold_token_ids(tmp_path, vocab_size, given, written):
    expected = np.random.default_rng(0).integers(0, min(vocab_size, 60000), 400)
    expected.astype(written).tofile(tmp_path / "data.bin")
    text = load(tmp_path / "data.bin", vocab_size=vocab_size, token_dtype=given)
    assert ids(text) == expected.tolist()


def test_token_outside_the_vocabulary_is_an_error(tmp_path):
    np.array([0] * 99 + [300], "<u2").tofile(tmp_path / "data.bin")
    text = load(tmp_path / "data.bin", seq_len=9, vocab_size=300)
    text.batch(0, 0, 4)
    with pytest.raises(UsageError, match=r"data.bin has the token id 300, but .* end at 299: give"):
        text.held_out_batch(0, 1, 4)
    assert (
        load(tmp_path / "data.bin", seq_len=9, vocab_size=301).held_out_batch(0, 1, 4).max() == 300
    )


TEXTS = ["one\ntwo", "", "gr\u00fcn \U0001f600", "x" * 40]


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n\n" for text in texts))
    return path


class Words:
    """A tokenizer whose ids are the lengths of words; a newline is a word of length 1."""

    vocab_size, eos_token_id, key = 70_000, 69_999, "words"

    def encode(self, texts):
        return [[len(word) for word in text.replace("\n", " \n ").split(" ")] for text in texts]


def test_jsonl_without_a_tokenizer_is_bytes_with_zero_after_each_text(tmp_path):
    text = load(write_jsonl(tmp_path / "a.jsonl"), cache=tmp_path)
    assert bytes(ids(text)) == b"".join(text.encode() + b"\0" for text in TEXTS)
    (written,) = tmp_path.glob("tokens-*.bin")
    assert ids(load(written)) == ids(text), "the file that was written is data, too"


@pytest.mark.parametrize("chars", [1, 1 << 20])
def test_text_is_tokenized_in_whole_lines_and_each_file_ends_with_eos(tmp_path, monkeypatch, chars):
    monkeypatch.setattr(data, "CHARS_AT_ONCE", chars)
    (tmp_path / "texts").mkdir()
    for name, content in (("a", "on tw\nxyz\n"), ("b", "word " * 40)):
        (tmp_path / "texts" / name).write_text(content)
    text = load(tmp_path / "texts", 2, tokenizer=Words(), vocab_size=70_000, cache=tmp_path)
    end = Words.eos_token_id
    tokens = [token for token in ids(text) if token]
    assert tokens == [2, 2, 1, 3, 1, end, *[4] * 40, end]
    assert len(list(tmp_path.glob("tokens-*"))) == 1


def test_token_ids_are_written_once_for_the_same_files_and_tokenizer(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["a b"] * 20)
    for _ in range(2):
        load(path, cache=tmp_path)
    load(path, 1, tokenizer=Words(), vocab_size=70_000, cache=tmp_path)
    assert capsys.readouterr().out.count("writing the token ids") == 2
    before = path.stat()
    write_jsonl(path, [*["a b"] * 20, "more"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert bytes(ids(load(path, cache=tmp_path))).endswith(b"more\0")


def load_worker(rank: int, world_size: int, path: str, cache: str) -> tuple[list[int], str]:
    text = load(path, cache=cache)
    try:
        load(write_jsonl(Path(cache, f"bad-{rank}.jsonl"), [1]), cache=cache)  # type: ignore[list-item]
    except UsageError as error:
        return ids(text), str(error)
    raise AssertionError


def test_rank_0_writes_the_token_ids_and_all_ranks_raise_its_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    results = distributed.run_ranks(2, load_worker, str(path), str(tmp_path))
    assert results[0][0] == results[1][0] and bytes(results[0][0]).startswith(b"one\ntwo\0")
    assert all("line 1 of" in error and "bad-0" in error for _, error in results)


BAD_LINES = ["{", "[]", '"text"', '{"txt": "a"}', '{"text": 3}', '{"text": "\\ud800"}', "\\"]


@pytest.mark.parametrize("line", BAD_LINES)
def test_line_that_is_not_an_object_with_text_is_an_error(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n{line}\n')
    with pytest.raises(UsageError, match=r'line 2 of .*a.jsonl is not a JSON object .* "text":'):
        load(tmp_path / "a.jsonl", cache=tmp_path)
    assert not list(tmp_path.glob("tokens-*.bin"))


def test_text_for_a_tokenizer_must_be_utf_8(tmp_path):
    (tmp_path / "latin").write_bytes("gr\u00fcn".encode("latin-1") * 50)
    with pytest.raises(UsageError, match=r"not UTF-8 text .*latin"):
        load(tmp_path / "latin", tokenizer=Words(), cache=tmp_path)
    assert len(ids(load(tmp_path / "latin"))) == 200, "bytes need no encoding"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no visible files: give"),
        ({".hidden": b"x" * 500}, "holds no visible files: give"),
        ({"a.bin": b"xx", "b.jsonl": b"", "c.txt": b""}, "holds .bin and .jsonl and text files:"),
        ({"a.txt": b"x" * 500, "b.png": b"x\0"}, r"holds a binary file, not text \(.*/b.png\):"),
        ({"a.jsonl": b"\x1f\0"}, r"holds a binary file, not text \(.*/a.jsonl\): give"),
        ({"a.bin": b"xxx"}, r"is not of uint16 token ids \(.*/a.bin has 3 bytes\): give"),
    ],
)
def test_folder_that_is_no_data_is_an_error(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"--data {tmp_path} {message}"):
        load(tmp_path)


def test_caches_of_python_are_no_text(tmp_path):
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(b"\0" * 100)
    (tmp_path / "a.py").write_bytes(b"a" * 100)
    assert len(ids(load(tmp_path))) == 100


def test_error_names_missing_data():
    message = r"--data /no/such/text cannot be read \(No such file or directory"
    with pytest.raises(UsageError, match=message):
        find_files("/no/such/text")


def test_error_names_an_unreadable_file_in_a_directory(tmp_path, monkeypatch):
    (tmp_path / "secret").write_bytes(b"x" * 500)

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    message = rf"--data {tmp_path} cannot be read \(Permission denied: {tmp_path}/secret\)"
    with pytest.raises(UsageError, match=message):
        find_files(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_error_names_an_unreadable_file(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"x" * 500)
    path.chmod(0)
    with pytest.raises(UsageError, match=rf"--data {path} cannot be read \(Permission denied"):
        find_files(str(path))


@pytest.mark.parametrize("size", [0, 89])
def test_error_about_too_little_data_says_how_much_is_needed(tmp_path, size):
    (tmp_path / "short").write_bytes(b"x" * size)
    message = f"short holds {size} bytes, too few for --seq-len 8: give at least 90"
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "short", seq_len=8)
    (tmp_path / "short").write_bytes(b"x" * 90)
    load(tmp_path / "short", seq_len=8)
