"""Parameter groups by regular expression on names."""

import pytest
import torch
from distributed import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from sharded_bf16_adamw import AdamW_BF16, load, param_groups, save

PATTERNS = {"norm|bias": {"weight_decay": 0.0}, "^head": {"lr": 0.5}}
BLOCK_NORMS_AND_BIASES = [
    f"blocks.{i}.{name}" for i in range(2) for name in ("0.bias", "norm.weight", "norm.bias")
]
EXPECTED = [
    [*BLOCK_NORMS_AND_BIASES, "head.bias"],
    ["head.weight"],
    ["embed.weight", "blocks.0.0.weight", "blocks.1.0.weight"],
]
TABLE = """\
group  pattern     options           parameters  elements  names
0      norm|bias   weight_decay=0.0           2         8  blocks.*.*.bias
                                              2         8  blocks.*.norm.weight
                                              2         8  blocks.*.norm.bias
                                              1         5  head.bias
1      ^head       lr=0.5                     1        20  head.weight
2      (the rest)  (defaults)                 1        20  embed.weight
                                              2        32  blocks.*.*.weight"""


def block():
    module = nn.Sequential(nn.Linear(4, 4))
    module.add_module("norm", nn.LayerNorm(4))
    return module


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([block(), block()])
        self.head = nn.Linear(4, 5)
        self.to(torch.bfloat16)

    def forward(self, x):
        x = self.embed(x)
        for module in self.blocks:
            x = module(x)
        return self.head(x)


def backward(model):
    model(torch.arange(5)).float().square().sum().backward()


def test_first_match_wins_and_the_rest_is_last():
    model = Net()
    groups = param_groups(model, PATTERNS)
    assert [group["param_names"] for group in groups] == EXPECTED
    params = dict(model.named_parameters())
    for group in groups:
        assert all(
            param is params[name]
            for name, param in zip(group["param_names"], group["params"], strict=True)
        )
    options = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in groups
    ]
    assert options == [{"weight_decay": 0.0}, {"lr": 0.5}, {}]
    swapped = param_groups(model, dict(reversed(PATTERNS.items())))
    assert swapped[0]["param_names"] == ["head.weight", "head.bias"]
    assert swapped[1]["param_names"] == BLOCK_NORMS_AND_BIASES


def test_no_patterns_and_a_pattern_for_all_give_one_group():
    model = Net()
    for options in ({}, {"": {"lr": 0.1}}):
        (group,) = param_groups(model, options)
        assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))


def test_options_of_the_caller_stay_as_they_are():
    options = {"norm|bias": {"weight_decay": 0.0}}
    for _ in range(2):
        AdamW_BF16(param_groups(Net(), options), lr=0.1)
    assert options == {"norm|bias": {"weight_decay": 0.0}}


def test_frozen_parameters_are_kept():
    model = Net()
    model.head.requires_grad_(False)
    assert [group["param_names"] for group in param_groups(model, PATTERNS)] == EXPECTED


