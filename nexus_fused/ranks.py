"""What ranks exchange: sums over shards, sums over ranks that walk on their own, comparisons. The collectives on
process groups are here: tensors go in, and come out reduced. (dtensor.py redistributes DTensors that are laid out
otherwise than they should be.)
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .dtensor import find_fsdp_modules, is_dtensor, local_part, reduces_gradients, shard_ranks
from .replicas import Replicas, compare_norms


class Spread(NamedTuple):
    """Where the elements of a parameter lie. ranks: those that share them out, from `shard_ranks`. replicated: whether
    other ranks of `norm_group` have the same elements, as their groups say.
    """

    ranks: tuple[int, ...] = ()
    replicated: bool = False


WHOLE = Spread()  # this rank has all of it


class Ranks:
    """The ranks that an optimizer's result depends on, and what is exchanged with them. norm_group: ranks with other
    parameters of the model, whose norms are added. displacement_group: ranks with the same parameters and walks of
    their own, whose displacements are averaged. The parameters tell of shards. Raises TypeError for what is no
    process group of this rank.
    """

    def __init__(self, norm_group: Any = None, displacement_group: Any = None) -> None:
        check_group(norm_group, "norm_group")
        check_group(displacement_group, "displacement_group")
        self.norm_group, self.displacement_group = norm_group, displacement_group
        self.modules: list[weakref.ref[Any]] = []  # under fully_shard
        self.replicas = Replicas()
        self._known: set[int] = set()  # ids of the parameters whose modules were looked for
        # Of each sum over shards: groups to sum over in turn, a device of theirs, the classes that count on this rank,
        # whether they are replicated.
        self._sums: list[tuple[list[Any], torch.device, set[Spread], bool]] = []
        self._replicated: dict[int, bool] = {}  # of each group with parameters here
        self._summed: set[Spread] = set()  # the classes that have a part in one of them, on some rank

    @property
    def communicates(self) -> bool:
        """Whether steps communicate."""
        return bool(self._sums) or self.has_groups

    @property
    def has_groups(self) -> bool:
        """Whether it was built with process groups."""
        return self.norm_group is not None or self.displacement_group is not None

    def follow(self, entries: list[tuple[int, int, Any]], groups: list[dict[str, Any]]) -> None:
        """Learns where the elements of these parameters lie: all that are stepped, each with its group and its place.

        If the ranks of one class of parameters contain those of another, such as (data, tensor) and (data), one sum
        serves both: the smaller one's parameters are replicated over the other dimensions of the mesh, and only the
        replica with the first rank counts. A plain tensor next to DTensors is treated as replicated too. What is
        replicated within `norm_group` has sums of its own, since it counts on one rank of that group only.
        """
        for index, group in enumerate(groups):
            if group["replicated"] and self.norm_group is None:
                raise ValueError(
                    f"replicated=True of parameter group {index} says that all ranks of norm_group have its "
                    "parameters, but there is no norm_group: give the constructor one, or leave replicated out"
                )
        params = [param for *_, param in entries]
        classes: dict[Spread, Any] = {}
        for index, _, param in entries:
            classes.setdefault(Spread(shard_ranks(param), groups[index]["replicated"]), param)
        self._check_overlap(list(classes))
        if self.displacement_group is not None:
            _check_devices(params, self.displacement_group)

        def inside(small: Spread, large: Spread) -> bool:
            return small.replicated == large.replicated and set(small.ranks) <= set(large.ranks)

        largest = [c for c in classes if c.ranks and not any(c != other and inside(c, other) for other in classes)]
        new = [param for param in params if id(param) not in self._known]
        self.modules += [module for module in find_fsdp_modules(new) if module not in self.modules]
        self._known, self.replicas.outdated = set(map(id, params)), True
        sums: list[tuple[list[Any], torch.device, set[Spread], bool]] = []
        taken: set[Spread] = set()
        for large in largest:
            members = {other for other in classes if inside(other, large) and other not in taken}
            taken |= members
            for other in members:
                _check_submesh(classes[other], classes[large])
            counted = {other for other in members if large.ranks[0] in (other.ranks or (dist.get_rank(),))}
            device = torch.device(classes[large].device_mesh.device_type)
            sums.append((_groups_of(large.ranks, classes[large]), device, counted, large.replicated))
        self._sums, self._summed = sums, taken
        self._replicated = {index: groups[index]["replicated"] for index, *_ in entries}

    def check_groups(self, groups: list[dict[str, Any]]) -> None:
        """Raises ValueError if a group's `replicated` has changed since its parameters were followed."""
        for index, replicated in self._replicated.items():
            if groups[index]["replicated"] != replicated:
                raise ValueError(
                    f"replicated of parameter group {index} was changed from {replicated} to "
                    f"{groups[index]['replicated']}: change it back; it is fixed once the group has been added"
                )

    def _check_overlap(self, classes: list[Spread]) -> None:
        """Raises ValueError if ranks that share a parameter out are also given as ranks with other ones, or with
        copies.
        """
        for name, group in (("norm_group", self.norm_group), ("displacement_group", self.displacement_group)):
            members = set() if group is None else set(dist.get_process_group_ranks(group))
            apart = [ranks for ranks, replicated in classes if not (replicated and name == "norm_group")]
            shared = next((ranks for ranks in apart if len(members & set(ranks)) > 1), None)
            if shared is not None:
                beside = ', or give the parameters that all of them share a group with "replicated": True'
                raise ValueError(
                    f"{name} has the ranks {_shown(sorted(members))}, but a parameter is sharded over the ranks "
                    f"{_shown(shared)}: give it those along another dimension of the mesh, mesh.get_group(<its name>)"
                    f"{beside if name == 'norm_group' else ''}"
                )

    @property
    def norm_is_shared(self) -> bool:
        """Whether the norm covers gradients of other ranks."""
        return bool(self._sums) or self.norm_group is not None

    def compare_replicas(self, parts: list[tuple[Spread, Tensor]]) -> None:
        """Compares ‖g‖² of the whole tensors that count on one rank only, if torch.distributed was asked to look for
        mistakes; waits for the device then. parts: as for `add`.
        """
        if dist.get_debug_level() == dist.DebugLevel.OFF:
            return
        groups = [(group, replicated) for groups, *_, replicated in self._sums for group in groups]
        if self.norm_group is not None:
            groups.append((self.norm_group, True))
        for group, replicated in groups:
            whole = [float(value) for of, value in parts if of == (WHOLE.ranks, replicated)]
            norms = [sum(whole) ** 0.5] if whole else []
            compare_norms(norms, group, "in step()", "gradients of parameters that count as replicated")

    def add(self, parts: list[tuple[Spread, Tensor]], what: str) -> list[Tensor]:
        """Sums over all ranks what each knows of its own parameters only. The results, added up, are the whole.

        parts: float64 tensors of one shape on all ranks, each with the class of the parameters that it describes. One
        tensor is reduced for each set of ranks that no other set contains (for each dimension of the mesh, unless these
        are all ranks), and one over `norm_group`, where the first rank counts what is replicated.
        """
        totals = [(of.replicated, value) for of, value in parts if of not in self._summed]
        for groups, device, counted, replicated in self._sums:
            counting = [value.to(device) for of, value in parts if of in counted]
            total = sum(counting, torch.zeros_like(parts[0][1], device=device))
            for group in groups:
                with explained(f"the sum of {what} over the shards", group):
                    dist.all_reduce(total, group=group)
            totals.append((replicated, total))
        values = [value for _, value in totals]
        if self.norm_group is not None:
            first = dist.get_rank(self.norm_group) == 0
            device = _device_of(self.norm_group, values[0].device)
            counting = [value.to(device) for replicated, value in totals if first or not replicated]
            total = sum(counting, torch.zeros_like(values[0], device=device))
            with explained(f"the sum of {what} over norm_group", self.norm_group):
                dist.all_reduce(total, group=self.norm_group)
            values = [total]
        return values

    @property
    def walkers(self) -> int:
        """The number of ranks that average their displacements."""
        return dist.get_world_size(self.displacement_group)

    def sum_over_walkers(self, tensors: list[Tensor]) -> None:
        """Sums each tensor over `displacement_group`, in place and all at once. Waits for no device."""
        with explained("the average of displacements", self.displacement_group):
            under_way: list[Any] = []
            errors: list[RuntimeError] = []
            try:
                for tensor in tensors:
                    under_way.append(dist.all_reduce(tensor, group=self.displacement_group, async_op=True))
            except RuntimeError as error:
                errors.append(error)
            for reduction in under_way:  # all of them, or one would still write when its memory is θ's again
                try:
                    reduction.wait()
                except RuntimeError as error:
                    errors.append(error)
            if errors:
                raise errors[0]

    def anywhere(self, flag: bool) -> bool:
        """Returns whether it is so on any rank that communicates with this one; waits for all of them."""
        groups = [group for members, *_ in self._sums for group in members]
        for group in [*groups, *(g for g in (self.norm_group, self.displacement_group) if g is not None)]:
            found = torch.full((1,), float(flag), device=_device_of(group, torch.device("cpu")))
            dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
            flag = bool(found)
        return flag

    def check_reduced(self, groups: list[dict[str, Any]], *, ends_pass: bool) -> None:
        """Raises RuntimeError if gradients were not reduced over the ranks that need it. ends_pass: a backward pass has
        just ended, else step() was called.
        """
        self.replicas.check_reduced(groups, self.displacement_group, ends_pass=ends_pass)
        for known in self.modules:
            module = known()
            if module is not None and not reduces_gradients(module):
                raise RuntimeError(
                    f"FSDP2 did not reduce the gradients of this {'backward pass' if ends_pass else 'step()'} "
                    "(set_requires_gradient_sync(False), or set_requires_all_reduce(False)): it adds up those of "
                    "several backward passes, but each pass must take its own inner step. Leave it True for every pass "
                    "(in Accelerate and the Hugging Face Trainer sync_each_batch=True). To walk without reduction, "
                    "shard over one dimension of the mesh and pass the other as displacement_group"
                )

    def reshard(self) -> None:
        """Frees the gathered weights of FSDP2 modules, so that the next forward
        pass gathers what the shards hold then.
        """
        for known in self.modules:
            module = known()
            if module is not None:
                module.reshard()

    def check(self, here: dict[str, Any], of_params: dict[str, Any], walks: dict[str, Any] | None, when: str) -> None:
        """Raises RuntimeError on all ranks that communicate if they disagree; it names the first difference.

        here: what must be the same on all of them, replicated parameters too. of_params: what must be the same on all
        except over `norm_group`. walks: replaces or extends `here` over `displacement_group`; None: do not compare
        there. Waits for all ranks, and for the device.
        """
        everything = {**here, **of_params}
        sums = [(groups, here if replicated else everything) for groups, *_, replicated in self._sums]
        groups = [(group, shared) for members, shared in sums for group in members]
        if self.displacement_group is not None and walks is not None:
            groups.append((self.displacement_group, {**everything, **walks}))
        if self.norm_group is not None:
            groups.append((self.norm_group, here))
        found = None
        for group, shared in groups:  # all of them whatever was found: others wait there
            found = difference({"an earlier comparison": found, **shared}, group, when) or found
        if found is not None:
            raise RuntimeError(found)


