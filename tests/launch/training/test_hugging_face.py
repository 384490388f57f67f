"""``train.py --model``: a Llama made here is trained, resharded, exported and loaded back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from training.build import _allocate
from training.data import TokenDataset
from training.errors import STOPPED
from training.hugging_face import build, read_config
from training.options import parse_args

from sharded_bf16_adamw import latest
from sharded_bf16_adamw.bf16_split import split
from sharded_bf16_adamw.checkpoint.export import join
from sharded_bf16_adamw.checkpoint.reader import CheckpointReader

from ..train_runs import curve, held_out, run

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the quick brown fox jumps over the lazy dog\n" * 200
OPTIONS = "--steps 4 --eval-every 4 --save-every 0 --lr 1e-2 --batch-size 4"


def make_folder(folder: Path, tied: bool) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=272,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama"), tied=False)


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> str:
    (tmp_path / "text").write_text(TEXT)
    return f"--model {folder} --data {tmp_path / 'text'} {OPTIONS}"


def true_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return ``p + correction`` of each weight of a checkpoint."""
    reader = CheckpointReader(checkpoint)
    return {
        name: join(reader.read(f"model.{name}"), reader.read(f"optimizer.state.{name}.correction"))
        for key in reader.infos
        if (name := key.removeprefix("model.")) != key
    }


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def train_worker(rank: int, world: int, runs: dict[str, str], stop_at: int) -> None:
    real = TokenDataset.batch

    def batch(self: TokenDataset, seed: int, step: int, size: int) -> torch.Tensor:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, seed, step, size)

    TokenDataset.batch = batch
    try:
        for out, arguments in runs.items():
            assert run("--out", out, arguments) == (0 if stop_at < 0 else STOPPED)
    finally:
        TokenDataset.batch = real


def test_weights_are_split_and_compute_what_transformers_computes(folder, options, tmp_path):
    assert run("--out", tmp_path / "out", options, "--steps 1 --lr 0 --eval-batches 1") == 0
    weights = true_weights(latest(tmp_path / "out/checkpoints"))
    for name, value in loaded(folder).items():
        assert torch.equal(weights[name], join(*split(value))), name
        assert not torch.equal(value, value.bfloat16().float()) or "norm" in name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    cut = len(ids) - len(ids) // 10
    starts = [cut + int(i * (len(ids) - cut - 17) / 3) for i in range(4)]
    batch = torch.tensor([ids[start : start + 17] for start in starts])
    with torch.no_grad():
        loss = model(batch, labels=batch).loss.item()
    assert held_out(curve(tmp_path / "out"))[0] == pytest.approx(loss, rel=1e-3)


def test_sequences_are_no_longer_than_the_model_allows(folder, tmp_path):
    assert parse_args(["--model", str(folder)]).seq_len == 32
    (tmp_path / "config.json").write_text("{}")
    assert parse_args(["--model", str(tmp_path)]).seq_len == 1024


def test_buffers_that_no_file_has_keep_their_values(folder):
    config = read_config(str(folder), 8)
    model = build(str(folder), config, torch.bfloat16)
    _allocate(model, torch.device("cpu"))
    expected = dict(transformers.LlamaForCausalLM(config).named_buffers())
    found = dict(model.named_buffers())
    assert expected and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}


def test_stopped_on_two_ranks_resumed_on_one_exported_and_loaded_back(folder, options, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run("--out", whole, options) == 0
    distributed.run_ranks(
        2, train_worker, {str(stopped): f"{options} --strategy fsdp2 --export-hf float32"}, 1
    )
    first = latest(stopped / "checkpoints")
    assert first.name == "step-00000002"
    files = sorted((stopped / "hf/latest").glob("*.safetensors"))
    assert len(files) > 1, "each rank writes"
    for name, value in loaded(stopped / "hf/latest").items():
        assert torch.equal(value, true_weights(first)[name]), name
    assert run("--out", stopped, options, "--resume auto --keep 1 --export-hf bfloat16") == 0
    assert held_out(curve(stopped)) == pytest.approx(held_out(curve(whole)), rel=3e-3)
    assert held_out(curve(whole))[-1] < held_out(curve(whole))[0] - 0.1
    last = latest(stopped / "checkpoints")
    assert [path.name for path in (stopped / "hf").glob("step-*")] == [last.name]
    shutil.rmtree(stopped / "hf" / last.name)  # killed in an export; the link remains
    assert run("--out", stopped, options, "--keep 1 --export-hf bfloat16 --resume auto") == 0
    reader = CheckpointReader(last)
    for name, value in loaded(stopped / "hf/latest").items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, reader.read(f"model.{name}")), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(stopped / "hf/latest")
    assert tokenizer.get_vocab() == transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


