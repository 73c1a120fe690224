"""A model on several processes, whole or sharded: its gradients, its weights, what is sent."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def model(dtype=torch.float32):
    """Sizes that four ranks divide, do not divide and cannot all have a part of."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 1)
    return nn.Sequential(*layers).to(dtype)


def spread(kind, module):
    """Shards the model over all ranks in one of the ways that PyTorch offers; returns it."""
    n = dist.get_world_size()
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("replicate", "shard"))
    elif kind in ("tensor parallel", "2d"):
        both = init_device_mesh("cpu", (n // 2, 2), mesh_dim_names=("data", "tensor"))
        mesh = both["data"]
        parallelize_module(module, both["tensor"], {"2": ColwiseParallel(), "4": RowwiseParallel()})
    else:
        mesh = init_device_mesh("cpu", (n,))
    if kind != "tensor parallel":
        options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if kind == "offload" else {}
        for layer in module[:-1]:  # the last is the root's own, which stays gathered after a forward pass
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh, **options)
        fully_shard(module, mesh=mesh, **options)
    return module


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gradients(params, step, *, scale=1.0):
    """The same for a model and its sharded twin."""
    generator = torch.Generator().manual_seed(step)
    return [scale * torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def give(params, whole_gradients):
    for param, gradient in zip(params, whole_gradients, strict=True):
        if isinstance(param, DTensor):
            gradient = distribute_tensor(gradient, param.device_mesh, param.placements)
        param.grad = gradient


def equal_but_for_the_norm(ours, expected):
    """The norm is summed in another order, in float64: γ/n may be off by its last unit, so a step of at most 0.05, a
    weight below 2 and AdamW's quotient each by one rounding in the storage dtype."""
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=1e-9)


class counted_collectives:
    """The reductions inside the block, each by its number of elements and of ranks."""

    def __enter__(self):
        self.real, calls = dist.all_reduce, []

        def all_reduce(tensor, *args, group=None, **kwargs):
            calls.append((tensor.numel(), dist.get_world_size(group)))
            return self.real(tensor, *args, group=group, **kwargs)

        dist.all_reduce = all_reduce
        return calls

    def __exit__(self, *_):
        dist.all_reduce = self.real