def test_tied_parameters_are_listed_once_and_match_by_any_name():
    model = Net()
    model.head.weight = model.embed.weight
    for pattern in ("^embed", "^head.weight"):
        first, rest = param_groups(model, {pattern: {"lr": 0.1}})
        assert first["param_names"] == ["embed.weight"]
        assert "embed.weight" not in rest["param_names"]
        assert len(first["params"]) + len(rest["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nrom": {}}, "pattern 'nrom' matches no parameter; the names are 'embed.weight', "),
        ({"bias": {}, "head.bias": {}}, "'head.bias' only matches parameters that patterns before"),
        ({"*": {}}, "pattern '\\*' is not a regular expression: nothing to repeat"),
        ({"bias": {"params": []}}, "options of pattern 'bias' contain 'params'"),
        ({"bias": {"param_names": []}}, "options of pattern 'bias' contain 'param_names'"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        param_groups(Net(), options)


def test_empty_groups_are_kept_on_request():
    options = {"router": {"lr": 0.0}, "": {}}
    groups = param_groups(Net(), options, allow_empty=True)
    assert [len(group["params"]) for group in groups] == [0, 11, 0]
    assert str(groups).splitlines()[1].split() == ["0", "router", "lr=0.0", "0", "0"]


def test_table_shows_what_fell_where():
    groups = param_groups(Net(), PATTERNS)
    assert str(groups) == TABLE
    AdamW_BF16(groups, lr=0.1)  # fills its defaults into the dicts
    assert str(groups) == TABLE
    single = nn.Sequential(nn.Linear(2, 2, bias=False))
    assert str(param_groups(single, {})).split()[-1] == "0.weight"
    lazy = nn.LazyLinear(4)
    assert str(param_groups(lazy, {})).splitlines()[1].split()[-3:] == ["1", "0", "weight"]


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, AdamW_BF16])
def test_optimizers_take_the_groups(optimizer_class):
    model = Net()
    optimizer = optimizer_class(param_groups(model, PATTERNS), lr=0.1, weight_decay=0.2)
    assert [group["param_names"] for group in optimizer.param_groups] == EXPECTED
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.1, 0.0),
        (0.5, 0.2),
        (0.1, 0.2),
    ]
    optimizer.load_state_dict(optimizer.state_dict())


def test_step_is_that_of_groups_by_hand(tmp_path):
    model, other = Net(), Net()
    options = {**PATTERNS, "router": {"lr": 9.0}}
    optimizer = AdamW_BF16(param_groups(model, options, allow_empty=True), lr=0.1, weight_decay=0.2)
    params = dict(other.named_parameters())
    by_hand = [
        {"params": [params[name] for name in names], **values}
        for names, values in zip(EXPECTED, [*PATTERNS.values(), {}], strict=True)
    ]
    expected = AdamW_BF16(by_hand, lr=0.1, weight_decay=0.2)
    for one, stepped in ((model, optimizer), (other, expected)):
        backward(one)
        stepped.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    path = save(tmp_path, 1, model, optimizer)
    backward(model)
    optimizer.step()
    load(path, model, optimizer)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def compiled(module):
    return torch.compile(module, backend="eager")


def test_names_of_compiled_and_checkpointed_models_are_those_of_the_plain_one():
    model = Net()
    model.blocks[0] = checkpoint_wrapper(compiled(model.blocks[0]))
    for wrapped in (model, compiled(model), checkpoint_wrapper(compiled(model))):
        assert [group["param_names"] for group in param_groups(wrapped, PATTERNS)] == EXPECTED
    with pytest.raises(ValueError, match="matches no parameter"):
        param_groups(compiled(model), {"_orig_mod": {}})


def sharded_worker(rank, world, kind):
    model, mesh = Net(), init_device_mesh("cpu", (world,))
    if kind == "fsdp2":
        for i in range(2):
            model.blocks[i] = checkpoint_wrapper(model.blocks[i])
            fully_shard(model.blocks[i], mesh=mesh)
        model = fully_shard(model, mesh=mesh)
    else:
        options = {"device_mesh": mesh, "device_id": torch.device("cpu")}
        options["use_orig_params"] = kind == "fsdp1"
        model.blocks[1] = FullyShardedDataParallel(model.blocks[1], **options)
        model = compiled(FullyShardedDataParallel(model, **options))
    groups = param_groups(model, PATTERNS)
    optimizer = AdamW_BF16(groups, lr=0.1, weight_decay=0.2)
    backward(model)
    optimizer.step()
    return [group["param_names"] for group in groups], str(groups)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_names_of_sharded_models_are_those_of_the_plain_one(kind):
    for names, table in run_ranks(2, sharded_worker, kind):
        assert names == EXPECTED
        assert kind == "fsdp1" or table == TABLE


def flattened_worker(rank, world):
    with pytest.raises(ValueError, match="flattened several parameters into one"):
        sharded_worker(rank, world, "fsdp1_flat")


def test_flattened_parameters_cannot_be_grouped():
    run_ranks(2, flattened_worker)