def _groups_of(ranks: tuple[int, ...], param: Any) -> list[Any]:
    """Returns the process groups to sum over, one after another, that make up these ranks: the default one if they are
    everybody, else those of the mesh's dimensions. A new group of our own would need ranks that have no part in it.
    """
    if len(ranks) == dist.get_world_size():
        return [dist.group.WORLD]
    mesh = param.device_mesh
    shards = [i for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    return [mesh.get_group(i) for i in shards if mesh.size(i) > 1]


def _check_submesh(small: Any, large: Any) -> None:
    """Raises ValueError unless `small` is replicated over the dimensions of the mesh that only `large` has."""
    if not is_dtensor(small) or small.device_mesh == large.device_mesh:
        return
    names, all_names = small.device_mesh.mesh_dim_names, large.device_mesh.mesh_dim_names
    if not names or not all_names or not set(names) <= set(all_names) or large.device_mesh[names] != small.device_mesh:
        raise ValueError(
            f"one parameter is sharded over {small.device_mesh} and another over {large.device_mesh}, which contains "
            "the ranks of the first but was not sliced to make it, so it is unknown whether the first parameter is "
            "replicated over the rest: shard both over one DeviceMesh with named dimensions and its submeshes"
        )


def check_group(group: Any, name: str) -> None:
    """Raises TypeError unless this is None or a process group of this rank."""
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a process group or None, but is {group!r}; this rank must be a member of it "
            "(torch.distributed.new_group, mesh.get_group)"
        )


