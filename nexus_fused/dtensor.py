"""DTensors and their local parts. Each look takes a DTensor's local part as it lies, once: PyTorch would dispatch
operations on DTensors one by one.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


def dtensor_type() -> Any:
    """Returns torch.distributed.tensor.DTensor if somebody has imported it; without that there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_dtensor(tensor: Any) -> bool:
    """Returns whether this is a tensor that a DeviceMesh holds together."""
    kind = dtensor_type()
    return kind is not None and isinstance(tensor, kind)


def local_part(tensor: Any) -> Tensor:
    """Returns this rank's part of a DTensor, in the same memory; any other tensor unchanged."""
    part: Tensor = tensor
    if is_dtensor(tensor):
        with torch.no_grad():
            part = tensor.to_local()
            part = part.wait() if hasattr(part, "wait") else part  # its values may still be under way
    return part


def as_part_of(local: Tensor, like: Any) -> Tensor:
    """Returns a DTensor whose part on this rank is `local`, in its memory, laid out as `like` is; `local` itself if
    `like` is no DTensor.
    """
    if is_dtensor(like):
        layout, shape, stride = (like.device_mesh, like.placements), like.shape, like.stride()
        if local.dim() > like.dim():  # pairs in place of complex numbers: see flat.shaped_like
            shape, stride = torch.Size((*shape, 2)), (*(2 * step for step in stride), 1)
        elsewhere = local.device.type != like.device_mesh.device_type
        part = local.to("meta") if elsewhere else local
        made = dtensor_type().from_local(part, *layout, run_check=False, shape=shape, stride=stride)
        if elsewhere:  # `from_local` would have moved it to the mesh's devices
            names, context = made.__tensor_flatten__()
            inner = {name: getattr(made, name) for name in names}
            inner = {name: local if isinstance(value, Tensor) else value for name, value in inner.items()}
            made = dtensor_type().__tensor_unflatten__(inner, context, made.shape, made.stride())
        local = made
    return local


def part_like(value: Any, like: Any) -> Tensor:
    """Returns this rank's part of `value`, a DTensor or a whole tensor, laid out as `like` is. Communicates only for a
    DTensor in another layout.
    """
    if is_dtensor(like):
        layout = like.device_mesh, like.placements
        if is_dtensor(value):
            value = value.redistribute(*layout)
        else:
            tensor = sys.modules["torch.distributed.tensor"]
            value = tensor.distribute_tensor(value.to(like.device), *layout, src_data_rank=None)
    return local_part(value)


def same_layout(a: Any, b: Any) -> bool:
    """Returns whether two tensors are DTensors spread alike over one mesh, or neither is a DTensor."""
    if not is_dtensor(a) or not is_dtensor(b):
        return not is_dtensor(a) and not is_dtensor(b)
    return bool(a.device_mesh == b.device_mesh and a.placements == b.placements)


def why_not(param: Any) -> str | None:
    """Says why this DTensor, or another engine's parameter, cannot be updated, and what to do; None if it can."""
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        return (
            "belongs to FullyShardedDataParallel (FSDP1), which shows flattened shards that change from step to step: "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if hasattr(param, "ds_id"):
        return (
            "is a placeholder of DeepSpeed's ZeRO-3, whose values lie elsewhere: use "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if is_dtensor(param):
        if param.device_mesh.get_coordinate() is None:
            return "is a DTensor on a mesh without this rank: give each rank the parameters that it holds"
        if any(placement.is_partial() for placement in param.placements):
            return "is a DTensor of partial sums, and no rank has its values: redistribute it to Shard or Replicate"
        if type(local_part(param)) is not Tensor:
            return f"is a DTensor of {type(local_part(param)).__name__}: use DTensors of plain tensors"
    return None


def checksum(param: Any) -> str:
    """Returns a checksum of the bits of this rank's part of a parameter; of its shape if it is sparse or has no memory.
    Waits for its device.
    """
    if is_lazy(param):
        return "uninitialized"
    local = local_part(param).detach()
    if local.layout is not torch.strided or local.device.type == "meta":
        return str(tuple(local.shape))
    if local.is_complex():
        local = torch.view_as_real(local.resolve_conj())
    return hex(int(bits(local.resolve_neg().contiguous().view(-1)).sum(dtype=torch.int64)) % 2**64)


def bits(tensor: Tensor) -> Tensor:
    """Returns a real tensor's bits as integers, in the same memory."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()])


def shard_ranks(param: Any) -> tuple[int, ...]:
    """Returns the ranks, this one among them, that share out a parameter's elements; () if this rank has all."""
    if not is_dtensor(param):
        return ()
    mesh, placements = param.device_mesh, param.placements
    where = [
        slice(None) if not placement.is_replicate() else coordinate
        for placement, coordinate in zip(placements, mesh.get_coordinate(), strict=True)
    ]
    ranks = mesh.mesh[tuple(where)].flatten().tolist()
    return tuple(ranks) if len(ranks) > 1 else ()


def find_fsdp_modules(params: list[Tensor]) -> list[weakref.ref[Any]]:
    """Returns the modules under `fully_shard` that hold these parameters. Nothing public leads from a parameter to its
    module, so this asks the garbage collector for all objects, which takes about 0.1 s. It runs when DTensors are
    registered: later a module may show its gathered weights in their place. Modules that were hidden from the
    collector (`gc.freeze()`) are not found.
    """
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    ours = {id(param) for param in params if is_dtensor(param)}
    if fsdp is None or not ours:
        return []
    modules = [found for found in gc.get_objects() if issubclass(type(found), fsdp)]
    return [weakref.ref(module) for module in modules if any(id(param) in ours for param in module.parameters())]


def reduces_gradients(module: Any) -> bool:
    """Returns whether a module under `fully_shard` reduces the gradients of each backward pass."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return all(group is None or (group.reduce_grads and group.all_reduce_grads) for group in groups)


def follow_passes(module: Any, listener: Any) -> None:
    """Makes a module under `fully_shard` call `before_reduction()` of `listener` in each backward pass before it
    reduces gradients, and `after_reduction()`, if it is the root, when all are reduced, as long as `listener` lives.
    Nothing public tells of the end, so the calls wrap two methods of the module's state, once for all listeners.
    """
    state = module._get_fsdp_state()
    listeners = getattr(state, "_nexus_listeners", None)
    if listeners is None:
        listeners = state._nexus_listeners = weakref.WeakSet()
        begin, end = state._pre_backward, state._root_post_backward_final_callback

        def pre_backward(grad: Tensor) -> Any:
            for each in listeners:
                each.before_reduction()
            return begin(grad)

        def root_post_backward_final_callback() -> None:
            end()
            for each in listeners:
                each.after_reduction()

        state._pre_backward, state._root_post_backward_final_callback = pre_backward, root_post_backward_final_callback
    listeners.add(listener)
