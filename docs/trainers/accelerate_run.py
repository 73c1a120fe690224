"""NexusAdamW under Accelerate, in two processes on a CPU.

    torchrun --nproc-per-node 2 docs/trainers/accelerate_run.py --accumulate    # on GPUs: accelerate launch

What to watch for with --accumulate (inner_steps=None; the loop is AdamW's):
* accumulate() reduces the gradients of the last micro-batch only. So with several processes give displacement_group,
  with which each walks on its own, and keep no_sync() open around the loop: D is averaged instead, once in a cycle.
* Checkpoints right after step() hold θ.
And without (inner_steps=4, a step() after each micro-batch):
* Accelerator(gradient_accumulation_steps=1), the default: with more, Accelerate leaves out the step() of the other
  micro-batches. A warning says so at the second step() that gets through.
In both:
* A scheduler that went through prepare() is stepped once per process at every step: with P processes a schedule of n
  micro-batches is P·n steps long. Kept out of prepare(), or with step_scheduler_with_optimizer=False, it is n.
* prepare() wraps the optimizer in an object that passes on only what every optimizer has, eval() and train(): keep a
  name for your own, whose outer_weights(), metrics() and outer_step() you need.
* save_state() and load_state() may fall anywhere in a cycle. Weights to publish are saved inside outer_weights().
  (use_seedable_sampler makes Accelerate shuffle an epoch that was resumed half-way as it did before.)
* With mixed_precision="fp16" an overflow skips the inner step on the device, where Accelerate cannot see it: its
  optimizer_step_was_skipped stays False and a prepared scheduler advances. metrics() counts the skipped steps.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, set_seed
from torch import nn

from nexus_fused import NexusAdamW

K = 4
MICRO_BATCHES = 6 * K
SAVE_AFTER = 2 * K + 2  # in mid-cycle


def train(
    folder: str,
    *,
    resume: bool = False,
    mixed_precision: str = "no",
    accumulation: int = 1,
    inner_steps: int | None = K,
) -> tuple[nn.Module, NexusAdamW, float]:
    """Trains, or goes on from the checkpoint in `folder`; `inner_steps` may be None with an `accumulation` of K.

    Returns the model, its optimizer and the loss of θ when it is saved (NaN after resuming).
    """
    set_seed(0)
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulation,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    save_after = SAVE_AFTER if accumulation == 1 else 2 * K
    walks_alone = accumulation > 1 and accelerator.num_processes > 1
    group = torch.distributed.group.WORLD if walks_alone else None
    nexus = NexusAdamW(model.parameters(), lr=1e-2, inner_lr=0.05, inner_steps=inner_steps, displacement_group=group)
    steps = MICRO_BATCHES // accumulation
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(nexus, steps * accelerator.num_processes)
    x = torch.randn(8 * MICRO_BATCHES * accelerator.num_processes, 8)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True).sin())
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    wrapped, optimizer, loader, scheduler = accelerator.prepare(model, nexus, loader, scheduler)  # `nexus` stays ours
    if resume:
        accelerator.load_state(folder)
        loader = skip_first_batches(loader, save_after)
    loss_of_theta = float("nan")
    with accelerator.no_sync(wrapped) if walks_alone else contextlib.nullcontext():
        for done, (inputs, targets) in enumerate(loader, start=save_after + 1 if resume else 1):
            with accelerator.accumulate(wrapped):  # can be left out where gradient_accumulation_steps is 1
                accelerator.backward(nn.functional.mse_loss(wrapped(inputs), targets))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if done == save_after and not resume:
                accelerator.save_state(folder)
                with nexus.outer_weights(), torch.no_grad():
                    loss_of_theta = float(nn.functional.mse_loss(model(data.tensors[0]), data.tensors[1]))
    accelerator.wait_for_everyone()
    return model, nexus, loss_of_theta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder that receives what each process ends with")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--accumulate", action="store_true", help="inner_steps=None under accumulate()")
    args = parser.parse_args()
    options = {"accumulation": K, "inner_steps": None} if args.accumulate else {}
    accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision)
    with tempfile.TemporaryDirectory() as own:
        folder = broadcast_object_list([own])[0]
        model, nexus, loss = train(folder, mixed_precision=args.mixed_precision, **options)
        resumed, resumed_nexus, _ = train(folder, resume=True, mixed_precision=args.mixed_precision, **options)
        accelerator.wait_for_everyone()  # before the folder goes
    rank = accelerator.process_index
    print(f"process {rank}: loss of θ {loss:.4f}, alignment {nexus.metrics()['alignment']:.2f}")
    if args.out:
        ends = [(m.state_dict(), o.state_dict()) for m, o in ((model, nexus), (resumed, resumed_nexus))]
        torch.save({"unbroken": ends[0], "resumed": ends[1]}, args.out / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
