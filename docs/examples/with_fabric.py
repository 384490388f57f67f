"""Lightning Fabric: bf16-true, and fabric.save and fabric.load continue bit for bit.

python docs/examples/with_fabric.py
"""

import tempfile

from common import bits, build_model, loss_of, same_bits, trains_in_bf16
from lightning.fabric import Fabric

from sharded_bf16_adamw import AdamW_BF16

fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")


def build():
    model = build_model()  # bfloat16 before the optimizer sees it
    model, optimizer = fabric.setup(model, AdamW_BF16(model.parameters(), lr=1e-2))
    return model, optimizer


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        loss = loss_of(model, step)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


path = f"{tempfile.mkdtemp()}/checkpoint.pt"
model, optimizer = build()
losses = train(model, optimizer, range(30))
fabric.save(path, {"model": model, "optimizer": optimizer})
losses += train(model, optimizer, range(30, 60))

resumed_model, resumed_optimizer = build()
fabric.load(path, {"model": resumed_model, "optimizer": resumed_optimizer})
train(resumed_model, resumed_optimizer, range(30, 60))

assert losses[-1] < losses[0] / 4, losses
assert trains_in_bf16(optimizer)
assert same_bits(bits(optimizer), bits(resumed_optimizer))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}; the resumed run has the same bits")
