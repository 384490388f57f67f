"""torch's learning-rate schedulers: the rates are those of torch.optim.AdamW, also after a resume.

python docs/examples/with_schedulers.py
"""

import tempfile

import torch
from common import bits, build_model, loss_of, same_bits
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from sharded_bf16_adamw import AdamW_BF16, load, save


def schedule(optimizer):
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=5)
    return SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, T_max=35)], [5])


def train(model, optimizer, scheduler, steps):
    lrs = []
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        lrs.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return lrs


folder = tempfile.mkdtemp()
model = build_model()
optimizer = AdamW_BF16(model.parameters(), lr=1e-2)  # lr=, not lr_function=
scheduler = schedule(optimizer)
lrs = train(model, optimizer, scheduler, range(20))
save(folder, 20, model, optimizer, extra={"scheduler": scheduler.state_dict()})
lrs += train(model, optimizer, scheduler, range(20, 40))

resumed_model = build_model()
resumed_optimizer = AdamW_BF16(resumed_model.parameters(), lr=1e-2)
resumed_scheduler = schedule(resumed_optimizer)
result = load(folder, resumed_model, resumed_optimizer)  # after the scheduler was built
resumed_scheduler.load_state_dict(result.extra["scheduler"])
train(resumed_model, resumed_optimizer, resumed_scheduler, range(result.step, 40))

torch_model = build_model()
torch_optimizer = torch.optim.AdamW(torch_model.parameters(), lr=1e-2)
assert lrs == train(torch_model, torch_optimizer, schedule(torch_optimizer), range(40))
assert same_bits(bits(optimizer), bits(resumed_optimizer))
print(f"learning rates of torch.optim.AdamW: {lrs[0]:.4f}, peak {max(lrs):.4f}, {lrs[-1]:.6f}")
