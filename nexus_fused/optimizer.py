"""NexusAdamW: where a cycle stands and what happens next. No arithmetic: see reference.py and cycle.py for that."""

from __future__ import annotations

import contextlib
import functools
import operator
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import zip_longest
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, checkpoint, dtensor, frameworks, graphs, hyperparameters, reference
from .cycle import GROUP_KEYS, HYPER, Cycle, MicroBatch, combine, summarize
from .dtensor import local_part
from .flat import Segment, make_segment, real_dtype
from .ranks import Ranks, check_group, difference
from .table import Table

_KEEP_FLAT = "an alias of a parameter keeps it out of flat memory: build the optimizer before others take views, or "
_KEEP_FLAT += "with flatten=False"

Method = TypeVar("Method", bound=Callable[..., Any])


def _of_the_optimizer(method: Method) -> Method:
    """Has a method that sets attributes work on the optimizer itself, also where it is called on a host's wrapper.

    Lightning's wrappers imitate the class of what they wrap, so our methods run with a wrapper as `self`. Reading its
    attributes reaches the optimizer, but whatever they set would stay in the wrapper, unseen by the next `step()`.
    """

    @functools.wraps(method)
    def call(self: NexusAdamW, *args: Any, **kwargs: Any) -> Any:
        return method(self._itself(), *args, **kwargs)

    return cast(Method, call)


