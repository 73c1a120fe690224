"""A script for Hugging Face's Trainer, with AdamW."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, get_scheduler, set_seed

STEPS = 12


def main() -> tuple[torch.optim.Optimizer, torch.nn.Module]:
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    tokens = (torch.arange(64)[:, None] + torch.arange(16)) % 32
    data = [{"input_ids": row, "labels": row} for row in tokens]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=4, use_cpu=True,
            logging_steps=STEPS, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, schedule))
        trainer.train()
    return trainer.optimizer, model


if __name__ == "__main__":
    main()
