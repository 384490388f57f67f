"""accelerate with FSDP1 or FSDP2: bfloat16 shards, and a resumed run continues bit for bit.

torchrun --nproc-per-node 2 docs/examples/with_accelerate.py --fsdp 2
torchrun --nproc-per-node 2 docs/examples/with_accelerate.py --fsdp 1
"""

import argparse
import tempfile

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from common import bits, build_model, loss_of, same_bits, trains_in_bf16

from sharded_bf16_adamw import AdamW_BF16, load, save

parser = argparse.ArgumentParser()
parser.add_argument("--fsdp", type=int, choices=(1, 2), required=True)
version = parser.parse_args().fsdp
plugin = FullyShardedDataParallelPlugin(fsdp_version=version, state_dict_type="SHARDED_STATE_DICT")
# With mixed_precision="bf16" accelerate would make the sharded weights float32.
accelerator = Accelerator(
    mixed_precision="no", fsdp_plugin=plugin, cpu=not torch.cuda.is_available()
)
if not torch.cuda.is_available():  # accelerate itself turns FSDP on for accelerators only
    PartialState().distributed_type = DistributedType.FSDP
    PartialState().device = torch.device("cpu")
    AcceleratorState().fsdp_plugin = plugin


def build():
    model = build_model()
    if version == 2:  # accelerate gives the optimizer the sharded parameters
        optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(AdamW_BF16(model.parameters(), lr=1e-2))
    return model, optimizer


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        loss = loss_of(model, step, accelerator.process_index)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
model, optimizer = build()
losses = train(model, optimizer, range(30))
if version == 2:
    accelerator.save_state(folder[0])
else:  # under FSDP1, load_state would leave any optimizer's states at zero
    save(folder[0], 30, model, optimizer)
losses += train(model, optimizer, range(30, 60))
expected = bits(optimizer)

assert losses[-1] < losses[0] / 4, losses
assert trains_in_bf16(optimizer)
accelerator.free_memory(model, optimizer)
model, optimizer = build()
if version == 2:
    accelerator.load_state(folder[0])
else:
    load(folder[0], model, optimizer)
train(model, optimizer, range(30, 60))
assert same_bits(expected, bits(optimizer))
print(f"rank {accelerator.process_index}: loss {losses[0]:.2f} -> {losses[-1]:.3f}; same bits")
accelerator.end_training()
