"""Log lines of a new optimizer: a model that was not converted to bfloat16 is reported."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import pytest
import torch
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_bf16_adamw import AdamW_BF16, ZeRO

LOGGER = logging.getLogger("sharded_bf16_adamw")


class Collector(logging.Handler):
    """A handler that, while active, collects the package's log records from ``level`` up."""

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__(logging.NOTSET)
        self.records: list[logging.LogRecord] = []
        self._level = level

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def lines(self, level: int) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelno == level]

    def __enter__(self) -> Collector:
        LOGGER.addHandler(self)
        LOGGER.setLevel(self._level)
        return self

    def __exit__(self, *_: object) -> None:
        LOGGER.removeHandler(self)
        LOGGER.setLevel(logging.NOTSET)


def line(bf16: int, fp32: int, weight_bytes: int, state_bytes: int) -> str:
    return (
        f"AdamW_BF16 has {bf16} bfloat16 and {fp32} float32 parameters; this rank holds "
        f"{weight_bytes} bytes of their weights, and will hold {state_bytes} bytes of their states "
        "once each trainable one has had a gradient"
    )


def mixed() -> nn.Module:
    """Return a model with 15 bfloat16 elements in two parameters, and 6 float32 in two."""
    return nn.Sequential(nn.Linear(4, 3).bfloat16(), nn.LayerNorm(3))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.to_local().nbytes if hasattr(value, "to_local") else value.nbytes
        for s in optimizer.state.values()
        for value in s.values()
    )


def test_constructor_logs_one_line_for_all_groups():
    model = mixed()
    with Collector() as log:
        optimizer = AdamW_BF16(
            [
                {"params": model[0].parameters()},
                {"params": model[1].parameters(), "weight_decay": 0.0},
            ],
            lr=0.1,
        )
    optimizer.init_state()
    assert log.lines(logging.INFO) == [line(2, 2, 54, state_bytes(optimizer))]
    assert log.lines(logging.WARNING) == []


def test_late_group_is_logged_separately():
    model = mixed()
    with Collector() as log:
        optimizer = AdamW_BF16(model[0].parameters(), lr=0.1)
        optimizer.add_param_group({"params": model[1].parameters()})
    first, second = log.lines(logging.INFO)
    assert "2 bfloat16 and 0 float32" in first and "0 bfloat16 and 2 float32" in second
    assert log.lines(logging.WARNING) == []


def test_rejected_group_is_not_logged():
    with Collector() as log:
        optimizer = AdamW_BF16(mixed().parameters(), lr=0.1)
        with pytest.raises(TypeError):
            optimizer.add_param_group({"params": nn.Linear(2, 2).half().parameters()})
    assert len(log.lines(logging.INFO)) == 1


def test_float32_model_is_warned_about_once():
    model = nn.Linear(4, 3)
    with Collector(logging.NOTSET) as log:
        optimizer = AdamW_BF16(model.parameters(), lr=0.1)
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
        for _ in range(2):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        copy.deepcopy(optimizer)
    (message,) = log.lines(logging.WARNING)
    assert re.match(
        "none of the 2 parameters of AdamW_BF16 is bfloat16, so it trains in float32 and takes 12 "
        "bytes for each instead of 8; convert the",
        message,
    )


def swapped_for_dtensors(model: nn.Module, optimizer: AdamW_BF16) -> None:
    """Convert and shard the model, then swap the optimizer's parameters, as accelerate does."""
    for param in model.parameters():
        param.data = param.data.float()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer.param_groups[0]["params"] = list(model.parameters())


def converted_worker(rank: int, world: int) -> list[str]:
    model = nn.Linear(4, 3).bfloat16()
    with Collector(logging.WARNING) as log:
        optimizer = AdamW_BF16(model.parameters(), lr=0.1)
        swapped_for_dtensors(model, optimizer)
        for _ in range(2):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step(zero_grad=True)
    return log.lines(logging.WARNING)


def test_parameters_that_accelerate_converts_are_warned_about_once():
    ((message,),) = run_ranks(1, converted_worker)
    assert message.startswith(
        "2 of the 2 parameters of AdamW_BF16 were bfloat16 when it was built and are float32 now"
    )


def test_conversion_counts_only_converted_parameters():
    model = mixed()
    with Collector(logging.NOTSET) as log:
        optimizer = AdamW_BF16(model[0].parameters(), lr=0.1)
        optimizer.add_param_group({"params": model[1].parameters()})
        model[0].weight.data = model[0].weight.data.float()
        optimizer.param_groups[0]["params"].pop()  # a frozen layer is not a conversion
        model[1](torch.ones(1, 3)).sum().backward()
        optimizer.step()
    (message,) = log.lines(logging.WARNING)
    assert message.startswith("1 of the 3 parameters")


def test_dropped_correction_is_warned_about():
    model = mixed()
    optimizer = AdamW_BF16(model.parameters(), lr=0.1)
    optimizer.init_state()
    float32 = AdamW_BF16(model.float().parameters(), lr=0.1)
    with Collector(logging.WARNING) as log:
        float32.load_state_dict(optimizer.state_dict())
    (message,) = log.lines(logging.WARNING)
    assert message.startswith("2 loaded states of AdamW_BF16 had a correction that was dropped")
    with Collector(logging.WARNING) as log:
        float32.load_state_dict(float32.state_dict())
    assert log.records == []


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.float32, torch.bfloat16)])
def test_bfloat16_model_logs_nothing_by_default(dtypes):
    params = [  # frozen bfloat16 parameters count too
        nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=dtype == torch.float32)
        for dtype in dtypes
    ]
    with Collector(logging.NOTSET) as log:
        AdamW_BF16(params, lr=0.1)
    assert log.records == []


def sharded_worker(rank: int, world: int) -> list[tuple[list[str], int, str]]:
    """Return each optimizer's log lines, its bytes of state on this rank and its repr."""
    mesh = init_device_mesh("cpu", (world,))
    results: list[tuple[list[str], int, str]] = []
    for name in ("fsdp2", "zero"):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).bfloat16()
        options: dict[str, Any] = {"sharding": ZeRO(mesh)} if name == "zero" else {}
        if name == "fsdp2":
            fully_shard(model, mesh=mesh)
        with Collector() as log:
            optimizer = AdamW_BF16(model.parameters(), lr=0.1, **options)
        optimizer.init_state()
        results.append((log.lines(logging.INFO), state_bytes(optimizer), repr(optimizer)))
    return results


def test_log_and_repr_show_bytes_of_this_rank():
    """Rank 0 holds 2 rows of the weight and 2 elements of the bias, rank 1 one of each."""
    for rank, results in enumerate(run_ranks(2, sharded_worker)):
        (fsdp2_log, fsdp2_bytes, fsdp2_repr), (zero_log, zero_bytes, zero_repr) = results
        assert fsdp2_log == [line(2, 0, (20, 10)[rank], fsdp2_bytes)]
        assert zero_log == [line(2, 0, 30, zero_bytes)]
        assert f"\nsharding: torch\nstate: {fsdp2_bytes} bytes on this rank\n" in fsdp2_repr
        zero = "ZeRO(stage=2, mesh=(2,))"
        assert f"\nsharding: {zero}\nstate: {zero_bytes} bytes on this rank\n" in zero_repr
