"""``benchmark.py step``: its outputs and bookkeeping. No test depends on a time."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import benchmark
import distributed
import pytest
import torch
from bench import fsdp2, measure, optimizers, report
from bench.markers import write_between_markers
from bench.measure import measure_size, parse_size, ratio
from bench.optimizers import Contender, Runner

CPU = torch.device("cpu")
FEW = {"rounds": 3, "seconds": 60.0, "turn": 0.0}


# --------------------------------------------------------------------------------------- the script


def time_contenders(rank: int, world: int, rounds: int) -> dict[str, list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp2, "LAYERS", 2)
        return fsdp2.time_contenders(rounds)


def run_on_workers(function: object, args: tuple[str, int], nprocs: int) -> None:
    """Run fsdp2's ranks on the processes that tests share."""
    directory, rounds = args
    times, *_ = distributed.run_ranks(nprocs, time_contenders, rounds)
    Path(directory, "times.json").write_text(json.dumps(times))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the directory and the stdout of one run at tiny sizes."""
    directory = tmp_path_factory.mktemp("benchmark")
    docs = directory / "benchmarks.md"
    docs.write_text(
        "# Benchmarks\nabove\n<!-- benchmark:cpu:begin -->\nold\n"
        "<!-- benchmark:cpu:end -->\nbelow\n"
    )
    options = "--device cpu --threads 1 2 --sizes 4K 3x50 --rounds 3 --turn 0 --fsdp2"
    outputs = f"--json {directory}/run.json --docs {docs}"
    threads, printed = torch.get_num_threads(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(fsdp2.mp, "spawn", run_on_workers)
        assert benchmark.main(f"{options} {outputs}".split()) == 0
    torch.set_num_threads(threads)
    optimizers.cpu.select_isa(None)
    return directory, printed.getvalue()


def test_json_has_every_round_and_the_rows_computed_from_them(finished: tuple[Path, str]) -> None:
    run = json.loads((finished[0] / "run.json").read_text())
    assert [(r["size"], r["tensors"], r["numel"], r["threads"]) for r in run["results"]] == [
        ("4K", 1, 4096, 1), ("3x50", 3, 150, 1), ("4K", 1, 4096, 2), ("3x50", 3, 150, 2),
    ]  # fmt: skip
    expected = {"ours", "ours-clip", "ours-kernel", "ours-reference", "copy"}
    expected |= {"torch-fused-fp32", "torch-fused-fp32-grads", "torch-foreach-fp32"}
    expected |= {"torch-fused-bf16", "torch-foreach-bf16"}
    for result in run["results"]:
        (times,) = result["batches"]  # all fit into memory together
        assert expected <= times.keys()
        assert {len(x) for x in times.values()} == {3} and min(map(min, times.values())) > 0.0
        assert {row["key"] for row in result["rows"]} == times.keys() | result["failures"].keys()
        for row in result["rows"]:
            if row["key"] in times:
                assert row["seconds"] == statistics.median(times[row["key"]])
                pairs = zip(times[row["key"]], times["ours"], strict=True)
                assert row["ratio"] == statistics.median(a / b for a, b in pairs)
            else:
                assert row["note"] == result["failures"][row["key"]] and row["seconds"] is None
    assert run["machine"]["torch"] == torch.__version__ and run["machine"]["name"]


def test_fsdp2_ratios_are_medians_over_rounds(finished: tuple[Path, str]) -> None:
    fsdp2 = json.loads((finished[0] / "run.json").read_text())["fsdp2"]
    times = {name: torch.tensor(values) for name, values in fsdp2["times"].items()}
    assert {len(x) for x in times.values()} == {3} and fsdp2["parameters"] == 100
    clip_ratio = float((times["torch clip"] / times["ours clip"]).median())
    assert fsdp2["clip_ratio"] == pytest.approx(clip_ratio, rel=1e-5)
    names = ("ours", *fsdp2["ratios"])
    both = {name: times[f"{name} clip"] + times[f"{name} step"] for name in names}
    assert len(both) == 4
    for name, found in fsdp2["ratios"].items():
        assert found == pytest.approx(float((both[name] / both["ours"]).median()), rel=1e-5)


def test_docs_get_the_table_and_the_plot(finished: tuple[Path, str]) -> None:
    directory, printed = finished
    text = (directory / "benchmarks.md").read_text()
    assert text.startswith("# Benchmarks\nabove\n<!-- benchmark:cpu:begin -->\nMeasured on: ")
    assert text.endswith("\n<!-- benchmark:cpu:end -->\nbelow\n") and "old" not in text
    assert "| torch fused fp32 + bf16 copy of the weights |" in text and "**2 threads**" in text
    assert "--sizes 4K 3x50 --rounds 3 --turn 0 --fsdp2`" in text and str(directory) not in text
    for plot in (directory / "img" / "benchmark_cpu.png", directory / "run.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")
    assert "[not measured] >= 80 % of the copy ceiling at 16M" in printed
    assert "torch fused fp32" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device cpu --sizes 12Q", "Invalid size: '12Q'"),
        ("step --device cpu --only nobody", "--only names nobody; the contenders here are "),
        ("--device cpu --threads 0", "--threads: 0 is not a positive number"),
        ("nothing", "there is no benchmark 'nothing': use step, "),
    ],
)
def test_bad_arguments_are_refused(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", benchmark.COMMANDS)
def test_every_benchmark_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        benchmark.main([name, "--help"])
    assert exited.value.code == 0
    assert f"usage: benchmark.py {name}" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- measuring


def fake(
    key: str,
    log: list[str] | None = None,
    *,
    memory: int = 1,
    fail_at: int | None = None,
    ceiling: str | None = None,
) -> Contender:
    """Return a contender that logs its steps and raises at step ``fail_at`` (1-based)."""
    taken = [0]

    def step() -> None:
        taken[0] += 1
        if log is not None:
            log.append(key)
        if taken[0] == fail_at:
            raise RuntimeError(f"{key} gives up\nwith a traceback")

    return Contender(key, key, lambda *_: Runner(step), memory, ceiling=ceiling)


def test_rounds_are_interleaved_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LONG_STEP", 0.0)  # no untimed warm-up steps
    log: list[str] = []
    contenders = [fake(key, log) for key in "abcd"]
    result = measure_size(contenders, [(10,)], CPU, **(FEW | {"rounds": 8}), log=lambda _: None)
    rounds = [log[i : i + 4] for i in range(4, len(log), 4)]  # after one step each when made
    assert len(rounds) == 10 and all(sorted(r) == list("abcd") for r in rounds)  # 2 to warm up
    assert len({tuple(r) for r in rounds}) > 4
    assert {len(x) for x in result["batches"][0].values()} == {8}


def test_short_steps_fill_a_turn_after_an_untimed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    taken = [0]

    def step() -> None:
        now[0] += 1.0 if taken[0] else 100.0
        taken[0] += 1

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    # The first step of each turn takes 100 s, the others 1 s.
    runners = {"a": Runner(step, before=lambda: taken.__setitem__(0, 0))}

    def times(turn: float) -> list[float]:
        return measure.measure(runners, CPU, {}, rounds=2, seconds=1e9, turn=turn)["a"]

    assert times(turn=400.0) == [1.0, 1.0]
    assert taken == [1 + 400]
    assert times(turn=50.0) == [100.0, 100.0]
    monkeypatch.setattr(measure, "LONG_STEP", 101.0)
    assert times(turn=50.0) == [1.0, 1.0]


@pytest.mark.parametrize("fail_at", [1, 2, 5])
def test_contender_that_fails_is_reported_and_the_others_continue(fail_at: int) -> None:
    contenders = [fake("ours"), fake("bad", fail_at=fail_at), fake("good")]
    result = measure_size(contenders, [(10,)], CPU, **FEW, log=lambda _: None)
    assert result["failures"] == {"bad": "failed: bad gives up"}
    assert {key: len(x) for key, x in result["batches"][0].items()} == {"ours": 3, "good": 3}


def test_missing_packages_are_reported_in_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("deepspeed", "optimi", "flashoptim", "torchao"):
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
    keys = ("ours", "deepspeed", "optimi", "flashoptim", "torchao")
    chosen = [c for c in optimizers.contenders(CPU) if c.key in keys]
    result = {"numel": 8, **measure_size(chosen, [(8,)], CPU, **FEW, log=lambda _: None)}
    assert result["failures"] == dict.fromkeys(keys[1:], "not installed")
    rows = {row["key"]: row for row in report.rows(chosen, result)}
    assert rows["optimi"]["note"] == "not installed" and rows["ours"]["ratio"] == 1.0


def test_missing_dependency_of_a_package_is_named() -> None:
    error = ModuleNotFoundError("No module named 'hjson'", name="hjson")
    assert measure.failure_reason(error, "deepspeed") == "failed: it needs the package hjson"


def test_ratios_are_taken_within_rounds() -> None:
    result = {
        "batches": [{"ours": [1.0, 10.0, 3.0]}, {"x": [2.0, 5.0, 30.0], "ours": [1.0, 10.0, 3.0]}]
    }
    assert ratio(result, "x", "ours") == 2.0  # median of 2, 0.5 and 10
    assert ratio(result, "y", "ours") is None


def test_batches_with_ours_and_their_ceilings_fit_into_memory() -> None:
    sizes = {"ours": 10, "a": 20, "b": 20, "d": 20, "c": 5, "huge": 100, "top": 10, "other": 10}
    ceilings = {"ours": "top", "a": "other"}
    everyone = [
        fake(key, memory=memory, ceiling=ceilings.get(key)) for key, memory in sizes.items()
    ]
    groups, too_large = measure.split_by_memory(everyone, 100, 5500 / measure.MEMORY_SHARE)
    assert [c.key for c in too_large] == ["huge"]
    names = [[c.key for c in group] for group in groups]
    assert all(sum(c.memory for c in group) <= 55 for group in groups) and len(groups) == 3
    assert all(group[0] == "ours" and "top" in group for group in names)
    assert {key for group in names for key in group} == {"ours", "a", "b", "c", "d", "top", "other"}
    assert all("other" in group for group in names if "a" in group)
    roomy, _ = measure.split_by_memory(everyone, 1, 1e9)
    assert [[c.key for c in group] for group in roomy] == [[c.key for c in everyone]]


@pytest.mark.parametrize(
    ("text", "count", "numel"),
    [
        ("7", 1, 7),
        ("2K", 1, 2048),
        ("128M", 1, 1 << 27),
        ("1B", 1, 1 << 30),
        ("1000x1", 1000, 1),
        ("2x3K", 2, 3072),
    ],
)
def test_parse_size(text: str, count: int, numel: int) -> None:
    assert parse_size(text) == [(numel,)] * count


@pytest.mark.parametrize("text", ["", "0", "0x5", "5x0", "1G", "x5", "1.5M", "-1"])
def test_parse_size_refuses_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="Invalid size"):
        parse_size(text)


# --------------------------------------------------------------------------------------- contenders


def test_contenders_of_ours_and_torch_step_all_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[torch.Tensor]] = []
    make = optimizers._parameters
    monkeypatch.setattr(
        optimizers, "_parameters", lambda *args: made.append(make(*args)) or made[-1]
    )
    weights = {}
    for c in optimizers.contenders(CPU):
        if c.package is None and c.color != optimizers.CEILING:
            owner = [runner_of_ours().optimizer] if c.runs_on else []  # has taken a step
            runner = c.make([(300,), (5, 7)], CPU, *owner)
            before = [p.detach().clone() for p in made[-1]]
            runner.before()
            runner.step()
            assert all(
                (p != q).float().mean() > 0.01 for p, q in zip(made[-1], before, strict=True)
            ), c.key
            if not c.runs_on:
                runner.step()  # a second step, as the owner of shared tensors has taken
            weights[c.key] = [p.detach() for p in made[-1]]
    same = [key for key in weights if key.startswith("ours") and key != "ours-clip"]
    assert {"ours-reference", "ours-kernel"} <= set(same)
    for key in same:
        assert all(map(torch.equal, weights[key], weights["ours"])), key
    monkeypatch.undo()
    optimizers.cpu.select_isa(None)


def contender(key: str) -> Contender:
    return next(c for c in optimizers.contenders(CPU) if c.key == key)


def runner_of_ours(shapes: tuple[tuple[int, ...], ...] = ((300,), (5, 7))) -> Runner:
    runner = contender("ours").make(shapes, CPU)
    runner.step()
    return runner


@pytest.mark.parametrize("shapes", [((4096,),), ((300,), (5, 7))])
def test_ceilings_preserve_our_tensors(shapes: tuple[tuple[int, ...], ...]) -> None:
    ours = runner_of_ours(shapes).optimizer
    assert ours is not None
    before = [[x.clone() for x in column] for column in optimizers._columns(ours)]
    ceilings = [
        c for c in optimizers.contenders(CPU) if c.runs_on and c.color == optimizers.CEILING
    ]
    assert len(ceilings) >= 1
    for c in ceilings:
        runner = c.make(shapes, CPU, ours)
        runner.before()
        runner.step()
        assert all(
            torch.equal(x, y)
            for a, b in zip(optimizers._columns(ours), before, strict=True)
            for x, y in zip(a, b, strict=True)
        )
    optimizers.cpu.select_isa(None)


def test_contender_fails_if_the_owner_of_its_tensors_failed() -> None:
    everyone = [
        fake("ours"),
        fake("bad", fail_at=1),
        replace(fake("dependent"), runs_on="bad"),
        replace(fake("fine"), runs_on="ours"),
    ]
    result = measure_size(everyone, [(10,)], CPU, **FEW, log=lambda _: None)
    assert result["failures"] == {
        "bad": "failed: bad gives up",
        "dependent": "failed: it runs on the tensors of bad, which failed",
    }
    assert result["batches"][0].keys() == {"ours", "fine"}


@pytest.mark.parametrize(
    ("key", "first", "argument"),
    [
        ("ours-clip", "clip_grad_norm_", 1.0),
        ("ours-precision", "precision_stats", 1.0),
        ("ours-precision-sample", "precision_stats", 0.125),
    ],
)
def test_contender_calls_before_its_step(
    monkeypatch: pytest.MonkeyPatch, key: str, first: str, argument: float
) -> None:
    ours = runner_of_ours().optimizer
    calls: list[tuple[object, ...]] = []
    for name in (first, "step"):
        monkeypatch.setattr(
            optimizers.AdamW_BF16, name, lambda self, *args, name=name: calls.append((name, *args))
        )
    contender(key).make([(4,)], CPU, ours).step()
    assert calls == [(first, argument), ("step",)]


def test_reading_contender_reads_all_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = runner_of_ours().optimizer
    assert ours is not None
    read: list[torch.Tensor] = []
    monkeypatch.setattr(optimizers.bandwidth, "read_bandwidth", read.extend)
    contender("ours-reading").make([(300,), (5, 7)], CPU, ours).step()
    assert len(read) == 2 and all(x is p.grad for x, p in zip(read, ours.state, strict=True))
    assert all(state["step"] == 2 for state in ours.state.values())


def test_mixed_precision_copies_gradients_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """``_foreach_copy_`` copies gradients before the step, and weights after it."""
    master = optimizers._parameters([(64,)], CPU, torch.float32)
    gradient = master[0].grad
    assert gradient is not None
    wanted = gradient.bfloat16().float()
    copies: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda *lists: (copies.append(lists), copy(*lists))
    )

    def step() -> None:
        assert torch.equal(gradient, wanted)
        master[0].data.fill_(0.125)

    runner = optimizers._with_copies(step, master, bf16_grads=True)
    gradient.zero_()
    runner.step()
    (grads, _), (weights, _) = copies
    assert grads[0] is gradient
    assert weights[0].dtype == torch.bfloat16 and (weights[0] == 0.125).all()


# ---------------------------------------------------------------------------------------- reporting


def test_section_of_one_device_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.md"
    path.write_text("# Benchmarks\n\ntext\n")
    report.write_section(path, "cuda", "gpu 1")
    report.write_section(path, "cpu", "cpu 1")
    report.write_section(path, "cuda", "gpu 2")
    assert path.read_text() == (
        "# Benchmarks\n\ntext\n\n"
        "<!-- benchmark:cuda:begin -->\ngpu 2\n<!-- benchmark:cuda:end -->\n\n"
        "<!-- benchmark:cpu:begin -->\ncpu 1\n<!-- benchmark:cpu:end -->\n"
    )


def test_broken_markers_are_an_error_and_leave_the_file(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    for text in ("END BEGIN", "only BEGIN", "only END"):
        path.write_text(text)
        with pytest.raises(ValueError, match="nothing was written"):
            write_between_markers(path, "BEGIN", "END", "x")
        assert path.read_text() == text


def test_rows_have_the_share_of_the_ceiling_for_large_sizes_only() -> None:
    everyone = [fake("ours", ceiling="top"), fake("top")]
    for size, share in (("64K", 0.75), ("32K", None)):
        shape = {"tensors": 1, "numel": parse_size(size)[0][0], "threads": 1}
        times = {"ours": [1.0] * 3, "top": [0.75] * 3}
        ours, top = report.rows(everyone, {**shape, "batches": [times], "failures": {}})
        assert (ours["share"], ours["ratio"]) == (share, 1.0)
        assert (top["share"], top["ratio"]) == (None, 0.75)
