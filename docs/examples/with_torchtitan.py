"""torchtitan: a container of optimizers that knows AdamW_BF16, and its checkpoints.

torchrun --nproc-per-node 2 docs/examples/with_torchtitan.py
"""

import tempfile
from dataclasses import dataclass

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import bits, build_model, loss_of, same_bits, trains_in_bf16
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
)

from sharded_bf16_adamw import AdamW_BF16


class BF16Optimizers(OptimizersContainer):
    """torchtitan's container with one more name."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name):
        if name == "AdamW_BF16":
            return AdamW_BF16
        return OptimizersContainer._resolve_optimizer_factory(name)


# In a config registry: Trainer.Config(optimizer=BF16Optimizers.Config(...),
# training=TrainingConfig(dtype="bfloat16", ...))
config = BF16Optimizers.Config(
    implementation="for-loop",  # "fused" is for torch's optimizers
    param_groups=[
        ParamGroupConfig(
            pattern="bias$",
            optimizer_name="AdamW_BF16",
            optimizer_kwargs={"lr": 1e-2, "weight_decay": 0.0},
        ),
        ParamGroupConfig(
            pattern=".*",
            optimizer_name="AdamW_BF16",
            optimizer_kwargs={"lr": 1e-2, "weight_decay": 0.1},
        ),
    ],
)


def build():
    model = fully_shard(build_model())
    optimizers = config.build(model_parts=[model])
    schedule = LRSchedulersContainer.Config(warmup_steps=5)
    return model, optimizers, schedule.build(optimizers=optimizers, training_steps=60)


def train(model, optimizers, schedulers, steps):
    losses = []
    for step in steps:
        loss = loss_of(model, step, dist.get_rank())
        loss.backward()
        optimizers.step()
        schedulers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    return losses


dist.init_process_group("gloo")
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
model, optimizers, schedulers = build()
losses = train(model, optimizers, schedulers, range(30))
state = {"model": get_model_state_dict(model), "optimizer": optimizers.state_dict()}
dcp.save({**state, "lr_scheduler": schedulers}, checkpoint_id=folder[0])
losses += train(model, optimizers, schedulers, range(30, 60))

resumed_model, resumed_optimizers, resumed_schedulers = build()
state = {"model": get_model_state_dict(resumed_model), "optimizer": resumed_optimizers}
dcp.load({**state, "lr_scheduler": resumed_schedulers}, checkpoint_id=folder[0])
set_model_state_dict(resumed_model, state["model"])
train(resumed_model, resumed_optimizers, resumed_schedulers, range(30, 60))

(optimizer,), (resumed_optimizer,) = optimizers, resumed_optimizers
assert losses[-1] < losses[0] / 4, losses
assert trains_in_bf16(optimizer)
assert same_bits(bits(optimizer), bits(resumed_optimizer))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}; the resumed run has the same bits")
dist.destroy_process_group()