def _check_devices(params: list[Tensor], group: Any) -> None:
    """Raises ValueError if parameters lie on a device that the group cannot reduce on."""
    able = [kind.type for kind in group._device_types]
    for device in {local_part(param).device.type for param in params}:
        if device not in able:
            raise ValueError(
                f"displacement_group reduces on {', '.join(able)}, but parameters are on {device}: make it with a "
                'backend for each, such as init_process_group("cpu:gloo,cuda:nccl")'
            )


def _device_of(group: Any, device: torch.device) -> torch.device:
    """Returns where a group reduces values of `device`: there if it can, else on the device that it is made for."""
    types = [kind.type for kind in group._device_types]
    return device if device.type in types else torch.device(types[0])


def difference(here: dict[str, Any], group: Any, when: str) -> str | None:
    """Returns the first difference between the ranks of a group, as an error tells it; None without one. Waits for
    them. A digest decides, so that agreement costs four numbers however large the model and the group are.
    """
    digest = hashlib.sha256(repr(here).encode()).digest()
    halves = [int.from_bytes(digest[i : i + 7], "big") for i in (0, 7)]
    bounds = torch.tensor([*halves, *(-half for half in halves)], device=_device_of(group, torch.device("cpu")))
    with explained(f"the comparison of ranks {when}", group):
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
        most, least = bounds.tolist()[:2], [-value for value in bounds.tolist()[2:]]
        if most == least:
            return None
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, here, group=group)
    ranks = dist.get_process_group_ranks(group)
    for key in dict.fromkeys(key for there in everyone for key in there):
        values = [there.get(key, "missing") for there in everyone]
        if any(value != values[0] for value in values):
            other = next(i for i, value in enumerate(values) if value != values[0])
            return (
                f"ranks disagree {when} about {key}: {values[0]} on rank {ranks[0]}, {values[other]} on rank "
                f"{ranks[other]}: build and load the optimizer in the same way on all ranks, and call step() and "
                "outer_step() equally often"
            )
    return None


@contextlib.contextmanager
def explained(what: str, group: Any) -> Iterator[None]:
    """Adds to a collective's error what it was for."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's, timeouts too
        raise RuntimeError(
            f"the optimizer on rank {dist.get_rank()}: {what} failed between ranks "
            f"{_shown(dist.get_process_group_ranks(group))}. Either one of them has stopped, or they did not all call "
            "step() and outer_step() equally often: log the micro-batches that each rank has seen. "
            f"What torch.distributed says: {error}"
        ) from error


def _shown(ranks: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]} … {ranks[-1]} ({len(ranks)})"
