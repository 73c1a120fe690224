"""The scalars of a cycle. They live on the device, and the host reads them only in `metrics()`."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .graphs import Replayed, upload
from .options import HYPER, INNER_LR, LR, SIGN, WEIGHT_DECAY


class MicroBatch(NamedTuple):
    """What a micro-batch brings beside its gradients.

    sq_norms: float64, any device, at least one element in all: their sum, in their order, is ‖g‖² over all tables of
    the optimizer. position: inner step of the cycle, from 0. grad_scale, found_inf: one element each, from
    torch.amp.GradScaler.
    """

    sq_norms: list[Tensor]
    position: int
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def on(self, device: torch.device) -> MicroBatch:
        """Returns the same with everything on `device`; waits only for copies to the CPU."""

        def moved(tensor: Tensor) -> Tensor:
            # A copy to the CPU that nobody waits for may be read before it arrives.
            return tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")

        scale, found = (None if value is None else moved(value) for value in (self.grad_scale, self.found_inf))
        return MicroBatch([moved(sq_norm) for sq_norm in self.sq_norms], self.position, scale, found)


class Cycle:
    """Scalars of the running cycle on one device, for `n_groups` parameter groups. float64, except the int64 `moves`
    and `lost_moves`.

    room: the number of norms that fit; K where that is known.

    hyper [n_groups, 8]: what kernels need of each group, see HYPER; `inner_lr` is γ_k, already scheduled.
    factor [n_groups]: ±γ_k/‖g_k‖, which a gradient is multiplied by; 0 where the inner step is skipped.
    sums [3·n_groups + room]: first walk_length and walk_sq_length [n_groups], Γ = Σγ and Σγ² over the inner steps
    really taken; then displacement_sq [n_groups], ‖D‖², which the outer step writes; then grad_norms [room], unscaled
    norms, with -1 for NaN, since NaN differs from itself and distributed loading refuses that.
    totals: skipped_inner_steps, skipped_outer_steps.
    counts: moves and lost_moves, the element moves in this cycle and those that rounding swallowed.
    taken: inner steps of this cycle, 0-dim int64, where the host does not count them.
    results: memory, its own for each number of groups, that keeps a finished cycle: sums as above, counts, and thirdly
    its inner steps.
    finished: `results` once a cycle has finished, None before.
    """

    def __init__(self, device: torch.device, room: int, backend: ModuleType) -> None:
        self.device, self.room, self.backend = device, room, backend
        self._shown_norms = room  # by a group: as many always, though there may be room for more
        self.hyper = torch.zeros(0, len(HYPER), dtype=torch.float64, device=device)
        self.factor, self.totals = self._zeros(0), self._zeros(2)
        self._set_sums(self._zeros(room))
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.taken = torch.zeros((), dtype=torch.int64, device=device)
        self.finished: tuple[Tensor, Tensor] | None = None
        self._told: tuple[Tensor, torch.Event] | None = None  # Γ on its way to the host, and whether it is there
        self.capturing, self.replayed = False, Replayed()  # into a CUDA graph
        self._lay_out()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def _set_sums(self, sums: Tensor) -> None:
        """Takes these sums, with one more number behind them: the norm whose place only the device knows, see
        `count_pass`.
        """
        memory = torch.cat([sums, self._zeros(1)])
        self.sums, self._norm = memory[:-1], memory[-1:]

    def _lay_out(self) -> None:
        parts = self.sums.split([len(self.factor)] * 3 + [self.room])
        self.walk_length, self.walk_sq_length, self.displacement_sq, self.grad_norms = parts
        self.skipped_inner_steps, self.skipped_outer_steps = self.totals
        self.moves, self.lost_moves = self.counts
        self.results = torch.zeros_like(self.sums), torch.zeros(3, dtype=torch.int64, device=self.device)

    def grow(self, n_groups: int) -> None:
        """Makes room for more groups. Existing ones keep their values; a new one starts with Γ = 0."""
        missing = n_groups - len(self.factor)
        if missing:
            self.hyper = torch.cat([self.hyper, self._zeros(missing, len(HYPER))])
            self.factor = torch.cat([self.factor, self._zeros(missing)])
            of_groups = (self.walk_length, self.walk_sq_length, self.displacement_sq)
            grown = [part for old in of_groups for part in (old, self._zeros(missing))]
            self._set_sums(torch.cat([*grown, self.grad_norms]))
            self._lay_out()

    def make_room(self, room: int) -> None:
        """Makes room for this many norms. Keeps those that are there, and the figures of the finished cycle."""
        if room > self.room:
            more, finished = self._zeros(room - self.room), self.finished
            self._set_sums(torch.cat([self.sums, more]))
            self.room = room
            self._lay_out()
            if finished is not None:
                self.finished = torch.cat([finished[0], more]), finished[1]

    def follow(self, other: Cycle) -> None:
        """Starts at the position of a cycle on another device. ‖D‖² and counts stay each device's own."""
        n_groups = len(self.factor)
        self.make_room(other.room)
        self.sums.copy_(other.sums)
        self.sums[2 * n_groups : 3 * n_groups] = 0
        self.totals.copy_(other.totals)

    def group_data(self, group: int) -> dict[str, Any]:
        """Returns Γ and Σγ² as a parameter group shows them: views of the live values."""
        return {"walk_length": self.walk_length[group], "walk_sq_length": self.walk_sq_length[group]}

    def optimizer_data(self) -> dict[str, Any]:
        """Returns what all groups share, as one of them shows it: views of the live values."""
        return {
            "grad_norms": list(self.grad_norms[: self._shown_norms]),
            "skipped_inner_steps": self.skipped_inner_steps,
            "skipped_outer_steps": self.skipped_outer_steps,
        }

    def load_group_data(self, group: int, data: dict[str, Any], *, running: bool) -> None:
        """Copies what a group showed, perhaps in another process: the totals, and for a running cycle its sums."""
        if "skipped_inner_steps" in data:
            self.skipped_inner_steps.copy_(torch.as_tensor(data["skipped_inner_steps"], device=self.device))
            self.skipped_outer_steps.copy_(torch.as_tensor(data["skipped_outer_steps"], device=self.device))
        if running:
            self.walk_length[group] = data["walk_length"]
            self.walk_sq_length[group] = data["walk_sq_length"]
            if "grad_norms" in data:
                norms = [torch.as_tensor(norm, device=self.device).double().view(()) for norm in data["grad_norms"]]
                self.make_room(len(norms))
                self.grad_norms[: len(norms)] = torch.stack(norms)

    def set_hyper(self, rows: list[list[float | Tensor]]) -> None:
        """Sends the groups' hyperparameters, one row of HYPER each, to the device without waiting for it."""
        numbers = [[0.0 if isinstance(value, Tensor) else value for value in row] for row in rows]
        upload(
            torch.tensor(numbers, dtype=torch.float64, device="cpu"),
            self.hyper,
            self.replayed if self.capturing else None,
        )
        for target, row in zip(self.hyper, rows, strict=True):
            for column, value in enumerate(row):
                if isinstance(value, Tensor):
                    target[column].copy_(value, non_blocking=self.device.type != "cpu")

    def walk_to_average(self, votes: list[bool], took_part: list[Tensor]) -> Tensor:
        """Returns what ranks that walk on their own add up, in one float64 vector on the device: Γ, Σγ² and AdamW's
        hyperparameters of each group, this rank's two votes, and which parameters had a gradient. Hyperparameters
        count only if this rank walked, which is its second vote. Waits for no device.
        """
        host = torch.cat([torch.tensor(votes, device="cpu"), *took_part]).double()
        if self.device.type != "cpu":
            host = host.pin_memory()
        of_adamw = self.hyper[:, LR : WEIGHT_DECAY + 1].flatten() * votes[1]
        host = host.to(self.device, non_blocking=self.device.type != "cpu")
        return torch.cat([self.walk_length, self.walk_sq_length, of_adamw, host])

    def take_average(self, total: Tensor, walkers: int) -> tuple[Tensor, Tensor]:
        """Takes the means from the sum of all ranks' `walk_to_average`. Returns the votes [2], and for each parameter
        how many ranks had a gradient.

        AdamW's hyperparameters become the mean over the ranks that walked: schedules of ranks with fewer micro-batches
        stand still, and the weights must stay equal. Σγ²/Γ² must come out as that of the inner steps of all ranks, so
        mean Σγ² is divided by the number of ranks once more.
        """
        of_adamw, n = self.hyper[:, LR : WEIGHT_DECAY + 1], len(self.walk_length)
        behind = 2 * n + of_adamw.numel()
        length, sq_length, hypers, votes, counts = total.tensor_split([n, 2 * n, behind, behind + 2])
        self.walk_length.copy_(length * (1 / walkers))
        self.walk_sq_length.copy_(sq_length * (1 / walkers) ** 2)
        of_adamw.copy_(hypers.view_as(of_adamw) / votes[1].clamp(min=1))
        return votes, counts

    def advance(self, micro_batch: MicroBatch | None) -> None:
        """Decides from the squared norm of all gradients whether an inner step is taken, and counts its length. It is
        skipped if n_k is 0, inf or nan, or if `found_inf` is not 0. None: an outer step without a last gradient,
        which adds nothing to the walk. Source: arXiv 2604.09258, Algorithm 3.
        """
        if micro_batch is None:
            self.factor.zero_()
            return
        sq_norms, position, grad_scale, found_inf = micro_batch.on(self.device)
        # One by one, in their order: a sum must not depend on what came from which table or device.
        norm = sum((partial.sum() for partial in sq_norms), self._zeros()).sqrt()
        taken = norm.isfinite() & (norm > 0)
        if found_inf is not None:
            taken &= (found_inf == 0).view(())
        step = torch.where(taken, self.hyper[:, INNER_LR], 0.0)
        self.factor.copy_(torch.where(taken, self.hyper[:, SIGN] * self.hyper[:, INNER_LR] / norm, 0.0))
        self.walk_length += step
        self.walk_sq_length += step * step
        self.skipped_inner_steps += ~taken
        unscaled = norm if grad_scale is None else norm / grad_scale.double().view(())
        self.grad_norms[position] = torch.where(unscaled.isnan(), -1.0, unscaled)

    def finish(self, taken: int) -> None:
        """Ends the cycle after `taken` inner steps: keeps its sums as `finished` and starts from zero."""
        self.skipped_outer_steps += (self.walk_length == 0).all()
        sums, counts = self.finished = self.results
        sums.copy_(self.sums)
        counts[:2].copy_(self.counts)
        counts[2].fill_(taken)
        self.reset()

    def count_pass(self) -> None:
        """Counts an inner step whose norm the backend put behind `grad_norms`, at position `room`. When the room is
        used up, the last place takes it, unless that place tells of an overflow.
        """
        place = self.taken.clamp(max=self.room - 1).view(1)
        before = self.grad_norms[place]
        self.grad_norms[place] = torch.where((before < 0) | before.isinf(), before, self._norm)
        self.taken += 1

    def finish_pass_count(self, *, before: bool) -> None:
        """Ends a cycle whose inner steps the device has counted; called before the outer step and after it. Changes
        nothing if there was no inner step.
        """
        results = *self.results, self.skipped_outer_steps
        if before:
            self._before = [result.clone() for result in results]
            return
        self.results[1][2] = self.taken
        for result, known in zip(results, self._before, strict=True):
            result.copy_(torch.where(self.taken > 0, result, known))
        self.taken.zero_()

    def results_of_parameters(self) -> Tensor:
        """Returns what only this cycle's parameters contributed to the finished one, [3] float64: Σ_groups ‖D‖²/Γ²,
        moves and lost moves. Other ranks may have other groups.
        """
        walk_length, displacement_sq = self._finished_walk()
        r_sq = torch.where(walk_length > 0, displacement_sq / walk_length**2, 0.0).sum()
        return torch.cat([r_sq.view(1), self.results[1][:2].double()])

    def _finished_walk(self) -> tuple[Tensor, Tensor]:
        """Returns Γ and ‖D‖² of each group in the last finished cycle: views."""
        walk_length, _, displacement_sq, _ = self.results[0].split([len(self.factor)] * 3 + [self.room])
        return walk_length, displacement_sq

    def set_results_of_parameters(self, values: Tensor | None) -> None:
        """Replaces them with others, all ‖D‖² in that of the first group that walked. None: with zeros, since another
        cycle holds the results of all.
        """
        values = torch.zeros(3, dtype=torch.float64) if values is None else values
        values = values.to(self.device, non_blocking=self.device.type != "cpu")
        walk_length, displacement_sq = self._finished_walk()
        first = torch.arange(len(walk_length), device=self.device) == (walk_length > 0).int().argmax()
        displacement_sq.copy_(torch.where(first, values[0] * walk_length**2, 0.0))
        self.results[1][:2] = values[1:]

    def forget_finished(self, *, keep_memory: bool) -> None:
        """Forgets the finished cycle. keep_memory: replays may still finish one in `results`."""
        for result in self.results:
            result.zero_()
        self.finished = self.results if keep_memory else None

    def hold(self) -> None:
        """Keeps alive what captured steps write."""
        self.replayed.hold(self.hyper, self.factor, self.sums, self.totals, self.counts, self.taken, *self.results)

    def tell_host(self) -> None:
        """Sends Γ to the host, without waiting for it: see `walked`."""
        if self.device.type != "cpu":
            told, arrived = torch.empty_like(self.walk_length, device="cpu", pin_memory=True), torch.Event(self.device)
            told.copy_(self.walk_length, non_blocking=True)
            arrived.record()
            self._told = told, arrived

    def walked(self) -> list[bool]:
        """Returns which groups have Γ > 0, since the host must not step the others. Waits for the inner step before
        the outer step, which is done once a backward pass has been queued on the device since. Waits for the inner
        step that the outer step includes too only if a group had not walked before it.
        """
        if self._told is not None:
            told, arrived = self._told
            arrived.synchronize()
            if bool((told > 0).all()):
                return [True] * len(told)
        return (self.walk_length > 0).tolist()  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Sets all sums of the running cycle to zero, but not the totals."""
        self._told = None
        self.sums.zero_()
        self.counts.zero_()


def combine(cycles: list[Cycle]) -> tuple[Tensor, Tensor] | None:
    """Returns one `Cycle.finished` for all devices, on the CPU; None if no cycle has finished. Synchronizes."""
    known = [(cycle.finished[0].cpu(), cycle.finished[1].cpu()) for cycle in cycles if cycle.finished is not None]
    if not known:
        return None
    (sums, counts), others = known[0], known[1:]
    n_groups = (len(sums) - cycles[0].room) // 3
    sums, counts = sums.clone(), counts.clone()
    for other_sums, other_counts in others:
        sums[2 * n_groups : 3 * n_groups] += other_sums[2 * n_groups : 3 * n_groups]
        counts[:2] += other_counts[:2]
    return sums, counts


def summarize(finished: tuple[Tensor, Tensor] | None, room: int) -> dict[str, Any]:
    """The figures of one finished cycle, from `combine`. room: `Cycle.room`.

    alignment: mean pairwise cosine similarity of the unit gradients taken, each at its own point of the walk:
    (R² − s)/(1 − s) with R² = Σ_groups ‖D‖²/Γ² and s = Σγ²/Γ²; NaN when fewer than two were taken.
    """
    if finished is None:
        return {"alignment": float("nan"), "grad_norms": [], "lost_fraction": 0.0}
    sums, counts = finished
    n_groups = (len(sums) - room) // 3
    walk_length, walk_sq_length, displacement_sq, grad_norms = sums.split([n_groups] * 3 + [room])
    moves, lost, taken = counts.tolist()
    moved = walk_length > 0
    alignment = float("nan")
    if moved.any():
        gamma = walk_length[moved]
        r_sq = float((displacement_sq[moved] / gamma**2).sum())
        s = float((walk_sq_length[moved] / gamma**2).min())  # of the groups that walked longest
        alignment = (r_sq - s) / (1 - s) if s < 1 else float("nan")
    norms = [float("nan") if norm < 0 else norm for norm in grad_norms[:taken].tolist()]
    return {"alignment": alignment, "grad_norms": norms, "lost_fraction": lost / moves if moves else 0.0}
