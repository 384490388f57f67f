"""PEFT LoRA: bfloat16 adapters with corrections, a float32 norm, and a resume bit for bit.

python docs/examples/with_peft.py
"""

import tempfile
from collections import Counter

import torch
from common import batch, bits, same_bits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from sharded_bf16_adamw import AdamW_BF16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(16, 64).bfloat16()
        self.norm = nn.LayerNorm(64)  # stays float32
        self.down = nn.Linear(64, 1).bfloat16()

    def forward(self, x):
        return self.down(self.norm(self.up(x).float()).bfloat16())


def build_optimizer(model):
    optimizer = AdamW_BF16((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    return optimizer


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = (model(x).float() - y.float()).square().mean()
        loss.backward()
        optimizer.step(zero_grad=True)
        losses.append(loss.item())
    return losses


folder = tempfile.mkdtemp()
lora = LoraConfig(r=4, target_modules=["up", "down"], modules_to_save=["norm"])
# PEFT makes adapters float32 unless autocast_adapter_dtype=False.
model = get_peft_model(Model(), lora, autocast_adapter_dtype=False)
optimizer = build_optimizer(model)
losses = train(model, optimizer, range(50))
model.save_pretrained(folder)
torch.save(optimizer.state_dict(), f"{folder}/optimizer.pt")
losses += train(model, optimizer, range(50, 100))

resumed_model = PeftModel.from_pretrained(
    Model(), folder, is_trainable=True, autocast_adapter_dtype=False
)
resumed_optimizer = build_optimizer(resumed_model)
resumed_optimizer.load_state_dict(torch.load(f"{folder}/optimizer.pt"))
train(resumed_model, resumed_optimizer, range(50, 100))

dtypes = Counter(param.dtype for param in optimizer.param_groups[0]["params"])
assert dtypes == {torch.bfloat16: 4, torch.float32: 2}, dtypes
assert losses[-1] < losses[0] / 4, losses
assert same_bits(bits(optimizer), bits(resumed_optimizer))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}; the resumed run has the same bits")