class NexusAdamW(Optimizer):
    """AdamW whose gradient is the displacement of a short walk of normalized SGD steps, one per micro-batch.

    Call `step()` after the backward pass of every micro-batch, without gradient accumulation or clipping. Of
    `inner_steps` calls (K, one cycle) the first K-1 move the weights along the walk; the last one takes the last step,
    returns to the start θ and applies AdamW to the displacement. Source: arXiv 2604.09258, Algorithm 3.

    Args:
        params: tensors, (name, tensor) pairs or parameter groups, as for torch.optim.AdamW. float64, float32, bfloat16,
            float16, complex64, complex128; dense gradients. Below float32 the state holds a float32 master. `p.data`
            may be re-pointed here, once, into flat memory; values and identity stay.
        lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as for torch.optim.AdamW. `lr` may be a tensor of
            one element, of which each group gets its own copy. With `capturable=True` a whole cycle, K backward passes
            with their `step()`, may be captured into one CUDA graph; see `step`.
        inner_lr: γ, length of an inner step, > 0; per group; may be a tensor of one element.
        inner_steps: K, micro-batches in a cycle, one for the optimizer. 1 is AdamW on g/‖g‖.
        normalize_displacement: give AdamW D/Γ (Γ: the length of the walk) instead of D, so that `lr`, `eps` and
            `betas` keep AdamW's meaning. False is the paper's choice.
        inner_lr_follows_lr: γ_k = inner_lr · max(lr/base_lr, 0.1), with base_lr the group's learning rate when it was
            added, or the peak (`max_lr`) that a OneCycleLR recorded.
        foreach: accepted with any value; chooses nothing here.
        differentiable: must be False.
        fused: True demands a fused backend, False selects the reference, None the best there is.
        backend: None (best for each device), "reference", "cpu", "triton" or "cuda"; an explicit one that cannot
            run raises RuntimeError.
        flatten: move parameters that own their memory into flat buffers. False leaves all where they are.
        norm_group: a process group whose ranks hold other parameters of the same model, as the stages of a pipeline
            do: ‖g‖ is that of the gradients of all of them, and skipping is common. One rank of each stage, those with
            this one's place in the other dimensions of the mesh (`mesh.get_group("pp")`): shards are summed before, and
            replicas must not be in one group.
        displacement_group: a process group whose ranks hold the same parameters and walk on their own: each takes the
            inner steps of its own micro-batches, gradients are not reduced across them (leave DistributedDataParallel
            away, or run forward and backward passes under its `no_sync()`), and once in a cycle D and Γ are averaged
            over them, θ ← AdamW(θ, mean D / mean Γ): a K-th of the communication, and no memory beside. All ranks start
            from the same weights, and call `step()` and `outer_step()` together; AdamW's hyperparameters are the mean
            of those of the ranks that walked. In mid-cycle each has a walk of its own: what is saved then must be saved
            by every rank, for itself, and weights that others write raise RuntimeError.
        displacement_dtype: torch.bfloat16 has displacements of bfloat16 parameters rounded to it for the average,
            which halves what is sent; None: they are float32.

    Parameters may be DTensors, of FSDP2's `fully_shard` or tensor parallelism, on any device mesh: each rank updates
    its part, and the norm is summed over the ranks that parameters are sharded over; parameters beside them that are no
    DTensors count as replicated. All ranks call `step()` together. Where ranks communicate, construction, loading and
    `add_param_group()` compare inner_steps, the cycle's position and the parameters on all of them, and so does each
    step under TORCH_DISTRIBUTED_DEBUG=INFO or DETAIL: RuntimeError on all ranks that names the difference.

    Raises ValueError or TypeError that names the parameter group before anything is modified.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands over `grad_scale` and `found_inf`

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
        inner_steps: int = 4,
        normalize_displacement: bool = True,
        inner_lr_follows_lr: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        flatten: bool = True,
        norm_group: Any = None,
        displacement_group: Any = None,
        displacement_dtype: torch.dtype | None = None,
    ) -> None:
        self._configure(hyperparameters.inner_steps(inner_steps), backend, fused, flatten)
        self._ranks = Ranks(norm_group, displacement_group, displacement_dtype)
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
            "inner_steps": self._inner_steps,
            "normalize_displacement": normalize_displacement,
            "inner_lr_follows_lr": inner_lr_follows_lr,
        }
        hyperparameters.group_row({"base_lr": lr, **defaults}, 0, self._inner_steps)
        super().__init__(params, defaults)
        self._built = True
        self._compare_ranks("at construction", weights=[p for group in self.param_groups for p in group["params"]])

    def _configure(self, inner_steps: int, backend: str | None, fused: bool | None, flatten: bool) -> None:
        self._itself = weakref.ref(self)
        self._watch = frameworks.AccumulationWatch()
        backends.check_choice(backend, fused)
        self._inner_steps = inner_steps
        self._backend, self._fused, self._flatten = backend, fused, flatten
        self._tables: dict[tuple[torch.device, torch.dtype, tuple[int, ...]], Table] = {}
        self._cycles: dict[tuple[torch.device, tuple[int, ...]], Cycle] = {}  # as tables: by device and ranks
        self._frozen: list[tuple[int, int, Tensor]] = []  # group, index, parameter: no state yet
        self._position = 0
        self._work: list[tuple[Cycle, list[Table]]] = []  # each cycle with its tables
        self._rows: list[list[float | Tensor]] = []
        self._just_loaded = False
        self._outer: list[dict[str, Any]] | None = None  # inside outer_weights(): the groups' data of the walk
        self._members: list[list[Tensor]] = []  # each group's parameters, as registered
        self._capture: int | None = None  # the capture into a CUDA graph in which the running cycle began
        self._was_captured = False  # at any time
        self._warm = False  # a cycle was finished since parameters came
        self._ranks = Ranks()
        self._built = False

    # Parameters

    @_of_the_optimizer
    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group as torch.optim does; in mid-cycle it joins the walk from here, with a Γ of its own."""
        self._refuse_inside_outer_weights("add_param_group()")
        index = len(self.param_groups)
        known = {p for group in self.param_groups for p in group["params"]}
        unique = hyperparameters.check_new_group(param_group, self.defaults, index, self._inner_steps, known)
        super().add_param_group(param_group)
        group = self.param_groups[index]
        if len(unique) < len(group["params"]):  # the base class has warned
            if "param_names" in group:
                names = dict(zip(reversed(group["params"]), reversed(group["param_names"]), strict=True))
                group["param_names"] = [names[p] for p in unique]
            group["params"] = unique
        for key in ("lr", "inner_lr"):
            if isinstance(group[key], Tensor):  # schedulers write into it: each group needs its own
                group[key] = group[key].detach().clone()
        group["base_lr"] = float(group["lr"])
        try:
            if self._built:
                self._follow_ranks([(index, i, p) for i, p in enumerate(unique) if not hyperparameters.is_frozen(p)])
                self._compare_ranks("in add_param_group()", weights=unique)
            self._register([(index, i, p) for i, p in enumerate(unique)], flatten=self._flatten)
        except BaseException:
            self.param_groups.pop()
            self._follow_ranks([])
            raise
        self._show_cycle_data()

    def _register(self, params: list[tuple[int, int, Tensor]], *, flatten: bool) -> None:
        """Gives parameters (group, index, tensor) state and a place in a table; frozen ones wait for a gradient."""
        live: list[tuple[int, int, Tensor]] = []
        waiting: list[tuple[int, int, Tensor]] = []
        for entry in params:
            (waiting if self._waits(entry[2]) else live).append(entry)
        found: dict[torch.device, ModuleType] = {}
        for device, dtype in {(local_part(p).device, real_dtype(p.dtype)): None for _, _, p in live}:
            walks = self._ranks.displacement_group is not None
            backend = backends.resolve(self._backend, self._fused, device, dtype, displaced=walks)
            if found.get(device) is not reference:  # one for all dtypes of a device
                found[device] = backend
        self._follow_ranks(live)
        self._extend_tables(live, flatten=flatten)
        self._frozen += waiting
        # The same order, and so the same sum of squares, whenever a dtype or device came, and on all ranks.
        self._tables = dict(sorted(self._tables.items(), key=lambda item: item[1].first))
        tables: dict[tuple[torch.device, tuple[int, ...]], list[Table]] = defaultdict(list)
        for table in self._tables.values():
            tables[table.device, table.ranks].append(table)
        if not tables:  # all frozen so far
            found[torch.device("cpu")], tables[torch.device("cpu"), ()] = reference, []
        before = list(self._cycles.values())
        cycles = {key: self._cycles.get(key) or Cycle(key[0], self._inner_steps, found[key[0]]) for key in tables}
        for cycle in cycles.values():
            cycle.backend = found.get(cycle.device, cycle.backend)
        self._cycles = cycles
        self._work = [(cycles[key], members) for key, members in tables.items()]
        self._members = [list(group["params"]) for group in self.param_groups]
        self._warm = False
        for cycle in [*before, *self._cycles.values()]:
            cycle.grow(len(self.param_groups))
            if before and cycle not in before:
                cycle.follow(before[0])
        self._rows = []

    def _waits(self, param: Tensor) -> bool:
        """Whether a parameter is frozen and has no state yet."""
        return hyperparameters.is_frozen(param) and not self.state.get(param)

    def _follow_ranks(self, live: list[tuple[int, int, Tensor]]) -> None:
        """Learns over which ranks parameters are sharded, with those that are to come."""
        known = [(s.group, s.index, s.param) for table in self._tables.values() for s in table.segments]
        self._ranks.follow([param for *_, param in sorted([*known, *live], key=lambda entry: entry[:2])])

    def _extend_tables(self, params: list[tuple[int, int, Tensor]], *, flatten: bool) -> None:
        """Gives parameters state and a row in the table of their device and dtype; all of them or none."""
        fresh: dict[tuple[int, torch.device, torch.dtype, tuple[int, ...]], list[Segment]] = defaultdict(list)
        for group, index, param in params:
            key = group, local_part(param).device, real_dtype(param.dtype), dtensor.shard_ranks(param)
            fresh[key].append(make_segment(param, group=group, index=index, state=self.state[param]))
        try:
            for (group, device, dtype, ranks), segments in fresh.items():
                table = self._tables.setdefault((device, dtype, ranks), Table(device, dtype, ranks))
                table.walks_alone = self._ranks.displacement_group is not None
                table.reduces_low_precision = dtype is self._ranks.displacement_dtype
                table.extend(segments, flatten=flatten)
                table.set_amsgrad(group, self.param_groups[group]["amsgrad"])
                if self._position > 0:
                    table.ensure_cycle_buffers()
        except BaseException:  # out of memory, for example
            for table in self._tables.values():
                table.forget([segment for segments in fresh.values() for segment in segments])
            self._tables = {key: table for key, table in self._tables.items() if table.segments}
            for _, _, param in params:
                del self.state[param]
            raise

    def _thaw(self) -> None:
        """Gives state to parameters that were frozen and have a gradient now or may get one."""
        ready = [entry for entry in self._frozen if not hyperparameters.is_frozen(entry[2])]
        for group, index, param in ready:
            hyperparameters.check_param(param, f"parameter {index} of group {group}")
        if ready:
            self._register(ready, flatten=False)
            self._frozen = [entry for entry in self._frozen if entry[2] not in self.state]
            self._show_cycle_data()

    def _show_cycle_data(self) -> None:
        """Puts the cycle's own data into the parameter groups, under the same keys at every position."""
        cycle = next(iter(self._cycles.values()))
        touched = {(s.group, s.index) for table in self._tables.values() for s in table.segments if s.touched}
        for index, group in enumerate(self.param_groups):
            flags = [(index, i) in touched for i in range(len(group["params"]))]
            group.update(cycle.group_data(index), cycle_position=self._position, touched=flags)

    # Stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Consumes the gradients of one micro-batch: an inner step, or in the last of a cycle also the outer step.

        Updates weights and state in place; waits for a device only if other parameters lie on the CPU.
        Returns what `closure` returns. Captured into a CUDA graph, it reads gradients where they lie now, and
        hyperparameters that are tensors on the device, at every replay; others keep their values. A capture holds whole
        cycles, after one outside of it: replays of a part of one would never reach AdamW, and nobody could tell. It
        must be repeated after groups were added, parameters unfrozen or moved, or amsgrad changed.
        RuntimeError, ValueError or TypeError for a gradient, parameter or hyperparameter that cannot be used, naming
        its group; nothing is modified then.
        """
        self._refuse_inside_outer_weights("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._watch.look((p for group in self.param_groups for p in group["params"]), closure)
        last = self._position + 1 == self._inner_steps
        self._compare_ranks_for_debugging("in step()", averages=last)
        self._look(gradients=True)
        self._ranks.reshard()
        if not last:
            for table in self._tables.values():
                table.ensure_cycle_buffers()
        micro_batch = MicroBatch(
            self._sq_norms(),
            self._position,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
        )
        if last:
            self._finish_cycle(micro_batch)
        else:
            for cycle, tables in self._work:
                cycle.backend.inner_step(tables, cycle, micro_batch)
                for table in tables:
                    table.finish_inner_step()
            self._set_position(self._position + 1)
        return loss

    def _sq_norms(self) -> list[Tensor]:
        """‖g‖² of all tables and ranks, as `MicroBatch.sq_norms`; infinite where a rank was told of an overflow, which
        skips the step on all."""
        sq_norms = [(table.ranks, cycle.backend.sq_norm(table)) for cycle, tables in self._work for table in tables]
        if not self._ranks.norm_is_shared:
            return [sq_norm for _, sq_norm in sq_norms]
        if not sq_norms:  # all parameters are frozen
            sq_norms = [((), torch.zeros((), dtype=torch.float64))]
        parts = [(ranks, sq_norm.sum()) for ranks, sq_norm in sq_norms]
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            parts = [(of, torch.where(found_inf.to(part.device).view(()) == 0, part, torch.inf)) for of, part in parts]
        return self._ranks.add(parts, "the norm")

    @_of_the_optimizer
    @torch.no_grad()
    def outer_step(self) -> None:
        """Ends a partial cycle: applies the displacement so far. Gradients that wait are not used.

        Without any inner step it does nothing. Errors as `step()`. With a `displacement_group` all ranks call it once
        their micro-batches are used up, however many each had: it takes part in the averages of those that still call
        `step()`, returns when all have come, and waits for the device.
        """
        self._refuse_inside_outer_weights("outer_step()")
        walks = self._ranks.displacement_group is not None
        if self._position == 0 and not walks:
            return
        everybody_is_here = False
        while not everybody_is_here:
            self._compare_ranks_for_debugging("in outer_step()", averages=walks)
            self._look(gradients=False)
            # FSDP2 keeps the root's weights gathered after a forward pass without a backward one.
            self._ranks.reshard()
            everybody_is_here = self._finish_cycle(None)

    def _look(self, *, gradients: bool) -> None:
        """Checks everything that may be wrong, then tells tables and cycles what is new."""
        self._check_members()
        self._follow_capture()
        rows = [hyperparameters.group_row(g, i, self._inner_steps) for i, g in enumerate(self.param_groups)]
        if self._frozen:
            self._thaw()
        for table in self._tables.values():
            table.read_gradients(use=gradients)
        for table in self._tables.values():
            table.adopt_writes(restart=not self._just_loaded, look=False)
        self._just_loaded = False
        self._follow_amsgrad()
        if self._was_captured or any(isinstance(value, Tensor) for row in rows for value in row) or rows != self._rows:
            for cycle in self._cycles.values():
                cycle.set_hyper(rows)
            self._rows = rows

    def _follow_capture(self) -> None:
        """Checks that a capture into a CUDA graph begins and ends at a boundary, and prepares for its replays.

        Each captured step has gradient addresses and hyperparameters of its own, which every replay copies to the
        device again. The host sees no replay: once steps were captured, others copy theirs again too.
        """
        current = graphs.capture_id(list(dict.fromkeys(cycle.device for cycle, _ in self._work)))
        if self._position > 0 and current != self._capture:
            self._refuse_to_cut_a_cycle()
        if current is not None:
            self._check_capture()
        self._capture = current
        self._was_captured |= current is not None
        on_gpu = self._work[0][0].device.type == "cuda"
        prepares = on_gpu and current is None and any(group["capturable"] for group in self.param_groups)
        count = graphs.PREPARED_CYCLES * self._inner_steps
        for cycle, tables in self._work:
            cycle.capturing = current is not None
            for table in tables:
                table.capturing = cycle.capturing
                if self._was_captured:
                    table.distrust_device()
                if table.capturing:
                    table.hold()
                elif prepares:
                    table.replayed.prepare(table.rows.shape, table.rows.dtype, count)
            if cycle.capturing:
                cycle.hold()
            elif prepares:
                cycle.replayed.prepare(cycle.hyper.shape, cycle.hyper.dtype, count)

    def _refuse_to_cut_a_cycle(self) -> None:
        """Raises for a capture that does not begin or end at a boundary."""
        taken = self._position
        if self._capture is None:
            raise graphs.cut_at_its_beginning(taken, self._inner_steps)
        for table in self._tables.values():
            table.set_touched(table.segments, False)
            table.hide_cycle_buffers()
        self._set_position(0)
        self._show_cycle_data()
        raise graphs.cut_at_its_end(taken, self._inner_steps)

    def _check_capture(self) -> None:
        """Raises for what a CUDA graph could not replay."""
        amsgrad = [(b.amsgrad, self.param_groups[b.group]["amsgrad"]) for t in self._tables.values() for b in t.buckets]
        thawing = any(not hyperparameters.is_frozen(param) for _, _, param in self._frozen)
        graphs.check_can_be_replayed(
            self.param_groups,
            communicates=self._ranks.communicates,
            ready=self._warm and not thawing and all(now == wanted for now, wanted in amsgrad),
            inner_steps=self._inner_steps,
        )

    def _check_members(self) -> None:
        """Whether groups and state still hold what was registered; whatever came otherwise would never be stepped."""
        groups = [group["params"] for group in self.param_groups]
        pairs = zip_longest(groups, self._members, fillvalue=())
        same = [len(now) == len(then) and all(map(operator.is_, now, then)) for now, then in pairs]
        if not all(same):
            index = same.index(False)
            raise RuntimeError(
                f"the parameters of group {index} were exchanged, added or removed behind the optimizer's back: add "
                "groups with add_param_group(), or build a new optimizer and load this one's state into it"
            )
        if len(self.state) < sum(len(table.segments) for table in self._tables.values()):
            raise RuntimeError(
                "entries of optimizer.state were removed: to start a parameter's moments from zero, remove its entry "
                "from a state_dict() and load that"
            )

    def _follow_amsgrad(self) -> None:
        for index, group in enumerate(self.param_groups):
            for table in self._tables.values():
                table.set_amsgrad(index, group["amsgrad"])

    def _compare_ranks(
        self, when: str, error: Exception | None = None, loads: int | None = None, *, weights: Sequence[Tensor] = ()
    ) -> None:
        """Raises RuntimeError on all ranks that communicate if they disagree; see `check_ranks`.

        weights: parameters that must have the same values on ranks that walk on their own.
        """
        if self._ranks.communicates:
            position = self._position if loads is None else loads
            here, of_params = self._agreed(position, error, hyper=loads is None and error is None)
            layouts = [table.layout for table in self._tables.values()]
            walks: dict[str, Any] = {f"where parameters lie ({_KEEP_FLAT})": layouts}
            if self._ranks.displacement_group is not None:
                late = "which must be broadcast from one rank before the optimizer gets it"
                for i, param in enumerate(weights):
                    walks[f"the value of parameter {i}, {late}"] = dtensor.checksum(param)
            self._ranks.check(here, of_params, walks, when)

    def _compare_ranks_for_debugging(self, when: str, *, averages: bool) -> None:
        """The same at each step, where torch.distributed was asked to look for mistakes. Ranks that walk on their own
        may stand at different positions, and only come together when they average."""
        if self._ranks.communicates and torch.distributed.get_debug_level() != torch.distributed.DebugLevel.OFF:
            here, of_params = self._agreed(self._position, None, hyper=self._ranks.displacement_group is None)
            self._ranks.check(here, of_params, {"cycle_position": "any"} if averages else None, when)

    def check_ranks(self, group: Any = None) -> None:
        """Raises RuntimeError on all ranks of a process group (None: the default one), naming the first difference,
        unless inner_steps, cycle_position, hyperparameters and the parameters' shapes, dtypes, shardings and
        requires_grad are the same. The values of parameters are not compared.

        All of them call it. Where step() communicates that is done without asking, for the ranks it concerns, when the
        optimizer is built or loaded; use it for replicas that others keep equal, as DistributedDataParallel does.
        """
        check_group(group, "group")
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError(
                "check_ranks() compares processes: call torch.distributed.init_process_group() before it"
            )
        here, of_params = self._agreed(self._position, None)
        group = group or torch.distributed.group.WORLD
        found = difference({**here, **of_params}, group, "in check_ranks()")
        if found is not None:
            raise RuntimeError(found)

    def _agreed(
        self, position: int, error: Exception | None, *, hyper: bool = True
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What all ranks must have in common, and what those that have the same parameters must.

        hyper: hyperparameters too. Those on a device count as equal: reading them would wait for it.
        """
        params = [
            f"{tuple(p.shape)} {p.dtype}{' frozen' if self._waits(p) else ' in use'} in group {index}"
            + (f" {p.placements} on {p.device_mesh.shape}" if dtensor.is_dtensor(p) else "")
            for index, group in enumerate(self.param_groups)
            for p in group["params"]
        ]
        here = {"what fails": str(error), "inner_steps": self._inner_steps, "cycle_position": position}
        of_params: dict[str, Any] = {"the number of parameters": len(params)}
        of_params.update((f"parameter {i}", line) for i, line in enumerate(params))
        for index, group in enumerate(self.param_groups if hyper else []):
            row = zip(HYPER, hyperparameters.group_row(group, index, self._inner_steps), strict=True)
            of_params.update((f"{name} of group {index}", str(v)) for name, v in row if not isinstance(v, Tensor))
        return here, of_params

    def _adopt_writes(self, *, loading: bool = False) -> None:
        """What others wrote must be in masters and anchors before these are copied or saved."""
        for table in self._tables.values():
            if self._outer is None:
                table.adopt_writes(restart=not self._just_loaded, loading=loading)
            else:
                table.adopt_writes_into_theta()

    def _finish_cycle(self, micro_batch: MicroBatch | None) -> bool:
        """The outer step; whether all ranks that walk on their own are in outer_step(), where this one is."""
        taken = self._position + (micro_batch is not None)
        displaced = self._ranks.displacement_group is not None
        everybody_is_here = True
        if displaced:
            votes = self._displace(micro_batch)
            if micro_batch is None:  # only here does the host wait for them
                waiting, walking = votes.tolist()
                everybody_is_here = bool(waiting == self._ranks.walkers)
                if walking == 0:
                    self._return_to_theta()
                    return everybody_is_here
        for cycle, tables in self._work:
            if displaced:
                cycle.backend.outer_step(tables, cycle, None, taken, displaced=True)
            else:
                cycle.backend.outer_step(tables, cycle, micro_batch, taken)
            for table in tables:
                table.finish_outer_step(displaced=displaced)
        self._set_position(0)
        self._warm = True
        self._share_results()
        return everybody_is_here

    def _displace(self, micro_batch: MicroBatch | None) -> Tensor:
        """Ends this rank's walk, and puts mean D and mean Γ over `displacement_group` in the place of its own; how many
        ranks are in outer_step(), and how many have taken an inner step: [2] float64."""
        in_outer_step = micro_batch is None
        walked = self._position > 0 or not in_outer_step
        for table in self._tables.values():
            table.ensure_cycle_buffers()
        self._rows = []  # the mean over ranks takes their place
        try:
            for cycle, tables in self._work:
                cycle.backend.displace(tables, cycle, micro_batch, 1 / self._ranks.walkers)
            return self._average([in_outer_step, walked])
        except BaseException:  # a rank that has stopped, for example: D is lost, θ is not
            self._return_to_theta()
            raise

    def _average(self, votes: list[bool]) -> Tensor:
        """Puts the sum over `displacement_group` in the place of each table's displacements, and the mean Γ in that of
        each cycle's; tells the tables which parameters had a gradient on any rank.

        Sends a vector of each cycle and the buckets as they lie. votes: whether this rank is in outer_step(), whether
        it walked. Returns how many ranks voted for each: [2] float64.
        """
        for cycle, tables in self._work:
            vector = cycle.walk_to_average(votes, [table.took_part() for table in tables])
            self._ranks.sum_over_walkers([vector])
            sum_of_votes, counts = cycle.take_average(vector, self._ranks.walkers)
            of_tables = counts.split([len(table.segments) for table in tables])
            for table, count in zip(tables, of_tables, strict=True):
                table.moved = (count != 0).long()
        tables = [table for _, members in self._work for table in members]
        self._ranks.sum_over_walkers([flat for table in tables for flat in table.displacements()])
        return sum_of_votes

    def _return_to_theta(self) -> None:
        """After `displace`: as if the cycle had not begun."""
        for cycle, tables in self._work:
            cycle.reset()
            for table in tables:
                table.return_to_theta()
        self._set_position(0)

    def _share_results(self) -> None:
        """Adds up over all ranks what `metrics()` shows and each rank knows of its own parameters only.

        Here, once in a cycle, so that `metrics()` does not wait for other ranks: it may be called on one only.
        """
        if self._ranks.norm_is_shared:
            parts = [(ranks, cycle.results_of_parameters()) for (_, ranks), cycle in self._cycles.items()]
            totals = self._ranks.add(parts, "the metrics")
            for cycle, total in zip_longest(self._cycles.values(), totals):
                cycle.set_results_of_parameters(total)

    def _set_position(self, position: int) -> None:
        self._position = position
        for group in self.param_groups:
            group["cycle_position"] = position

    @property
    def inner_steps(self) -> int:
        """K, micro-batches in a cycle."""
        return self._inner_steps

    @property
    def cycle_position(self) -> int:
        """Inner steps taken in the running cycle, 0 … inner_steps-1."""
        return self._position

    @property
    def at_boundary(self) -> bool:
        """Whether the parameters hold θ: the time for averages of weights, checkpoints and evaluations."""
        return self._position == 0

    # Looking

    @_of_the_optimizer
    @contextlib.contextmanager
    def outer_weights(self) -> Iterator[None]:
        """Shows θ in the parameters, for evaluations and checkpoints in mid-cycle; puts the walk back, bit for bit.

        Inside, `state_dict()` describes the boundary; `step()`, `outer_step()` and loading raise RuntimeError. A value
        written into a parameter inside becomes θ, and that parameter's walk starts anew from it.
        """
        self._refuse_inside_outer_weights("outer_weights()")
        # FSDP2 keeps the root's weights gathered after a forward pass without a backward one, which would hide θ here,
        # and θ would hide the walk afterwards.
        self._ranks.reshard()
        with torch.no_grad():
            self._look(gradients=False)
            anchored = [table for table in self._tables.values() if table.shows_cycle_buffers]
            for table in self._tables.values():
                table.show_theta()
        self._show_cycle_data()
        self._outer = [{key: group[key] for key in GROUP_KEYS} for group in self.param_groups]
        for group in self.param_groups:
            zeros = {key: torch.zeros_like(group[key]) for key in ("walk_length", "walk_sq_length")}
            norms = [torch.zeros_like(norm) for norm in group["grad_norms"]]
            group.update(zeros, cycle_position=0, touched=[False] * len(group["params"]), grad_norms=norms)
        try:
            yield
        finally:
            self._ranks.reshard()
            for group, data in zip(self.param_groups, self._outer, strict=True):
                group.update(data)
            self._outer = None
            with torch.no_grad():
                for table in self._tables.values():
                    table.show_walk()
                    if table in anchored:
                        table.ensure_cycle_buffers()

    def metrics(self) -> dict[str, Any]:
        """Figures of the last finished cycle, partial ones too; waits for the device, not for other ranks.

        alignment: mean pairwise cosine similarity of the cycle's unit gradients, each at its own point of the walk;
        NaN where fewer than two were taken. grad_norms: ‖g_k‖ of each micro-batch, unscaled. lost_fraction: the share
        of element moves in the walk that rounding swallowed whole; where it is not small, inner_lr is too small for
        the model. skipped_inner_steps, skipped_outer_steps: totals of steps and cycles in which nothing moved.
        """
        cycle = next(iter(self._cycles.values()))
        return {
            **summarize(combine(list(self._cycles.values())), self._inner_steps),
            "skipped_inner_steps": int(cycle.skipped_inner_steps),
            "skipped_outer_steps": int(cycle.skipped_outer_steps),
        }

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} (inner_steps: {self._inner_steps}, cycle_position: {self._position}"]
        for index, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {index}")
            hidden = ("params", "inner_steps", *GROUP_KEYS)
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key not in hidden]
        return "\n".join(lines) + "\n)"

    def _refuse_inside_outer_weights(self, what: str) -> None:
        if self._outer is not None:
            raise RuntimeError(
                f"{what} inside outer_weights(): the parameters show θ there; leave the with block first"
            )

    # Saving and loading

    @_of_the_optimizer
    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """torch.optim.AdamW's state, in mid-cycle with each parameter's anchor (below float32: walk).

        Saving and loading it after any micro-batch continues bit for bit, together with the model's state of the
        same moment. Tensors are the live ones, as torch.optim's.
        """
        self._check_members()
        if self._capture is not None:
            self._follow_capture()
        if self._ranks.displacement_group is not None and self._position > 0 and self._outer is None:
            warnings.warn(
                f"state_dict() in mid-cycle ({self._position} of {self._inner_steps} inner steps), where each rank of "
                "displacement_group has a walk of its own: have every rank save its model and optimizer for itself, or "
                "save inside outer_weights() or at a boundary",
                stacklevel=4,
            )
        self._adopt_writes()
        self._follow_amsgrad()
        if self._outer is None:
            self._thaw()  # distributed checkpoints need the state of each parameter that trains
            for table in self._tables.values():
                table.fill_untouched()
                table.hand_out()
            self._show_cycle_data()
        hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, OrderedDict()
        try:
            packed = super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        # Copies: our own dicts lose their anchors at the end of the cycle, and its scalars go on.
        packed["state"] = {
            key: dict(value) if isinstance(value, dict) else value for key, value in packed["state"].items()
        }
        for group in packed["param_groups"]:
            if not (group["fused"] or group["capturable"]):
                for key in group["params"]:
                    if "step" in packed["state"].get(key, {}):
                        packed["state"][key]["step"] = packed["state"][key]["step"].cpu()
            group.update({key: deepcopy(group[key]) for key in GROUP_KEYS})
        for hook in hooks.values():
            packed = hook(self, packed) or packed
        return packed

    @_of_the_optimizer
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads NexusAdamW's state of any position, or AdamW's, in place. float32 state stays float32.

        ValueError or TypeError, naming group and parameter, for a state that does not fit; nothing is modified then.
        """
        self._refuse_inside_outer_weights("load_state_dict()")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self._check_members()
        try:
            groups, entries, foreign = checkpoint.check(state_dict, self.param_groups, self._inner_steps)
        except Exception as error:  # whatever it is, others must not wait for this rank
            self._compare_ranks("in load_state_dict()", error)
            raise
        position = groups[0].get("cycle_position", 0) if groups else 0
        self._compare_ranks("in load_state_dict()", loads=position)
        self._adopt_writes(loading=True)
        self._restore(groups, entries)
        self.state.update(foreign)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _restore(self, groups: list[dict[str, Any]], entries: dict[Tensor, dict[str, Any]]) -> None:
        """Copies checked groups and entries into place, and the position with them."""
        self._frozen, frozen = [], self._frozen
        late = [entry for entry in frozen if entries.get(entry[2])]
        self._frozen = [entry for entry in frozen if not entries.get(entry[2])]
        for _, _, param in late:
            self.state[param]["step"] = None  # has state, so it is not frozen any more
        for group, loaded in zip(self.param_groups, groups, strict=True):
            group.update({key: value for key, value in loaded.items() if key not in GROUP_KEYS and key != "params"})
        self._register(late, flatten=False)
        self._position = groups[0].get("cycle_position", 0) if groups else 0
        self._capture = None
        for cycle in self._cycles.values():
            cycle.reset()
            cycle.forget_finished(keep_memory=self._was_captured)
            for index, loaded in enumerate(groups):
                if loaded.keys() >= set(GROUP_KEYS):
                    cycle.load_group_data(index, loaded, running=self._position > 0)
        for table in self._tables.values():
            if self._position > 0:
                table.ensure_cycle_buffers()
            else:
                table.hide_cycle_buffers()
            for index, group in enumerate(self.param_groups):
                maxima = any("max_exp_avg_sq" in (entries.get(p) or ()) for p in group["params"])
                table.set_amsgrad(index, group["amsgrad"] or maxima)
            for segment in table.segments:
                segment.restore(entries.get(segment.param))
            for index, group in enumerate(self.param_groups):
                table.set_amsgrad(index, group["amsgrad"])
            moved = [s for s in table.segments if self._position > 0 and groups[s.group]["touched"][s.index]]
            table.set_touched(table.segments, False)
            table.set_touched(moved, True)
            table.show_low_precision()
            table.forget_handed_out()
        self._rows, self._just_loaded = [], True
        self._ranks.reshard()  # masters wrote the parameters
        self._show_cycle_data()

    @_of_the_optimizer
    @torch.no_grad()
    def materialize_anchors(self) -> None:
        """Makes the state hold anchors equal to the weights, so that a load that fills only keys it finds can receive a
        checkpoint of mid-cycle. They are dropped again if the loaded position is 0, or at the end of the next cycle.
        """
        self._refuse_inside_outer_weights("materialize_anchors()")
        if self._inner_steps > 1:
            self._adopt_writes()
            self._thaw()
            for table in self._tables.values():
                table.ensure_cycle_buffers()
                table.fill_untouched()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_inside_outer_weights("copying or pickling the optimizer")
        if self._ranks.has_groups:
            raise RuntimeError(
                "an optimizer with a process group cannot be copied or pickled: save its state_dict(), build another "
                "one with its own group and load that"
            )
        self._check_members()
        if self._capture is not None:
            self._follow_capture()
        with torch.no_grad():
            self._adopt_writes()
            self._follow_amsgrad()
            for table in self._tables.values():
                table.fill_untouched()
        self._show_cycle_data()
        kept = ("_inner_steps", "_backend", "_fused", "_flatten", "_just_loaded")
        finished = combine(list(self._cycles.values()))
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}, "_finished": finished}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Builds tables around copied or unpickled parameters and state."""
        groups, entries = state["param_groups"], dict(state["state"])
        choices = ("_inner_steps", "_backend", "_fused", "_flatten")
        self._configure(*(state[name] for name in choices))
        super().__setstate__({"defaults": state["defaults"], "param_groups": groups, "state": defaultdict(dict)})
        loaded = [dict(group) for group in groups]
        for param in entries:
            if isinstance(param, Tensor):
                self.state[param]["step"] = None
        params = [(g, i, p) for g, group in enumerate(groups) for i, p in enumerate(group["params"])]
        self._register(params, flatten=self._flatten)
        self._restore(loaded, {p: entry for p, entry in entries.items() if isinstance(p, Tensor)})
        self._built = True
        self.state.update({key: value for key, value in entries.items() if not isinstance(key, Tensor)})
        self._just_loaded = state["_just_loaded"]
        next(iter(self._cycles.values())).finished = state["_finished"]
