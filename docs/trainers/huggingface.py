"""NexusAdamW under the Hugging Face Trainer; a tiny GPT-2 from scratch, nothing is downloaded.

    python docs/trainers/huggingface.py

With inner_steps=None and gradient_accumulation_steps=K nothing else changes: what the Trainer counts in steps stays,
and checkpoints and evaluations see θ. (Its last update of an epoch may have fewer micro-batches: a shorter cycle.)

What to watch for with inner_steps=K:
* gradient_accumulation_steps=1 (the Trainer's default). Each optimizer step is one micro-batch, so what the Trainer
  counts in steps (max_steps, warmup, save_steps, eval_steps, logging_steps) are micro-batches, K to a cycle.
* max_grad_norm=0 turns the Trainer's clipping off. Its default of 1.0 is harmless here, as the walk is normalized, but
  reads and writes all gradients once more. (transformers 5 measures the norm for its log whatever you set.)
* A training that ends in mid-cycle ends on a point of the walk: make max_steps a multiple of K, or call
  trainer.optimizer.train() and trainer.optimizer.optimizer.outer_step() before you save the model.
* Checkpoints may fall anywhere: resuming continues bit for bit. In mid-cycle the saved model is a point of the walk;
  save_steps a multiple of K makes it θ, what you want to publish or to load as the best model.
* Evaluations show θ, wherever in a cycle they fall: the Trainer calls the optimizer's eval() and train(). It does not
  call train() before it saves, so a checkpoint right after an evaluation in mid-cycle holds θ and the start of the
  cycle, and a warning says so: let save_steps or eval_steps be a multiple of K.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, get_scheduler, set_seed

from nexus_fused import NexusAdamW

K = 4
HYPERPARAMETERS = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "inner_lr": 0.05, "inner_steps": K}


def make_model() -> GPT2LMHeadModel:
    set_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def make_data(samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards from a random start."""
    starts = torch.randint(0, 32, (samples, 1), generator=torch.Generator().manual_seed(seed))
    tokens = (starts + torch.arange(16)) % 32
    return [{"input_ids": row, "labels": row} for row in tokens]


def make_trainer(
    folder: str, *, max_steps: int = 10 * K, by_class: bool = False, inner_steps: int | None = K, **arguments: Any
) -> Trainer:
    """A Trainer with the optimizer built here or (`by_class`) by the Trainer, which then makes groups of its own.

    inner_steps: may be None with gradient_accumulation_steps=K; `max_steps` are cycles then.
    """
    model, hyperparameters = make_model(), {**HYPERPARAMETERS, "inner_steps": inner_steps}
    args = TrainingArguments(
        folder,
        max_steps=max_steps,
        max_grad_norm=0,
        per_device_train_batch_size=4,
        lr_scheduler_type="cosine",  # these three are read with `by_class`
        warmup_steps=2 * K,
        weight_decay=hyperparameters["weight_decay"],
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_steps": K, "use_cpu": True, **arguments},
    )
    data: dict[str, Any] = {"train_dataset": make_data(64, seed=1), "eval_dataset": make_data(8, seed=2)}
    if by_class:  # their lr and betas count, but TrainingArguments' weight_decay
        return Trainer(model, args, optimizer_cls_and_kwargs=(NexusAdamW, hyperparameters), **data)
    optimizer = NexusAdamW(model.parameters(), **hyperparameters)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2 * K, num_training_steps=max_steps)
    return Trainer(model, args, optimizers=(optimizer, scheduler), **data)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, eval_strategy="steps", eval_steps=14, save_strategy="steps", save_steps=30)
        trainer.train()
        # Another process would go on after micro-batch 30, in the middle of the eighth cycle:
        make_trainer(folder).train(resume_from_checkpoint=f"{folder}/checkpoint-30")
    print([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])


if __name__ == "__main__":
    main()
