"""A CPU that plays a GPU with memory of its own: what is "on the host" lies in an arena, all else "on the device"."""

from __future__ import annotations

import mmap

import inside
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Host:
    """Host memory of `size` bytes, shared and so told apart from all that allocators give. used: bytes given out."""

    def __init__(self, size: int = 2**24):
        self.memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        self.begin, self.end, self.used = self.memory.data_ptr(), self.memory.data_ptr() + size, 0

    def zeros(self, numel, dtype):
        start = -(-self.used // 64) * 64
        self.used = start + numel * dtype.itemsize
        assert self.used <= len(self.memory)
        return self.memory[start : self.used].view(dtype).zero_()

    def has_address(self, address):
        return self.begin <= address < self.end

    def holds(self, tensor):
        return self.has_address(tensor.data_ptr())


class TwoMemories(TorchFunctionMode):
    """Raises where PyTorch is asked to compute with tensors of the host: a GPU could not, together with its own, and
    the CPU would not wait for what the GPU still writes. They may be copied."""

    def __init__(self, host: Host):
        super().__init__()
        self.host = host

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = args[:1] if function is Tensor.__deepcopy__ else args  # beside it what else was copied
        tensors = [t for t in tree_leaves((given, kwargs)) if isinstance(t, Tensor) and t.numel()]
        places = {self.host.holds(tensor) for tensor in tensors}
        if len(places) == 2 and function is not Tensor.copy_:
            raise RuntimeError(f"{function} of tensors on the host and on the device")
        result = function(*args, **kwargs)
        if True not in places or not isinstance(result, Tensor) or not result.numel():
            return result
        if function is Tensor.to and isinstance(args[1], torch.device):
            return result.clone()  # what a GPU would make of it
        if not self.host.holds(result) and result is not args[0]:
            if function not in (Tensor.clone, Tensor.__deepcopy__):
                raise RuntimeError(f"{function} of a tensor on the host")
            result = self.host.zeros(result.numel(), result.dtype).view(result.shape).copy_(result)
        return result


def offload(patch, host: Host, wait_for=lambda device: None) -> None:
    """Has `offload=True` allocate from `host`, on a CPU."""
    inside.offload_on_cpu(patch, host.zeros, wait_for)
