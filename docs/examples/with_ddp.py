"""DDP: equal bits on all ranks, and a resumed run continues bit for bit.

torchrun --nproc-per-node 2 docs/examples/with_ddp.py
"""

import tempfile

import torch.distributed as dist
from common import bits, build_model, loss_of, same_bits, trains_in_bf16
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import AdamW_BF16, load, save


def build():
    model = DistributedDataParallel(build_model())
    optimizer = AdamW_BF16(model.named_parameters(), lr=1e-2)
    return model, optimizer


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        loss = loss_of(model, step, dist.get_rank())
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step(zero_grad=True)
        losses.append(loss.item())
    return losses


dist.init_process_group("gloo")
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)

model, optimizer = build()
losses = train(model, optimizer, range(30))
save(folder[0], 30, model, optimizer)
losses += train(model, optimizer, range(30, 60))

resumed_model, resumed_optimizer = build()
start = load(folder[0], resumed_model, resumed_optimizer).step
train(resumed_model, resumed_optimizer, range(start, 60))

assert losses[-1] < losses[0] / 4, losses
assert trains_in_bf16(optimizer)
assert same_bits(bits(optimizer), bits(resumed_optimizer))
optimizer.check_replicas()  # raises if a rank has other bits
print(
    f"rank {dist.get_rank()} of {dist.get_world_size()}: loss {losses[0]:.2f} -> {losses[-1]:.3f}"
)
dist.destroy_process_group()
