"""launch/benchmark.py loop: the bytes that it counts, and its table."""

import distributed
import pytest
from bench import loop
from training.model import Config
from training.world import World

CONFIG = Config(4, 64, 2, 176, 16, 2, 0, 1e-3)


def worker(rank, world_size):
    world = World(rank, world_size, loop.torch.device("cpu"))
    names = [name for name in loop.SETUPS if name != loop.DEEPSPEED]
    return loop.measure(CONFIG, names, world, rounds=1, steps=1)


@pytest.fixture(scope="module")
def result():
    return distributed.run_ranks(2, worker)[0]


def test_bytes_are_those_of_the_strategies(result):
    # bytes per parameter on each of two ranks: weights, states, gradients, sent
    expected = {
        "torch-fsdp2": (2, 4, 2, 4),  # gathers twice in bf16, and reduces in float32
        "torch-zero1": (4, 4, 4, 6),
        "fsdp2": (1, 3, 1, 4),
        "fsdp2-in-backward": (1, 3, 0, 4),
        "zero1": (2, 3, 2, 3),
        "zero1-overlap": (2, 3, 2, 3),
        "zero2": (2, 3, 0, 3),
        "zero2-in-backward": (2, 3, 0, 3),
        "zero2-overlap": (2, 3, 0, 3),
    }
    for name, parts in expected.items():
        each = result["setups"][name]
        found = [each[part] / result["parameters"] for part in ("weights", "states", "gradients")]
        assert found == pytest.approx(parts[:3], rel=0.01, abs=0.001), name
        assert each["sent_bytes"] / result["parameters"] == pytest.approx(parts[3], rel=0.05), name
        assert each["activations_and_buffers"] > 0, name


def test_table_divides_by_the_baseline(result):
    growth = result["parameters"] * 11 // 2
    for seconds, name in ((0.5, "torch-fsdp2"), (0.25, "fsdp2")):
        result["setups"][name] |= {
            "seconds": [seconds],
            "activations_and_buffers": 0,
            "growth": growth,
        }
    parts = {name: result["setups"][name] for name in ("torch-fsdp2", "fsdp2")}
    lines = loop.table("tiny", {**result, "setups": parts}, ranks=2).splitlines()
    assert lines[-1].startswith("| ours, FSDP2 | 128 | 0.50 | 4.0")
    assert lines[-1].endswith("| 1.00 | 3.00 | 1.00 | 0.00 | 5.00 | 5.50 |")


def test_table_says_unknown_if_the_system_reports_no_memory(result):
    each = result["setups"]["torch-fsdp2"] | {"seconds": [1.0], "growth": None}
    parts = {"torch-fsdp2": each}
    lines = loop.table("tiny", {**result, "setups": parts}, ranks=2).splitlines()
    assert lines[-1].endswith(" | unknown |")


def test_setup_that_is_not_installed_is_skipped(monkeypatch, capsys):
    measured = []

    def measure(config, names, *_):
        measured.extend(names)
        return {"parameters": 1, "tokens": 1, "setups": {}}

    monkeypatch.setattr(loop, "init_world", lambda _: World(0, 1, loop.torch.device("cpu")))
    monkeypatch.setattr(loop, "measure", measure)
    monkeypatch.setattr(loop, "table", lambda *_: "")
    monkeypatch.setattr(loop, "machine", lambda _: {})
    monkeypatch.setattr(loop.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(loop, "is_installed", lambda _: False)
    assert loop.main(["--model", "tiny", "--only", "deepspeed-zero2", "zero2"]) == 0
    assert measured == ["torch-fsdp2", "zero2"]
    said = capsys.readouterr().out.splitlines()[0]
    assert said == "deepspeed-zero2 is skipped: the package deepspeed is not installed."


def deepspeed_worker(rank, world_size):
    world = World(rank, world_size, loop.torch.device("cpu"))
    return loop.measure(CONFIG, [loop.DEEPSPEED], world, rounds=1, steps=1)


def test_bytes_of_deepspeed():
    pytest.importorskip("deepspeed")
    result = distributed.run_ranks(2, deepspeed_worker)[0]
    each = result["setups"][loop.DEEPSPEED]
    keys = ("weights", "states", "gradients", "sent_bytes")
    found = [each[key] / result["parameters"] for key in keys]
    assert found == pytest.approx((2, 6, 2, 3), rel=0.01, abs=0.01)
