"""NexusAdamW: options, groups and state of an optimizer as torch.optim knows it. For what it does, see base.py."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from . import options
from .base import WalkingOptimizer
from .frameworks import of_the_optimizer, on_its_own, uninterrupted
from .ranks import Ranks
from .walk import entries_of


class NexusAdamW(WalkingOptimizer):
    """AdamW whose gradient is the displacement of a short walk of normalized SGD steps, one per micro-batch.

    With `inner_steps=None` keep a loop that accumulates: each backward pass that reaches the parameters takes an inner
    step at its end and lets its gradients go (one parameter per device shows 0, or inf after an overflow, for
    GradScaler). `step()` ends the cycle, whatever the number of passes was: it returns to the start of the walk, θ, and
    applies AdamW to the displacement.

    With `inner_steps=K` (default 4) call `step()` after the backward pass of every micro-batch, without gradient
    accumulation. The first K-1 calls of a cycle move the weights along the walk; the last one takes the last step as
    well. Source: arXiv 2604.09258, Algorithm 3.

    Args:
        params: tensors, (name, tensor) pairs or parameter groups, as for torch.optim.AdamW. float64, float32, bfloat16,
            float16, complex64, complex128; dense gradients, of these dtypes or of another floating one
            (`p.grad_dtype`). Below float32 the state holds a `remainder`, 16 bits that make the weight float32.
            `p.data` may be re-pointed here, once, into flat memory; values and identity stay.
        lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as for torch.optim.AdamW. `lr` may be a tensor of
            one element, of which each group gets its own copy. With `capturable=True` a whole cycle, K backward passes
            with their `step()`, may be captured into one CUDA graph, or, where K is open, a backward pass; see `step`.
        inner_lr: γ, length of an inner step, > 0; per group; may be a tensor of one element.
        inner_steps: K, micro-batches in a cycle, one for the optimizer; None where `step()` ends it. 1 is AdamW on
            g/‖g‖.
        normalize_displacement: give AdamW D/Γ (Γ: the length of the walk) instead of D, so that `lr`, `eps` and
            `betas` keep AdamW's meaning. False is the paper's choice.
        inner_lr_follows_lr: γ_k = inner_lr · max(lr/base_lr, 0.1), with base_lr the group's learning rate when it was
            added, or the peak (`max_lr`) that a OneCycleLR recorded.
        displacement_dtype: of the displacement, kept in mid-cycle and averaged over a `displacement_group`:
            torch.bfloat16, torch.float32, or None: bfloat16 up to 32 inner steps or an open number, else float32.
            float64 parameters have float64.
        offload: True keeps the moments, and the `anchor` of local walks, in pinned host memory: kernels on a GPU reach
            them there, once in a cycle. 8 bytes per parameter (float32 and below) less on the device; results stay as
            they are, bit for bit. Reading `state`, saving, copying and loading wait for the device; tensors of the
            state are CPU tensors that the next outer step writes, whenever the device gets there. RuntimeError, naming
            the bytes, for memory that cannot be pinned. State of DTensors on a mesh of GPUs has its parts on the CPU
            then: collectives of it (`full_tensor()`, loading it in another layout) need a process group of both kinds,
            `init_process_group("cpu:gloo,cuda:nccl")`. Parameters on a CPU: no difference.
        foreach: accepted with any value; chooses nothing here.
        differentiable: must be False.
        fused: True demands a fused backend, False selects the reference, None the best there is.
        backend: None (best for each device), "reference", "cpu", "triton" or "cuda"; an explicit one that cannot
            run raises RuntimeError.
        flatten: move parameters that own their memory into flat buffers. False leaves all where they are.
        norm_group: a process group whose ranks hold other parameters of the same model, as the stages of a pipeline
            do: ‖g‖ is that of the gradients of all of them, and skipping is common. One rank of each stage, those with
            this one's place in the other dimensions of the mesh (`mesh.get_group("pp")`): shards are summed before.
            What all of its ranks hold, as the layers beside experts, is a group with `"replicated": True`: it counts
            once.
        displacement_group: a process group whose ranks hold the same parameters and walk on their own: each takes the
            inner steps of its own micro-batches, gradients are not reduced across them (leave DistributedDataParallel
            away, or run forward and backward passes under its `no_sync()`), and once in a cycle D and Γ are averaged
            over them, w ← AdamW(θ, mean D / mean Γ): one average in place of K. θ is kept beside (`anchor`, float32),
            so that it stays equal on all ranks. All ranks start from the same weights, and call `step()` and
            `outer_step()` together; AdamW's hyperparameters are the mean of those of the ranks that walked. In
            mid-cycle each has a walk of its own: what is saved then must be saved by every rank, for itself, and
            weights that others write raise RuntimeError (writes through `p.data` are not seen).

    Parameters may be DTensors, of FSDP2's `fully_shard` or tensor parallelism, on any device mesh: each rank updates
    its part, and the norm is summed over the ranks that parameters are sharded over; parameters beside them that are no
    DTensors count as replicated. All ranks call `step()` together. Where ranks communicate, construction, loading and
    `add_param_group()` compare inner_steps, the cycle's position and the parameters on all of them, and so does each
    step under TORCH_DISTRIBUTED_DEBUG=INFO or DETAIL: RuntimeError on all ranks that names the difference.

    Raises ValueError or TypeError that names the parameter group before anything is modified.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        inner_lr: float | Tensor = 1e-2,
        inner_steps: int | None = 4,
        normalize_displacement: bool = True,
        inner_lr_follows_lr: bool = True,
        displacement_dtype: torch.dtype | None = None,
        offload: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        flatten: bool = True,
        norm_group: Any = None,
        displacement_group: Any = None,
    ) -> None:
        steps = options.inner_steps(inner_steps)
        choices = (
            steps,
            backend,
            options.plain("fused", fused),
            flatten,
            displacement_dtype,
            options.offload(offload),
        )
        self._build(choices, Ranks(norm_group, displacement_group))
        self._known: set[Tensor] = set()  # the parameters of all groups
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,  # an AdamW that loads our state must stay AdamW
            "inner_lr": inner_lr,
            "inner_steps": steps,
            "normalize_displacement": normalize_displacement,
            "inner_lr_follows_lr": inner_lr_follows_lr,
            "replicated": False,
        }
        options.group_row({"base_lr": lr, **defaults}, 0, steps)
        super().__init__(params, defaults)
        self._take_groups(0, "at construction")
        self._built, self._state.entries.known = True, False
        self._walk.ranks.replicas.find(self.param_groups)

    # Parameters

    @of_the_optimizer
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group as torch.optim does; in mid-cycle it joins the walk from here, with a Γ of its own."""
        self._refuse_inside_outer_weights("add_param_group()")
        if self._built:
            self._state.follow_members()
        self._walk.check_writes()
        self._state.adopt()
        index = len(self.param_groups)
        unique = options.check_new_group(param_group, self.defaults, index, self.inner_steps, self._known)
        with uninterrupted():
            super().add_param_group(param_group)
            group = self.param_groups[index]
            try:
                self._complete(group, unique)
                if self._built:  # the constructor takes all groups at once
                    self._take_groups(index, "in add_param_group()")
                    self._show_again()
            except BaseException:
                self.param_groups.pop()
                self._known.difference_update(unique)
                if self._built:
                    self._walk.follow_ranks([], self.param_groups)
                raise

    def _complete(self, group: dict[str, Any], unique: list[Tensor]) -> None:
        """Makes a group that torch.optim has appended one of ours."""
        options.tidy(group)
        if len(unique) < len(group["params"]):  # the base class has warned
            if "param_names" in group:
                names = dict(zip(reversed(group["params"]), reversed(group["param_names"]), strict=True))
                group["param_names"] = [names[p] for p in unique]
            group["params"] = unique
        for key in ("lr", "inner_lr"):
            if isinstance(group[key], Tensor):  # schedulers write into it: each group needs its own
                group[key] = group[key].detach().clone()
        group["base_lr"] = float(group["lr"])
        self._known.update(unique)

    # Saving and loading

    @on_its_own
    def __getstate__(self) -> dict[str, Any]:
        return {**self._state_to_copy(), **super().__getstate__()}

    @on_its_own
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Builds tables around copied or unpickled parameters and state."""
        groups, entries = state["param_groups"], dict(state["state"])
        self._build(state["_choices"], Ranks())
        self._known = set()
        super().__setstate__({"defaults": state["defaults"], "param_groups": groups, "state": defaultdict(dict)})
        loaded = [dict(group) for group in groups]
        params = entries_of(groups)
        self._known.update(p for *_, p in params)
        self._state.register(params, flatten=self._walk.flatten, known=entries)
        self._state.restore(loaded, {p: entry for p, entry in entries.items() if isinstance(p, Tensor)})
        self._state.entries.state.update({key: value for key, value in entries.items() if not isinstance(key, Tensor)})
        self._take_rest(state)