def test_strategies_and_optimizers_train_alike(options, tmp_path):
    assert run("--out", tmp_path / "single", options) == 0
    expected = curve(tmp_path / "single")
    names = ["ddp", "fsdp1", "fsdp2", "zero1", "zero2"]
    runs = {str(tmp_path / name): f"{options} --strategy {name}" for name in names}
    for optimizer in ("torch-fp32", "torch-bf16"):
        runs[str(tmp_path / optimizer)] = f"{options} --strategy fsdp2 --optimizer {optimizer}"
    distributed.run_ranks(2, train_worker, runs, -1)
    for out in runs:
        assert held_out(curve(Path(out))) == pytest.approx(held_out(expected), rel=5e-3), out


def test_tied_embeddings_stay_tied(options, folder, tmp_path):
    tied = make_folder(tmp_path / "tied", tied=True)
    options = options.replace(str(folder), str(tied))
    # --strategy single: FSDP2 ties shared parameters by itself
    assert run("--out", tmp_path / "out", options, "--export-hf float32") == 0
    found = loaded(tmp_path / "out/hf/latest")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert held_out(curve(tmp_path / "out"))[-1] < held_out(curve(tmp_path / "out"))[0] - 0.1
    checkpoint = CheckpointReader(latest(tmp_path / "out/checkpoints"))
    assert ["lm_head.weight", "model.embed_tokens.weight"] in map(sorted, checkpoint.manifest.ties)


def without(folder: Path, copy: Path, pattern: str) -> Path:
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(pattern))
    return copy


def with_type(folder: Path, copy: Path, model_type: str) -> Path:
    without(folder, copy, "config.json")
    (copy / "config.json").write_text(json.dumps({"model_type": model_type}))
    return copy


# Arguments, given the model's folder and a new one, and a regular expression for the message.
ERRORS: dict[str, tuple[Any, str]] = {
    "no folder": (lambda f, t: f"--model {t}", "--model .* has no config.json: give the folder"),
    "unknown model": (
        lambda f, t: f"--model {with_type(f, t, 'zzz')}",
        "--model .* cannot be built by transformers as a causal language model",
    ),
    "no weights": (
        lambda f, t: f"--model {without(f, t, '*safetensors*')}",
        "there is no .*model.safetensors; give a safetensors file",
    ),
    "no tokenizer": (
        lambda f, t: f"--model {without(f, t, 'tokenizer*')}",
        "--model .* has no tokenizer that transformers reads",
    ),
    "too long": (
        lambda f, t: f"--model {f} --seq-len 33",
        "--seq-len 33 is longer than the 32 pos",
    ),
    "tensor parallel": (
        lambda f, t: f"--model {f} --strategy tp",
        "--strategy tp shards the presets only, not --model: use --strategy fsdp2",
    ),
    "two models": (
        lambda f, t: f"--model {f} --preset nano",
        "--preset: not allowed with argument --model",
    ),
    "moments of a folder": (
        lambda f, t: f"--model {f} --init-from {f} --init-moments",
        "--init-moments needs a checkpoint, but --init-from .* is not one",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_usage_error_is_one_sentence(folder, tmp_path, capfd, monkeypatch, case):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, message = ERRORS[case]
    (tmp_path / "text").write_text(TEXT)
    options = arguments(folder, tmp_path / "copy")
    assert run("--steps 2 --data", tmp_path / "text", "--out", tmp_path / "out", options) == 2
    err = capfd.readouterr().err
    assert re.search(rf"^error: [^\n]*{message}[^\n]*\n\Z", err, re.MULTILINE), err


def test_missing_transformers_is_one_sentence(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("--model", folder, "--out", tmp_path) == 2
    message = "error: --model needs the transformers package: install it with pip install"
    assert capsys.readouterr().err.startswith(message)
