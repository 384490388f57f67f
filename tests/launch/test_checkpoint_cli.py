"""The command line for checkpoints: output, files written, and exit codes."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sharded_bf16_adamw import AdamW_BF16, latest, load, save
from sharded_bf16_adamw.checkpoint.__main__ import main


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)).bfloat16()
    model[1].float()
    model.register_buffer("calls", torch.tensor(5))
    return model, AdamW_BF16(model.parameters(), lr=0.125)


def make_run(root, steps=(1,)):
    model, optimizer = make()
    for step in steps:
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        save(root, step, model, optimizer)
    return model, optimizer


def damage(path):
    (file,) = path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    return file.name


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def steps_left(root):
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))


def test_inspect_prints_facts_and_a_table(tmp_path, capsys):
    make_run(tmp_path, (1, 2))
    code, out, err = run(capsys, "inspect", tmp_path)
    assert code == 0 and err == ""
    lines = out.splitlines()
    facts = dict(
        line.split(maxsplit=1)
        for line in lines[: lines.index("")]
        if not line.startswith(("saved by", "on disk"))
    )
    assert facts["checkpoint"] == str(tmp_path / "step-00000002") and facts["step"] == "2"
    assert facts["tensors"] == "5 of 57 elements: 152 B of weights, 384 B of state"
    assert torch.__version__ in facts["versions"] and "1 rank(s): not sharded" in out
    rows = [line.split("  ") for line in lines[lines.index("") + 1 :]]
    table = {row[0]: [cell.strip() for cell in row if cell.strip()] for row in rows}
    assert table["0.weight"] == [
        "0.weight",
        "8 x 4",
        "bfloat16",
        "1",
        "64 B",
        "196 B",
        "2",
        "0.125",
    ]
    assert table["1.bias"] == ["1.bias", "8", "float32", "1", "32 B", "68 B", "2", "0.125"]
    assert table["calls"] == ["calls", "scalar", "int64", "1", "8 B", "-", "-", "-"]


def test_verify_names_damaged_files(tmp_path, capsys):
    make_run(tmp_path, (1, 2))
    assert run(capsys, "verify", tmp_path) == (0, f"{tmp_path}/step-00000002: ok\n", "")
    name = damage(tmp_path / "step-00000001")
    assert run(capsys, "verify", tmp_path)[0] == 0, "the latest is undamaged"
    code, out, err = run(capsys, "verify", "--all", tmp_path)
    assert code == 1 and out == f"{tmp_path}/step-00000002: ok\n"
    assert err.startswith(f"{tmp_path}/step-00000001: {name} is not what was written")
    assert run(capsys, "verify", tmp_path / "step-00000001")[0] == 1
    (tmp_path / "step-00000002" / "manifest.json").write_text("{}")
    assert run(capsys, "verify", tmp_path / "step-00000002")[0] == 1


def test_commands_take_the_directory_of_a_run(tmp_path, capsys):
    root = tmp_path / "checkpoints"
    make_run(root, (1, 2))
    assert "step-00000002" in run(capsys, "inspect", tmp_path)[1].splitlines()[0]
    both = f"{root}/step-00000001: ok\n{root}/step-00000002: ok\n"
    assert run(capsys, "verify", "--all", tmp_path) == (0, both, "")
    assert run(capsys, "export", tmp_path, tmp_path / "out")[0] == 0
    assert run(capsys, "prune", tmp_path, "--keep", 1)[0] == 0 and steps_left(root) == [2]


def test_verify_all_of_one_checkpoint_verifies_that_one(tmp_path, capsys):
    make_run(tmp_path, (1, 2))
    damage(tmp_path / "step-00000002")
    path = tmp_path / "step-00000001"
    assert run(capsys, "verify", "--all", path) == (0, f"{path}: ok\n", "")


def test_inspect_orders_names_with_their_numbers(tmp_path, capsys):
    names = ("b", "a10", "a9")
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in names}).bfloat16()
    save(tmp_path, 1, model, AdamW_BF16(model.parameters(), lr=0.125))
    path = tmp_path / "step-00000001"
    expected = ["a9.weight", "a10.weight", "b.weight"]
    out = run(capsys, "inspect", path)[1]
    assert [line.split()[0] for line in out.partition("\n\n")[2].splitlines()[1:]] == expected


def test_export_copies_the_config_and_names_the_given_path_in_errors(tmp_path, capsys):
    make_run(tmp_path / "run")
    source = tmp_path / "llama"
    source.mkdir()
    weight_files = ("model.safetensors.index.json", "model.bin", "trainer_state.json")
    for name in ("tokenizer.json", "vocab.txt", *weight_files):
        (source / name).write_text("{}")
    export = ("export", tmp_path / "run", tmp_path / "out", "--config-from", source)
    assert run(capsys, *export) == (
        2,
        "",
        f"error: there is no {source}/config.json; give the folder of a Hugging Face model\n",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "run"]
    (source / "config.json").write_text('{"torch_dtype": "float16", "vocab_size": 3}')
    code, out, _ = run(capsys, *export, "--dtype", "bfloat16")
    assert code == 0 and "note" not in out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {"torch_dtype": "bfloat16", "vocab_size": 3}
    others = {"config.json", "tokenizer.json", "vocab.txt", "model.safetensors.index.json"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == others | {"model-00001-of-00001.safetensors"}
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"], "that of the export, not the copied model's"
    code, _, err = run(capsys, "export", tmp_path / "run", source / "vocab.txt" / "new")
    assert code == 2 and err == f"error: [Errno 20] Not a directory: '{source}/vocab.txt/new'\n"


def test_export_and_import_keep_the_weights(tmp_path, capsys):
    _, optimizer = make_run(tmp_path / "run")
    code, out, err = run(
        capsys, "export", tmp_path / "run", tmp_path / "out", "--max-shard-size", "0.1KB"
    )
    assert (code, err) == (0, "") and str(tmp_path / "out") in out
    assert out.endswith("note: no config.json, which from_pretrained() needs: see --config-from\n")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    code, out, err = run(
        capsys,
        "import",
        tmp_path / "out",
        tmp_path / "new",
        "--fp32",
        "1.*",
        "--lr",
        "0.5",
        "--betas",
        "0.5",
        "0.75",
    )
    assert (code, err) == (0, "")
    other, fresh = make(seed=1)
    load(tmp_path / "new", other, fresh)
    for (_, weight), (_, expected) in zip(
        fresh.true_weights(), optimizer.true_weights(), strict=True
    ):
        assert torch.allclose(weight, expected, rtol=2.0**-17, atol=0)
    group = fresh.param_groups[0]
    assert (group["lr"], group["betas"], other.calls.item()) == (0.5, (0.5, 0.75), 5)


def test_import_takes_over_the_optimizer_state(tmp_path, capsys):
    model, _ = make()
    model.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "other.pt"
    )
    file = tmp_path / "other.pt"
    code, _, err = run(
        capsys, "import", file, tmp_path / "new", "--optimizer", file, "--fp32", "1.*"
    )
    assert (code, err) == (0, "")
    ours, fresh = make(seed=1)
    load(tmp_path / "new", ours, fresh)
    assert fresh.param_groups[0]["lr"] == 0.25 and latest(tmp_path / "new").name == "step-00000001"
    assert torch.equal(
        fresh.state[ours[1].weight]["exp_avg"], optimizer.state[model[1].weight]["exp_avg"]
    )


@pytest.mark.parametrize(
    ("damaged", "keep", "left", "code"),
    [
        ((), 2, [3, 4], 0),
        ((), 9, [1, 2, 3, 4], 0),
        ((4,), 1, [3, 4], 0),  # the newest undamaged one stays
        ((3, 4), 1, [2, 3, 4], 0),
        ((3,), 2, [2, 3, 4], 0),
        ((1, 2), 1, [4], 0),
        ((1, 2, 3, 4), 1, [1, 2, 3, 4], 1),  # all are damaged, so none is removed
    ],
)
def test_prune_keeps_the_newest_undamaged_checkpoints(damaged, keep, left, code, tmp_path, capsys):
    make_run(tmp_path, (1, 2, 3, 4))
    for step in damaged:
        damage(tmp_path / f"step-{step:08d}")
    assert run(capsys, "prune", tmp_path, "--keep", keep, "--dry-run")[0] == code
    assert steps_left(tmp_path) == [1, 2, 3, 4]
    found, out, err = run(capsys, "prune", tmp_path, "--keep", keep)
    assert found == code and steps_left(tmp_path) == left
    assert out.splitlines() == [
        f"{tmp_path}/step-{step:08d}: removed" for step in (1, 2, 3, 4) if step not in left
    ]
    assert not list(tmp_path.glob(".removed*")) and ("damaged" in err) == bool(
        (set(damaged) & set(left) and code == 0) or damaged[3:]
    )


def test_prune_keeps_a_checkpoint_of_unknown_age(tmp_path, capsys):
    """A checkpoint with a damaged manifest may be the newest."""
    make_run(tmp_path, (1, 2, 3))
    (tmp_path / "step-00000003" / "manifest.json").write_text("{}")
    assert run(capsys, "prune", tmp_path, "--keep", 1)[0] == 0
    assert steps_left(tmp_path) == [2, 3]


def test_verify_and_prune_report_directories_without_a_manifest(tmp_path, capsys):
    """A copy or removal that was cut short leaves such directories."""
    make_run(tmp_path, (1, 2, 3))
    empty, partly = tmp_path / "step-00000004", tmp_path / "step-00000002"
    empty.mkdir()
    (partly / "manifest.json").unlink()
    (tmp_path / "step-2").mkdir()  # not ours
    assert run(capsys, "verify", tmp_path) == (0, f"{tmp_path}/step-00000003: ok\n", "")
    code, out, err = run(capsys, "verify", "--all", tmp_path)
    assert code == 1 and out == f"{tmp_path}/step-00000001: ok\n{tmp_path}/step-00000003: ok\n"
    sentence = (
        "has no manifest.json, so it is not a complete checkpoint; remove it if no copy into it is "
        "in progress"
    )
    assert err.splitlines() == [f"{path}: {sentence}" for path in (partly, empty)]
    code, out, pruned = run(capsys, "prune", tmp_path, "--keep", 1)
    assert (code, out, pruned) == (0, f"{tmp_path}/step-00000001: removed\n", err)
    assert empty.is_dir() and partly.is_dir()
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    assert run(capsys, "verify", "--all", tmp_path)[0] == 1, "also without any complete one"


def test_prune_continues_after_a_failed_removal(tmp_path, capsys, monkeypatch):
    make_run(tmp_path, (1, 2, 3))
    rename = os.rename

    def refuses(source, target):
        if Path(source).name == "step-00000001":
            raise PermissionError(13, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuses)
    code, out, err = run(capsys, "prune", tmp_path, "--keep", 1)
    assert code == 1 and out == f"{tmp_path}/step-00000002: removed\n"
    assert err.startswith(
        f"{tmp_path}/step-00000001: could not be removed: [Errno 13] Permission denied"
    )


USAGE = {
    "no command": ((), "the following arguments are required"),
    "unknown command": (("paint",), "invalid choice: 'paint'"),
    "nothing there": (
        ("inspect", "{root}/none"),
        "there is no checkpoint at {root}/none; give the folder of a checkpoint",
    ),
    "folder of a model to export": (
        ("export", "{root}/model", "{root}/out"),
        "it is the folder of a Hugging Face model, whose weights import_fp32 loads",
    ),
    "nothing to verify": (("verify", "{root}/none"), "there is no checkpoint at {root}/none"),
    "nothing to verify at all": (
        ("verify", "--all", "{root}/none"),
        "there is no checkpoint at {root}/none",
    ),
    "nothing to export": (
        ("export", "{root}/none", "{root}/out"),
        "there is no checkpoint at {root}/none",
    ),
    "export exists": (
        ("export", "{root}/run", "{root}"),
        "{root} exists already; give the name of a new directory",
    ),
    "shard size": (
        ("export", "{root}/run", "{root}/out", "--max-shard-size", "5XB"),
        "5XB is not a size such as 500MB or 5GB",
    ),
    "shard of nothing": (
        ("export", "{root}/run", "{root}/out", "--max-shard-size", "0"),
        "0 is not a positive size",
    ),
    "dtype": (("export", "{root}/run", "{root}/out", "--dtype", "int8"), "invalid choice: 'int8'"),
    "nothing to import": (
        ("import", "{root}/none", "{root}/new"),
        "there is no {root}/none; give a safetensors file",
    ),
    "no torch file": (
        ("import", "{root}/none.pt", "{root}/new"),
        "there is no file {root}/none.pt",
    ),
    "import exists": (
        ("import", "{root}/weights.pt", "{root}/run"),
        "{root}/run already has a checkpoint; give another directory",
    ),
    "nothing to prune": (
        ("prune", "{root}/none", "--keep", "1"),
        "there is no checkpoint at {root}/none",
    ),
    "keep nothing": (("prune", "{root}/run", "--keep", "0"), "0 is not a positive number"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_use_exits_with_2_and_one_sentence(case, tmp_path, capsys):
    make_run(tmp_path / "run")
    torch.save(make()[0].state_dict(), tmp_path / "weights.pt")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").touch()
    before = sorted(tmp_path.rglob("*"))
    arguments, message = USAGE[case]
    code, out, err = run(capsys, *[argument.format(root=tmp_path) for argument in arguments])
    assert (code, out) == (2, "")
    assert (
        err.startswith("error: ") and err.count("\n") == 1 and message.format(root=tmp_path) in err
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_damage_exits_with_1_and_one_sentence(tmp_path, capsys):
    make_run(tmp_path / "run")
    name = damage(tmp_path / "run" / "step-00000001")
    (tmp_path / "weights.safetensors").write_bytes(b"\xff" * 100)
    torch.save(make()[0].state_dict(), tmp_path / "weights.pt")
    for arguments, message in (
        (
            ("import", tmp_path / "weights.pt", tmp_path / "new", "--fp32", "*.norm.*"),
            "the pattern '*.norm.*' matches no name",
        ),
        (("export", tmp_path / "run", tmp_path / "out"), f"{name} is not what was written"),
        (
            ("import", tmp_path / "weights.safetensors", tmp_path / "new"),
            "weights.safetensors is not a safetensors file, or is damaged",
        ),
    ):
        code, out, err = run(capsys, *arguments)
        assert (
            (code, out) == (1, "")
            and err.startswith("error: ")
            and err.count("\n") == 1
            and message in err
        )
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


def test_full_disk_is_not_wrong_use(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "run")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = run(capsys, "export", tmp_path / "run", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err == f"error: [Errno 28] No space left on device: '{tmp_path}/out'\n"


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL_FOLDER"],))


def test_no_command_executes_a_pickle(tmp_path, capsys, monkeypatch):
    """Replace metadata and tensors by pickles that would make a directory; checksums match."""
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "evil"))
    torch.save({"x": torch.ones(1), "y": Evil()}, tmp_path / "evil.pt")
    import zlib

    from sharded_bf16_adamw.checkpoint.file_checksums import FileRecord, crc32_text
    from sharded_bf16_adamw.checkpoint.manifest import read_manifest

    pickle.loads(pickle.dumps(Evil()))
    (tmp_path / "evil").rmdir()  # so it makes it if it is loaded
    evil = (tmp_path / "evil.pt").read_bytes()
    commands = [
        ("inspect", "{path}"),
        ("verify", "{path}"),
        ("export", "{path}", "{root}/out"),
        ("prune", "{root}/run", "--keep", "1"),
    ]
    for what in ("metadata", "tensors"):
        root = tmp_path / what
        make_run(root / "run")
        path = root / "run" / "step-00000001"
        (file,) = path.glob("*.distcp")
        metadata = pickle.loads((path / ".metadata").read_bytes())
        for location in metadata.storage_data.values():
            location.offset, location.length = 0, len(evil)
        contents = {
            ".metadata": pickle.dumps(Evil() if what == "metadata" else metadata, protocol=2),
            file.name: evil,
        }
        manifest = read_manifest(path)
        for name, content in contents.items():
            (path / name).write_bytes(content)
            manifest.files[name] = FileRecord(len(content), crc32_text(zlib.crc32(content)))
        (path / "manifest.json").write_bytes(manifest.to_bytes())
        codes = {
            command[0]: run(capsys, *[part.format(path=path, root=root) for part in command])[0]
            for command in commands
        }
        assert codes["verify"] == 0 and codes["export"] == 1 and not (root / "out").exists()
        assert not (tmp_path / "evil").exists(), what
    assert run(capsys, "import", tmp_path / "evil.pt", tmp_path / "new")[0] == 1
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "run_main",
    [
        lambda repo: runpy.run_module("sharded_bf16_adamw.checkpoint", run_name="__main__"),
        lambda repo: runpy.run_path(str(repo / "launch/checkpoint.py"), run_name="__main__"),
    ],
    ids=("module", "script"),
)
def test_module_and_script_run_the_command(run_main, tmp_path, repo, capsys, monkeypatch):
    make_run(tmp_path)
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "verify", str(tmp_path)])
    monkeypatch.delitem(sys.modules, main.__module__)  # runpy warns if it is already imported
    with pytest.raises(SystemExit) as raised:
        run_main(repo)
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"{tmp_path}/step-00000001: ok\n"
