"""torch.compile: compile the model, not the step; checkpoints load with and without compilation.

python docs/examples/with_compile.py
"""

import tempfile

import torch
from common import bits, build_model, loss_of, same_bits, trains_in_bf16

from sharded_bf16_adamw import AdamW_BF16, load, save

# Leave backend= out in your code. The default needs a C++ compiler and compiles for a minute.
model = torch.compile(build_model(), backend="aot_eager")
optimizer = AdamW_BF16(model.parameters(), lr=1e-2)


def train_step(step):
    loss = loss_of(model, step)
    loss.backward()
    optimizer.step(zero_grad=True)  # one call of a fused kernel: nothing is left to compile
    return loss.item()


losses = [train_step(step) for step in range(40)]

folder = tempfile.mkdtemp()
save(folder, 40, model, optimizer)
plain_model = build_model()
plain_optimizer = AdamW_BF16(plain_model.parameters(), lr=1e-2)
load(folder, plain_model, plain_optimizer)

assert losses[-1] < losses[0] / 4, losses
assert trains_in_bf16(optimizer)
assert same_bits(bits(optimizer), bits(plain_optimizer))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}; the checkpoint loads into the plain model")
