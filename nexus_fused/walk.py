"""One cycle as a state machine: where it stands, what moves next, and what ranks exchange on the way. The walk knows
tables, their scalars and ranks, but no keys of a state. See reference.py for the arithmetic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import zip_longest
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backends, dtensor, graphs, reference
from .cycle import Cycle, MicroBatch
from .dtensor import local_part
from .flat import KEPT, Segment, flat_view, make_segment, real_dtype, state_dtypes, wait_for
from .options import BFLOAT16_STEPS, NORMALIZE, SIGN, KeptRows, displacement_dtype, group_rows, has_maxima
from .ranks import WHOLE, Ranks, Spread
from .table import Table

Entry = tuple[int, int, Tensor]  # group, index in it, parameter
# inner_steps, backend, fused, flatten, displacement_dtype, offload
Choices = tuple["int | None", "str | None", "bool | None", bool, "torch.dtype | None", bool]
Outer = Callable[[list[tuple[Tensor, Tensor]]], None]  # an optimizer of others: steps parameters, given their gradients


def entries_of(groups: list[dict[str, Any]]) -> list[Entry]:
    """Returns each parameter of these groups once."""
    found: dict[int, Entry] = {}
    for index, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            found.setdefault(id(param), (index, i, param))
    return list(found.values())


class Walk:
    """The running cycle of one optimizer: `position` of `inner_steps` inner steps are taken. None: any number.

    outer: steps the parameters that moved along their G, where the outer optimizer is not our AdamW; it finds θ in all
    of them, and a new cycle begun. backend, fused, flatten, offload: as the optimizer's. displacement_dtype: of D,
    except for float64 parameters. tables: one for each device, dtype and spread over ranks; cycles: one for each device
    and spread. work: each cycle with its tables.
    """

    def __init__(self, choices: Choices, ranks: Ranks, outer: Outer | None = None) -> None:
        self.inner_steps, self.backend, self.fused, self.flatten, chosen, self.offload = choices
        self.displacement_dtype, self.chose_dtype = displacement_dtype(chosen, self.inner_steps), chosen is not None
        self.ranks, self.outer = ranks, outer
        self.keeps = KEPT if outer is None else ()  # of a state that outlives a cycle
        self.is_blind = False  # replays of CUDA graphs may take steps of an open cycle: only the device knows of them
        self._position = 0
        self.tables: dict[tuple[torch.device, torch.dtype, Spread], Table] = {}
        self.cycles: dict[tuple[torch.device, Spread], Cycle] = {}
        self.work: list[tuple[Cycle, list[Table]]] = []
        self._rows: list[list[float | Tensor]] = []  # of hyperparameters, as the devices have them
        self._kept: KeptRows = []
        self.capture = graphs.Capture()
        self._warm = False  # a cycle was finished since parameters came

    @property
    def segments(self) -> list[Segment]:
        """The segments of all parameters, table by table."""
        return [segment for table in self.tables.values() for segment in table.segments]

    @property
    def position(self) -> int:
        """Inner steps taken in the running cycle. Waits for the device if only that knows."""
        if self.is_blind:
            self._learn()
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        self._position = position
        if self.is_blind:
            for cycle, _ in self.work:
                cycle.taken.fill_(position)

    def _learn(self) -> None:
        """Tells the host what only the device knows: the position, and whose displacements are valid."""
        self._position = int(self.work[0][0].taken)
        for table in self.tables.values():
            table.learn_touched()

    def _set_blind(self, is_blind: bool) -> None:
        """Leaves it to the device, or to the host again, to keep the position and who is touched."""
        if is_blind != self.is_blind:
            position, self.is_blind = self.position, is_blind
            for table in self.tables.values():
                table.keep_touched_on_device(is_blind)
            self.position = position

    @property
    def is_open(self) -> bool:
        """Whether the number of inner steps is open."""
        return self.inner_steps is None

    @property
    def progress(self) -> str:
        """Where the cycle stands, for a message."""
        return f"after {self.position} {'' if self.is_open else f'of {self.inner_steps} '}inner steps"

    @property
    def is_local(self) -> bool:
        """Whether ranks walk on their own."""
        return self.ranks.displacement_group is not None

    # Parameters

    def add(self, params: list[Entry], groups: list[dict[str, Any]], *, flatten: bool) -> list[Segment]:
        """Gives parameters memory and a row in the table of their device and dtype: all of them, or none after an
        error. Returns the segments whose memory is new: theirs, or everybody's if others got maxima too.
        """
        found: dict[torch.device, ModuleType] = {}
        for device, dtype in {(local_part(p).device, real_dtype(p.dtype)): None for *_, p in params}:
            backend = backends.resolve(self.backend, self.fused, device, dtype, self._displacement_dtype(dtype))
            if found.get(device) is not reference:  # one for all dtypes of a device
                found[device] = backend
        self.follow_ranks(params, groups)
        segments: list[Segment] = []
        try:
            came = self._extend(params, segments, groups, flatten=flatten)
            self._give_scalars(found, len(groups))
        except BaseException:  # out of memory, for example
            for table in self.tables.values():
                table.forget(segments)
            self.tables = {key: table for key, table in self.tables.items() if table.segments}
            raise
        self._rows, self._warm = [], False
        return self.segments if came else segments

    def _give_scalars(self, found: dict[torch.device, ModuleType], n_groups: int) -> None:
        """Gives each device of a table a cycle, with room for all groups. found: the devices' backends."""
        # The same order, and so the same sum of squares, whenever a dtype or device came, and on all ranks.
        self.tables = dict(sorted(self.tables.items(), key=lambda item: item[1].segments[0].place))
        tables: dict[tuple[torch.device, Spread], list[Table]] = defaultdict(list)
        for table in self.tables.values():
            tables[table.device, table.spread].append(table)
        if not tables:  # all frozen so far
            found[torch.device("cpu")], tables[torch.device("cpu"), WHOLE] = reference, []
        before = list(self.cycles.values())
        self.cycles = {
            key: self.cycles.get(key) or Cycle(key[0], self.inner_steps or BFLOAT16_STEPS, found[key[0]])
            for key in tables
        }
        self.work = [(self.cycles[key], members) for key, members in tables.items()]
        for cycle in [*before, *self.cycles.values()]:
            cycle.backend = found.get(cycle.device, cycle.backend)
            cycle.grow(n_groups)
            if before and cycle not in before:
                cycle.follow(before[0])

    def follow_ranks(self, coming: list[Entry], groups: list[dict[str, Any]]) -> None:
        """Learns over which ranks these parameters are spread, and those that are to come."""
        known = [(s.group, s.index, s.param) for s in self.segments]
        self.ranks.follow(sorted([*known, *coming], key=lambda entry: entry[:2]), groups)

    def _displacement_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return state_dtypes(dtype, self.displacement_dtype)["displacement"]

    def _extend(self, params: list[Entry], made: list[Segment], groups: list[dict[str, Any]], *, flatten: bool) -> bool:
        """Appends the parameters' segments to `made`, with rows and memory. Returns whether maxima came."""
        fresh: dict[tuple[torch.device, torch.dtype, Spread], list[Segment]] = defaultdict(list)
        for group, index, param in params:
            spread = Spread(dtensor.shard_ranks(param), groups[group]["replicated"])
            made.append(make_segment(param, group=group, index=index))
            fresh[local_part(param).device, real_dtype(param.dtype), spread].append(made[-1])
        for (device, dtype, spread), segments in fresh.items():
            kept_in, anchor = self._displacement_dtype(dtype), self.is_local and self.inner_steps != 1
            new = Table(device, dtype, kept_in, spread, keeps_anchor=anchor, keeps=self.keeps, offload=self.offload)
            table = self.tables.setdefault((device, dtype, spread), new)
            table.extend(segments, flatten=flatten)
            if self.position > 0:
                table.ensure_displacements()
        return self.follow_amsgrad(groups)

    def wait_for_host_state(self) -> None:
        """Waits for devices that may still write state in host memory, before others read or write it there."""
        for device in {table.device for table in self.tables.values() if table.offloads}:
            wait_for(device)

    # One micro-batch

    def refresh(self, groups: list[dict[str, Any]], *, gradients: bool) -> bool:
        """Checks everything that may be wrong, then tells tables and cycles what is new. Returns whether maxima came.
        gradients: whether the step uses those of a micro-batch.
        """
        rows = group_rows(groups, self.inner_steps, self._kept)
        self.ranks.check_groups(groups)
        for table in self.tables.values():
            table.read_gradients(use=gradients)
        maxima_came = self.follow_amsgrad(groups)
        if self.capture.ever or any(isinstance(value, Tensor) for row in rows for value in row) or rows != self._rows:
            for cycle in self.cycles.values():
                cycle.set_hyper(rows)
            self._rows = rows
        return maxima_came

    def follow_amsgrad(self, groups: list[dict[str, Any]]) -> bool:
        """Switches the groups' maxima on or off, as their option says now. Returns whether some were allocated."""
        wanted, came = [has_maxima(group) for group in groups], False
        for table in self.tables.values():
            came |= table.follow_amsgrad(wanted)
        return came

    def check_writes(self) -> None:
        """Raises RuntimeError if others wrote into a walk that is this rank's alone."""
        for table in self.tables.values():
            for segment in table.observer.written():
                if segment.touched:
                    raise RuntimeError(
                        f"{segment.where} was written in mid-cycle, where each rank of displacement_group has weights "
                        "of its own, so the ranks would drift apart: write at a boundary (optimizer.at_boundary) or "
                        "inside outer_weights(), on all ranks"
                    )

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Takes an inner step, and with the last one of a cycle the outer step. Call `refresh` first."""
        position = 0 if self.is_blind else self.position
        last = position + 1 == self.inner_steps
        if not last:
            self.ensure_displacements()
        sq_norms = self.sq_norms(found_inf)
        if not self.is_local:
            self.ranks.replicas.compare(sq_norms)
        if self.outer is not None and position == 0 and not last:
            self._fill_remainders(sq_norms)
        micro_batch = MicroBatch(sq_norms, position, grad_scale, found_inf)
        if last:
            self.finish(micro_batch)
            return
        for cycle, tables in self.work:
            if self.is_blind:
                micro_batch = micro_batch._replace(position=cycle.room)
            cycle.backend.inner_step(tables, cycle, micro_batch)
            if self.outer is not None:
                cycle.tell_host()
            if self.is_blind:
                cycle.count_pass()
            for table in tables:
                table.finish_inner_step()
        if not self.is_blind:
            self.position += 1

    def make_room(self, norms: int) -> bool:
        """Makes room for this many norms of an open cycle. Returns whether the scalars moved."""
        short = [cycle for cycle in self.cycles.values() if cycle.room < norms]
        for cycle in short:
            cycle.make_room(max(norms, 2 * cycle.room))
        return bool(short)

    def ensure_displacements(self) -> None:
        """Allocates displacements that are missing."""
        for table in self.tables.values():
            table.ensure_displacements()

    def clear_untouched(self) -> None:
        """Sets displacements that are not valid to zero, before others read them."""
        for table in self.tables.values():
            table.clear_untouched()

    def sq_norms(self, found_inf: Tensor | None) -> list[Tensor]:
        """Returns ‖g‖² of all tables and ranks, as `MicroBatch.sq_norms`. It is infinite if a rank was told of an
        overflow, so that all ranks skip the step.
        """
        sq_norms = [(table.spread, cycle.backend.sq_norm(table)) for cycle, tables in self.work for table in tables]
        if not self.ranks.norm_is_shared:
            return [sq_norm for _, sq_norm in sq_norms]
        if not sq_norms:  # all parameters are frozen
            sq_norms = [(WHOLE, torch.zeros((), dtype=torch.float64))]
        parts = [(spread, sq_norm.sum()) for spread, sq_norm in sq_norms]
        self.ranks.compare_replicas(parts)
        if found_inf is not None:
            parts = [(of, torch.where(found_inf.to(part.device).view(()) == 0, part, torch.inf)) for of, part in parts]
        return self.ranks.add(parts, "the norm")

    def let_gradients_go(self) -> None:
        """Frees the gradients of all parameters, which an inner step has taken."""
        for table in self.tables.values():
            table.observer.let_go()

    def unscale_norms(self, grad_scale: Tensor | None) -> None:
        """Divides the norms of the running cycle by a scale that is known only now."""
        if grad_scale is not None:
            for cycle in self.cycles.values():
                norms, scale = cycle.grad_norms, grad_scale.to(cycle.device, non_blocking=True).double()
                norms.copy_(torch.where(norms < 0, norms, norms / scale))

    # The end of a cycle

    def finish(self, micro_batch: MicroBatch | None, *, leaves: bool = False) -> bool:
        """Takes the outer step, with the last inner one if there is a micro-batch. leaves: this rank is in
        outer_step(); then returns, for local walks, whether every rank is. Returns True otherwise.
        """
        taken = 0 if self.is_blind else self.position + (micro_batch is not None)
        everybody_is_here = True
        given: list[tuple[Tensor, Tensor]] = []
        if self.is_local or self.outer is not None:
            moved = self._end_walk(micro_batch)
            if self.is_local:
                votes, moved = self._average(moved, [leaves, taken > 0])
                if leaves:  # only here does the host wait for them
                    waiting, walking = votes.tolist()
                    everybody_is_here = bool(waiting == self.ranks.walkers)
                    if walking == 0:
                        self.discard()
                        return everybody_is_here
            if self.outer is not None:
                given = self._gradients(moved)
                for cycle, _ in self.work:
                    cycle.finish(taken)
            else:
                for (cycle, tables), who in zip(self.work, moved, strict=True):
                    cycle.backend.adamw(tables, cycle, who, taken)
        else:
            for cycle, tables in self.work:
                if self.is_blind:
                    cycle.finish_pass_count(before=True)
                cycle.backend.outer_step(tables, cycle, micro_batch, taken)
                if self.is_blind:
                    cycle.finish_pass_count(before=False)
        for table in self.tables.values():
            table.finish_outer_step(everything=self.is_local or self.is_blind)
        self._position, self._warm = 0, True
        self._share_results()
        if self.outer is not None:
            self.outer(given)
        return everybody_is_here

    def _gradients(self, moved: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Returns G of all cycles. If that fails, for lack of memory for example, D is lost and θ is not."""
        try:
            return [
                pair
                for (cycle, tables), who in zip(self.work, moved, strict=True)
                for pair in self._gradients_on_device(cycle, tables, who)
            ]
        except BaseException:
            self.discard()
            raise

    def _gradients_on_device(
        self, cycle: Cycle, tables: list[Table], moved: list[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns the parameters that take part in the outer step, each with G = D/Γ in its dtype (−G for `maximize`).
        Call `_end_walk` first. Frees the last gradients before it allocates, so that memory does not grow. A group
        that has not walked must not be stepped, so the host has to know (`Cycle.walked`); in local walks it waits
        for the average.
        """
        walked = cycle.walked()
        scale = cycle.hyper[:, SIGN] / torch.where(cycle.hyper[:, NORMALIZE] != 0, cycle.walk_length, 1.0)
        for table in tables:
            table.observer.let_go()
        given: list[tuple[Tensor, Tensor]] = []
        for table, who in zip(tables, moved, strict=True):
            # Of the sizes that were just let go, which allocators have ready.
            made = [
                torch.empty_strided(s.shape, s.strides, dtype=s.dtype, device=table.device)
                if takes and walked[s.group]
                else None
                for s, takes in zip(table.segments, who.tolist(), strict=True)
            ]
            cycle.backend.gradients(table, cycle, scale, [G if G is None else flat_view(G) for G in made])
            pairs = zip(table.segments, made, strict=True)
            given += [(s.param, dtensor.as_part_of(G, s.param)) for s, G in pairs if G is not None]
        return given

    def _fill_remainders(self, sq_norms: list[Tensor]) -> None:
        """Starts the walk of each weight below float32 at random within the rounding of its parameter. From the
        parameter itself, the model would never see a walk whose steps are smaller than the rounding. The first
        gradient of the cycle seeds it, so that runs repeat and replicas stay equal.
        """
        for cycle, tables in self.work:
            seed = sum((part.to(cycle.device).sum() for part in sq_norms), cycle.totals.new_zeros(()))
            for table in tables:
                table.fill_remainders(seed)

    def _end_walk(self, micro_batch: MicroBatch | None) -> list[list[Tensor]]:
        """Returns to θ, and leaves D in its memory, divided by the number of ranks that average it. Returns, for each
        cycle and table, whether each segment had a gradient.
        """
        self.ensure_displacements()
        share = 1 / self.ranks.walkers if self.is_local else 1.0
        for cycle, tables in self.work:
            cycle.backend.end_walk(tables, cycle, micro_batch, share)
        return [[table.took_part() for table in tables] for _, tables in self.work]

    def _average(self, moved: list[list[Tensor]], votes: list[bool]) -> tuple[Tensor, list[list[Tensor]]]:
        """Replaces D and Γ by their means over `displacement_group`: sends a vector for each cycle, and the flat
        buckets as they lie. votes: whether this rank is in outer_step(), and whether it took an inner step. Returns
        the ranks' sums of votes, [2] float64, and of `moved`.
        """
        self._rows = []  # the mean over ranks takes their place
        sums: list[list[Tensor]] = []
        try:
            for (cycle, tables), who in zip(self.work, moved, strict=True):
                vector = cycle.walk_to_average(votes, who)
                self.ranks.sum_over_walkers([vector])
                sum_of_votes, counts = cycle.take_average(vector, self.ranks.walkers)
                sums.append(list(counts.split([len(table.segments) for table in tables])))
            flats = [flat for _, tables in self.work for table in tables for flat in table.displacements()]
            self.ranks.sum_over_walkers(flats)
        except BaseException:  # a rank that has stopped, for example: D is lost, θ is not
            self.discard()
            raise
        return sum_of_votes, sums

    def return_to_theta(self) -> None:
        """Forgets the cycle, and returns the parameters to θ."""
        self._end_walk(None)
        self.discard()

    def discard(self) -> None:
        """Forgets the cycle. The parameters must hold θ already."""
        for cycle, tables in self.work:
            cycle.reset()
            for table in tables:
                table.finish_outer_step(everything=True)
        self.position = 0

    def _share_results(self) -> None:
        """Adds up over all ranks the figures of `metrics()` that each rank knows only of its own parameters. It does so
        once per cycle, so that `metrics()` does not wait for other ranks and may be called on one alone.
        """
        if self.ranks.norm_is_shared:
            parts = [(spread, cycle.results_of_parameters()) for (_, spread), cycle in self.cycles.items()]
            totals = self.ranks.add(parts, "the metrics")
            for cycle, total in zip_longest(self.cycles.values(), totals):
                cycle.set_results_of_parameters(total)

    def start_from(self, position: int) -> None:
        """Puts the cycle at the position of a state that is loaded: all sums zero, no parameter touched."""
        self.position, self._rows = position, []
        self.capture.begin(None)
        for cycle in self.cycles.values():
            cycle.reset()
            cycle.forget_finished(keep_memory=self.capture.ever)
        for table in self.tables.values():
            table.set_touched(table.segments, False)
            table.observer.forget_versions()

    # CUDA graphs

    def follow_capture(self, groups: list[dict[str, Any]], waits: bool) -> None:
        """Checks a capture into a CUDA graph that begins, goes on or has ended, and prepares its replays. The host sees
        no replay, so once steps were captured, later ones copy rows and hyperparameters anew.
        """
        current, tables = graphs.capture_id(self._devices), list(self.tables.values())
        capturable = self.outer is None and any(group["capturable"] for group in groups)
        if current is None:
            reads_rows = all(cycle.backend is not reference for cycle, _ in self.work)
            alone = not self.ranks.communicates and graphs.may_be_captured(self._devices)
            self._set_blind(self.is_open and capturable and reads_rows and alone)
        if not self.is_blind:
            self._check_cut()
        if current is not None:
            if self.outer is not None:
                raise RuntimeError(
                    "step() of Nexus is being captured into a CUDA graph, but the host steps the optimizers behind the "
                    "walk: leave step() out of the graph, or use NexusAdamW(capturable=True)"
                )
            amsgrad = [bucket.amsgrad == groups[bucket.group]["amsgrad"] for t in tables for bucket in t.buckets]
            ready = self._warm and not waits and all(amsgrad)
            graphs.check_can_be_replayed(
                groups, communicates=self.ranks.communicates, ready=ready, inner_steps=self.inner_steps
            )
        self.capture.begin(current)
        prepares = capturable and current is None and graphs.may_be_captured(self._devices)
        count = graphs.PREPARED_CYCLES * (self.inner_steps or graphs.PREPARED_PASSES) if prepares else 0
        for table in tables:
            if self.capture.ever:
                table.distrust_device()
            graphs.follow(table, table.rows, current is not None, count)
        for cycle in self.cycles.values():
            graphs.follow(cycle, cycle.hyper, current is not None, count)

    def check_capture_has_not_ended(self) -> None:
        """Raises RuntimeError if a capture ended in mid-cycle, before others copy the state."""
        if self.capture.known is not None and not self.is_blind:
            self._check_cut()

    @property
    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(cycle.device for cycle, _ in self.work))

    def _check_cut(self) -> None:
        """Raises RuntimeError for a capture that does not begin or end at a boundary."""
        error = self.capture.cut(self._devices, self.position, self.inner_steps)
        if error is None:
            return
        for table in self.tables.values() if self.capture.known is not None else ():
            table.set_touched(table.segments, False)
            self.position = 0
        raise error
