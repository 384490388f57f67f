"""Lightning Trainer: bf16-true, and a checkpoint of the Trainer continues bit for bit.

python docs/examples/with_lightning.py
"""

import tempfile

import torch
from common import batch, bits, build_model, same_bits, trains_in_bf16
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from sharded_bf16_adamw import AdamW_BF16


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = build_model()
        self.losses = []

    def training_step(self, data, index):
        x, y = data
        loss = (self.model(x).float() - y.float()).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = AdamW_BF16(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def fit(epochs, checkpoint=None):
    module = Regression()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-true",
        max_epochs=epochs,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader([batch(step) for step in range(30)], batch_size=None)
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module, trainer


path = f"{tempfile.mkdtemp()}/half.ckpt"
fit(1)[1].save_checkpoint(path)
resumed = fit(2, path)[1].optimizers[0]
module, trainer = fit(2)
optimizer, losses = trainer.optimizers[0], module.losses

assert losses[-1] < losses[0] / 4, losses
assert trains_in_bf16(optimizer)
assert same_bits(bits(optimizer), bits(resumed))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}; the resumed run has the same bits")
