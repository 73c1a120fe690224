"""A training script of the usual kind, for AdamW: it knows nothing of Nexus.

Accumulation with a scaled loss, mixed precision with a GradScaler, clipping, a warm-up and a cosine schedule for each
iteration, evaluations, checkpoints that it resumes from, DistributedDataParallel that reduces in the last micro-step.
"""

from __future__ import annotations

import contextlib
import math
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

batch_size, block_size, vocabulary, width = 8, 16, 32, 16
gradient_accumulation_steps = 4
max_iters, eval_interval, eval_iters = 24, 8, 4
learning_rate, min_lr, warmup_iters = 1e-2, 1e-3, 4
weight_decay, beta1, beta2, grad_clip = 0.1, 0.9, 0.95, 1.0


class Model(nn.Module):
    """One causal attention block over characters."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(block_size, width)
        self.norm, self.attend = nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=False)
        self.out, self.head = nn.Linear(width, width, bias=False), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, targets):
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        q, k, v = self.attend(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def get_batch(split, i, rank):
    generator = torch.Generator().manual_seed(10**6 * (split == "val") + 1000 * rank + i)
    start = torch.randint(vocabulary, (batch_size, 1), generator=generator)
    stride = torch.randint(1, 4, (batch_size, 1), generator=generator)
    tokens = (start + stride * torch.arange(block_size + 1)) % vocabulary
    return tokens[:, :-1], tokens[:, 1:]


def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    ratio = (it - warmup_iters) / (max_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


def main(checkpoint=None, resume=False, stop=max_iters, dtype="float32"):
    ddp = dist.is_available() and dist.is_initialized()
    rank = dist.get_rank() if ddp else 0
    torch.manual_seed(1337)
    model = Model()
    iter_num, losses, evaluations = 0, [], []
    if resume:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        iter_num = saved["iter_num"]
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2))
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == "float16")
    if resume:
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
    raw_model = model
    if ddp:
        model = DistributedDataParallel(model)
    ctx = contextlib.nullcontext() if dtype == "float32" else torch.autocast("cpu", torch.bfloat16)

    @torch.no_grad()
    def estimate_loss():
        model.eval()
        with ctx:
            found = [float(model(*get_batch("val", i, 0))[1]) for i in range(eval_iters)]
        model.train()
        return sum(found) / len(found)

    while True:
        lr = get_lr(iter_num)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        if iter_num % eval_interval == 0:
            evaluations.append(estimate_loss())
            if checkpoint is not None and rank == 0:
                torch.save(
                    {
                        "model": raw_model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "scaler": scaler.state_dict(),
                        "iter_num": iter_num,
                    },
                    f"{checkpoint}.new",
                )
                os.replace(f"{checkpoint}.new", checkpoint)
        if iter_num >= stop:
            break
        for micro_step in range(gradient_accumulation_steps):
            if ddp:
                model.require_backward_grad_sync = micro_step == gradient_accumulation_steps - 1
            with ctx:
                _, loss = model(*get_batch("train", gradient_accumulation_steps * iter_num + micro_step, rank))
                loss = loss / gradient_accumulation_steps
            losses.append(loss.item() * gradient_accumulation_steps)
            scaler.scale(loss).backward()
        if grad_clip != 0.0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        iter_num += 1
    return raw_model, optimizer, losses, evaluations
