"""Whether the replicas that DistributedDataParallel keeps equal take the same steps.

DDP does not tell an optimizer of itself, so its instances are looked for among all objects, once, where
torch.distributed runs. Each says which forward passes had their gradients reduced.
"""

from __future__ import annotations

import functools
import gc
import math
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class Replica:
    """One instance of DDP. reduced: whether it reduced the gradients of the last backward pass; None before the first
    that is seen."""

    def __init__(self, module: DistributedDataParallel, param: Tensor) -> None:
        self.module = weakref.ref(module)
        self.reduced: bool | None = None
        param.register_post_accumulate_grad_hook(functools.partial(_note, weakref.ref(self)))

    @property
    def waits(self) -> bool:
        """Whether its gradients are this rank's own.

        Any forward pass sets DDP's flag, one without gradients too; the hook knows the backward pass, but not where
        its parameter had no part in it.
        """
        module = self.module()
        return module is not None and self.reduced is False and not module.require_forward_param_sync


def _note(replica: weakref.ref[Replica], _: Tensor) -> None:
    """The hook: was the forward pass of this backward pass one that DDP reduces?"""
    known = replica()
    module = None if known is None else known.module()
    if module is not None and not torch.compiler.is_compiling():
        known.reduced = module.require_forward_param_sync  # type: ignore[union-attr]


class Replicas:
    """The instances of DDP that reduce the gradients of one optimizer's parameters, where there are other ranks."""

    def __init__(self) -> None:
        self.outdated = True  # parameters came
        self._found: list[Replica] = []
        self._waited: bool | None = None  # whether the gradients of the last step were this rank's own, if known

    def find(self, groups: list[dict[str, Any]]) -> None:
        """Looks for instances that hold parameters of these groups, which takes some 0.1 s."""
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

    def forget(self) -> None:
        """Has the next step's gradients be of either kind: a state was loaded, which replicas have in common."""
        self._waited = None

    def check_reduced(self, groups: list[dict[str, Any]], position: int, inner_steps: int) -> None:
        """Raises RuntimeError where some steps take gradients that DDP reduced and others this rank's own.

        None of them reduced is for those who average weights themselves, from a boundary on: position is 0 there.
        """
        if self.outdated:
            self.find(groups)
            self.outdated = False
        if not self._found or self._found[0].reduced is None:
            return
        waits = any(replica.waits for replica in self._found)
        if self._waited is not None and waits != self._waited and (position > 0 or (inner_steps == 1 and self._waited)):
            raise RuntimeError(
                f"DistributedDataParallel {'did not reduce' if waits else 'reduced'} the gradients of this step() and "
                f"{'reduced' if waits else 'did not reduce'} those of the one before (its no_sync(), or "
                "require_backward_grad_sync), so that replicas part: leave that away and call step() once after each "
                "backward pass, or only after the last one, which is reduced; or give displacement_group, with which "
                "each rank walks on its own"
            )
        self._waited = waits

    def compared(self, sq_norms: list[Tensor]) -> list[Tensor]:
        """`sq_norms` as they are. Where torch.distributed was asked to look for mistakes, compares ‖g‖ with the other
        replicas' before, which waits for the device."""
        if self._found and dist.get_debug_level() != dist.DebugLevel.OFF and not _capturing():
            norm = sum(float(part.sum()) for part in sq_norms) ** 0.5
            modules = [replica.module() for replica in self._found]
            groups = [m.process_group for m in modules if m is not None and not m._join_config.enable]
            for group in dict.fromkeys(groups):
                compare_norms([norm], group, "in step()")
        return sq_norms


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def compare_norms(norms: list[float], group: Any, when: str, of: str = "gradients") -> None:
    """Raises RuntimeError on all ranks of a group if their norms differ by more than a thousandth: reductions may have
    other orders on each. An empty list is no norm to compare. of: what the norms are of."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, [-1.0 if math.isnan(norm) else norm for norm in norms], group=group)
    known = [(rank, there) for rank, there in zip(dist.get_process_group_ranks(group), everyone, strict=True) if there]
    for rank, there in known[1:]:
        for a, b in zip(known[0][1], there, strict=False):
            if not math.isclose(a, b, rel_tol=1e-3):
                raise RuntimeError(
                    f"ranks disagree {when} about the norm of {of}: {_shown(a)} on rank {known[0][0]}, {_shown(b)} on "
                    f"rank {rank}, with which replicas part. Where parameters are each rank's own, as experts are, "
                    "build the optimizer with norm_group=<these ranks> and give the groups of the parameters that all "
                    'of them hold "replicated": True. Else reduce the gradients over these ranks before step(), or '
                    "compare only ranks that are replicas, in a process group of theirs"
                )


def _shown(norm: float) -> str:
    return "nan" if norm < 0 else f"{norm:.6g}"
