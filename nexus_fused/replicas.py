"""Whether the replicas that DistributedDataParallel keeps equal take the same steps. DDP does not introduce itself to
an optimizer, so its instances are looked for among all objects, once, if torch.distributed runs. Each says which
forward passes had their gradients reduced.
"""

from __future__ import annotations

import functools
import gc
import math
import sys
import warnings
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class Replica:
    """One instance of DDP. reduces: whether it reduces the gradients of the last forward pass that has some. reduced:
    whether it did in the last backward pass. None before the first one seen.
    """

    def __init__(self, module: DistributedDataParallel, param: Tensor) -> None:
        self.module = weakref.ref(module)
        self.reduces: bool | None = None
        self.reduced: bool | None = None
        module.register_forward_hook(_ForwardHook(self))
        param.register_post_accumulate_grad_hook(functools.partial(_note_backward, weakref.ref(self)))

    def note_backward(self) -> None:
        """Notes that a backward pass is under way."""
        module = self.module()
        if module is not None:
            # Any forward pass sets the first flag, one without gradients too.
            flags = module.require_forward_param_sync or module.require_backward_grad_sync
            self.reduced = flags if self.reduces is None else self.reduces

    @property
    def waits(self) -> bool:
        """Whether its gradients are this rank's own. The hook of one parameter does not see passes without it."""
        return self.reduced is False and not self.reduces


class _ForwardHook:
    """Notes what DDP does with the gradients of a forward pass; a pickled module gets another one instead."""

    def __init__(self, replica: Replica | None = None) -> None:
        self._replica = (lambda: None) if replica is None else weakref.ref(replica)

    def __call__(self, module: Any, *_: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        replica = self._replica()
        if replica is not None:
            replica.reduces = module.require_backward_grad_sync

    def __reduce__(self) -> Any:
        return _ForwardHook, ()


def _note_backward(replica: weakref.ref[Replica], _: Tensor) -> None:
    known = replica()
    if known is not None and not torch.compiler.is_compiling():
        known.note_backward()


class Replicas:
    """The instances of DDP that reduce the gradients of one optimizer's parameters, if there are other ranks."""

    def __init__(self) -> None:
        self.outdated = True  # parameters came
        self._found: list[Replica] = []
        self._told = False

    def find(self, groups: list[dict[str, Any]]) -> None:
        """Looks for instances that hold parameters of these groups, which takes about 0.1 s."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        ours = {id(param) for group in groups for param in group["params"]}
        known = [replica.module() for replica in self._found]
        for module in [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]:
            reduced = [
                param
                for name, param in module.module.named_parameters()
                if id(param) in ours and param.requires_grad and name not in module.parameters_to_ignore
            ]
            if reduced and dist.get_world_size(module.process_group) > 1 and all(module is not it for it in known):
                self._found.append(Replica(module, reduced[0]))
        self.outdated = not self._found

    def check_reduced(self, groups: list[dict[str, Any]], walkers: Any, *, ends_pass: bool) -> None:
        """Raises RuntimeError if gradients are this rank's own and nobody averages what comes of them: replicas would
        part for good. Warns once if `walkers`, the process group that averages D, got reduced ones. ends_pass: a
        backward pass has just ended, else step() was called.
        """
        what = "this backward pass" if ends_pass else "this step()"
        if self.outdated:
            known = len(self._found)
            self.find(groups)
            self.outdated = False
            for replica in self._found[known:] if ends_pass else ():  # before any other forward pass
                replica.note_backward()
        for replica in self._found:
            module, waits = replica.module(), replica.waits
            if module is None or replica.reduced is None:  # no backward pass was seen yet
                continue
            averaged = walkers is not None and _members(module.process_group) <= _members(walkers)
            if waits and not averaged and not _is_averaged_by_others(module):
                raise RuntimeError(
                    f"DistributedDataParallel did not reduce the gradients of {what}: it ran under no_sync(), or with "
                    "require_backward_grad_sync=False. Each rank would walk on its own, and replicas diverge. Do one "
                    "of these. (1) Reduce every pass: leave out no_sync(); in Accelerate and the Hugging Face Trainer "
                    "set sync_each_batch=True. (2) Give displacement_group: each rank walks on its own, and D is "
                    "averaged at the end of the cycle. (3) Merge several passes into one inner step: have the last of "
                    "them reduced, and call step() after it, or with inner_steps=None run them inside "
                    "one_micro_batch(). (4) To average weights yourself, train ddp.module, without the "
                    "DistributedDataParallel around it"
                )
            if averaged and not waits and not self._told:
                self._told = True
                warnings.warn(
                    f"DistributedDataParallel reduced the gradients of {what}, and displacement_group averages D over "
                    "the same ranks: both are sent, and D alone would do. Keep model.no_sync() open around the whole "
                    "training loop (frameworks' own no_sync() may stand inside; a loop that sets "
                    "require_backward_grad_sync must leave it False), or train without DistributedDataParallel",
                    stacklevel=1,
                )

    def compare(self, sq_norms: list[Tensor]) -> None:
        """Compares ‖g‖ with the other replicas' if torch.distributed was asked to look for mistakes; waits for the
        device then.
        """
        if self._found and dist.get_debug_level() != dist.DebugLevel.OFF and not _capturing():
            norm = sum(float(part.sum()) for part in sq_norms) ** 0.5
            modules = [replica.module() for replica in self._found]
            groups = [m.process_group for m in modules if m is not None and not m._join_config.enable]
            for group in dict.fromkeys(groups):
                compare_norms([norm], group, "in step()")


def _members(group: Any) -> set[int]:
    return set(dist.get_process_group_ranks(group))


def _is_averaged_by_others(module: Any) -> bool:
    """Returns whether Accelerate's LocalSGD averages the weights of this module; asked only before an error."""
    kind = getattr(sys.modules.get("accelerate.local_sgd"), "LocalSGD", None)
    return kind is not None and any(
        type(found) is kind and found.enabled and found.model is module for found in gc.get_objects()
    )


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def compare_norms(norms: list[float], group: Any, when: str, of: str = "gradients") -> None:
    """Raises RuntimeError on all ranks of a group if their norms differ by more than a thousandth, since reductions may
    run in another order on each. An empty list is no norm to compare. of: what the norms are of.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, [-1.0 if math.isnan(norm) else norm for norm in norms], group=group)
    known = [(rank, there) for rank, there in zip(dist.get_process_group_ranks(group), everyone, strict=True) if there]
    for rank, there in known[1:]:
        for a, b in zip(known[0][1], there, strict=False):
            if not math.isclose(a, b, rel_tol=1e-3):
                raise RuntimeError(
                    f"ranks disagree {when} about the norm of {of}: {_shown(a)} on rank {known[0][0]}, {_shown(b)} on "
                    f"rank {rank}, so the replicas drift apart. Where parameters are each rank's own, as experts are, "
                    "build the optimizer with norm_group=<these ranks> and give the groups of the parameters that all "
                    'of them hold "replicated": True. Otherwise reduce the gradients over these ranks before step(), '
                    "or compare only ranks that are replicas, in a process group of their own"
                )


def _shown(norm: float) -> str:
    return "nan" if norm < 0 else f"{norm:.6g}"
