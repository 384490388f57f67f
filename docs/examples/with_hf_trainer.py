"""Hugging Face Trainer: one argument, and a resumed run continues bit for bit.

python docs/examples/with_hf_trainer.py
"""

import tempfile

import torch
from common import bits, same_bits, trains_in_bf16
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from sharded_bf16_adamw import AdamW_BF16

text = torch.arange(16).repeat(6)
dataset = [{"input_ids": text[i : i + 32], "labels": text[i : i + 32]} for i in range(64)]
config = LlamaConfig(
    vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)


def build(folder):
    set_seed(0)
    args = TrainingArguments(
        folder,
        max_steps=20,
        save_steps=10,
        logging_steps=1,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        LlamaForCausalLM(config).bfloat16(),
        args,
        train_dataset=dataset,
        # The Trainer passes its groups with weight_decay, but not learning_rate.
        optimizer_cls_and_kwargs=(AdamW_BF16, {"lr": args.learning_rate}),
    )
    return trainer


folder = tempfile.mkdtemp()
trainer = build(folder)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

resumed = build(folder)
resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-10")

assert losses[-1] < losses[0] / 2, losses
assert trains_in_bf16(trainer.optimizer)
assert same_bits(bits(trainer.optimizer), bits(resumed.optimizer))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}; the resumed run has the same bits")
