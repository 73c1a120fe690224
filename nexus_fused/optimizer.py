"""NexusAdamW: its options, parameter groups and state, in torch.optim's form. See base.py for its methods."""

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

    With `inner_steps=None`, keep a loop that accumulates gradients. Each backward pass that reaches the parameters
    takes an inner step when it ends, and frees its gradients. `step()` ends the cycle after any number of passes: it
    returns to the start of the walk, θ, and applies AdamW to the displacement. GradScaler still sees one gradient per
    device, of 0, or of inf after an overflow.

    With `inner_steps=K` (default 4), call `step()` after the backward pass of every micro-batch, and accumulate
    nothing. The first K-1 calls of a cycle move the weights along the walk. The last one takes the last inner step and
    AdamW's step. Source: arXiv 2604.09258, Algorithm 3.

    Args:
        params: tensors, (name, tensor) pairs or parameter groups, as for torch.optim.AdamW. Dtypes: float64, float32,
            bfloat16, float16, complex64, complex128. Gradients must be dense, and may have another floating dtype
            (`p.grad_dtype`). Below float32 the state holds a `remainder`, 16 bits that extend the parameter to a
            float32 weight. The constructor may move `p.data` into flat memory, once; values and identity stay.
        lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as for torch.optim.AdamW. `lr` may be a tensor of
            one element; each group gets its own copy. With `capturable=True` one CUDA graph may capture a whole cycle,
            K backward passes with their `step()`; with `inner_steps=None` also a single backward pass. See `step`.
        inner_lr: γ, the length of an inner step, > 0. Each group may have its own. May be a tensor of one element.
        inner_steps: K, the micro-batches in a cycle, the same for all groups; None: `step()` ends the cycle. K = 1 is
            AdamW on g/‖g‖.
        normalize_displacement: True gives AdamW D/Γ, where Γ is the length of the walk, so that `lr`, `eps` and `betas`
            keep AdamW's meaning. False gives it D, as the paper does.
        inner_lr_follows_lr: γ_k = inner_lr · max(lr/base_lr, 0.1). base_lr is the group's learning rate when it was
            added, or the peak (`max_lr`) that a OneCycleLR recorded.
        displacement_dtype: dtype of the displacement, in memory and when it is averaged over a `displacement_group`.
            torch.bfloat16, torch.float32, or None. None means bfloat16 up to 32 inner steps or with `inner_steps=None`,
            else float32. Displacements of float64 parameters are float64.
        offload: True keeps the moments, and the `anchor` of local walks, in pinned host memory, where kernels on a GPU
            reach them once per cycle. It saves 8 bytes per parameter on the device (float32 and below), and results
            stay the same bit for bit. Reading `state`, saving, copying and loading then wait for the device. Tensors of
            the state are CPU tensors; the next outer step writes them whenever the device gets there. If memory
            cannot be pinned, RuntimeError says how many bytes. For DTensors on a mesh of GPUs the state's
            local parts are on the CPU, so its collectives (`full_tensor()`, loading into another layout) need a process
            group with both backends: `init_process_group("cpu:gloo,cuda:nccl")`. For parameters on a CPU it changes
            nothing.
        foreach: accepted with any value, and has no effect.
        differentiable: must be False.
        fused: True demands a fused backend, False selects the reference, None takes the best there is.
        backend: None (best for each device), "reference", "cpu", "triton" or "cuda". One that you name but that cannot
            run raises RuntimeError.
        flatten: True moves parameters that own their memory into flat buffers. False leaves all where they are.
        norm_group: a process group whose ranks hold other parameters of the same model, such as the stages of a
            pipeline. ‖g‖ then covers the gradients of all of them, and they skip a step together. It holds one
            rank of each stage, those at this rank's place in the other dimensions of the mesh
            (`mesh.get_group("pp")`); sums over shards come first. Put parameters that all of its ranks hold, such as
            the layers around experts, into a parameter group with `"replicated": True`: they count once.
        displacement_group: a process group whose ranks hold the same parameters but walk on their own. Each takes the
            inner steps of its own micro-batches. Gradients are not reduced over the group: leave out
            DistributedDataParallel, or run forward and backward passes under its `no_sync()`. Once per cycle D and Γ
            are averaged, w ← AdamW(θ, mean D / mean Γ): one average instead of K. θ is kept too (`anchor`, float32), so
            that it stays equal on all ranks. All ranks start from the same weights, and call `step()` and
            `outer_step()` together. AdamW's hyperparameters are averaged over the ranks that walked. In mid-cycle each
            rank has its own walk: every rank must save its own model and state then, and if other code writes to a
            weight, RuntimeError is raised (writes through `p.data` go unseen).

    Parameters may be DTensors, of FSDP2's `fully_shard` or of tensor parallelism, on any device mesh. Each rank updates
    its part, and the norm is summed over the ranks that parameters are sharded over. A plain tensor next to DTensors is
    treated as replicated. All ranks call `step()` together. Where ranks communicate, the constructor, loading and
    `add_param_group()` check that all ranks agree on inner_steps, the cycle's position and the parameters. With
    TORCH_DISTRIBUTED_DEBUG=INFO or DETAIL each step checks it too. A difference raises RuntimeError on all ranks; the
    error names it.

    Bad options and parameters raise ValueError or TypeError, which names the parameter group, before anything is
    modified.
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
        """Adds a parameter group as torch.optim does. In mid-cycle it joins the walk here, with a Γ of its own."""
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
        """Gives a group that torch.optim has just appended the keys that ours have."""
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
