"""The table of segments that kernels walk.

Autograd hands every gradient over in memory of its own, so gradients are read where they lie; weights and state are
ours and lie in large flat buffers. One row of the table, a segment, brings the addresses of one parameter together. A
kernel is started once for a table, not once for a parameter.
"""

from __future__ import annotations

import contextlib
from array import array
from typing import Any

import torch
from torch import Tensor

from . import graphs
from .dtensor import dtensor_type, is_dtensor, local_part, same_layout
from .flat import STATE_DTYPE, Bucket, Segment, bucketed, owns_its_memory, real_dtype, shaped_like
from .graphs import Replayed, upload

# The columns of a table, all int64: addresses in bytes, `length` in real elements, `chunk` the number of the segment's
# first chunk. `struct Segment` in csrc/nexus_math.h is the same list; a test compares the two.
COLUMNS = (
    "weight", "grad", "theta", "walk", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step",
    "length", "group", "touched", "chunk",
)  # fmt: skip
WEIGHT, GRAD, TOUCHED, CHUNK = (COLUMNS.index(name) for name in ("weight", "grad", "touched", "chunk"))

CHUNK_ELEMENTS = 16384  # one partial sum each: fixes the order of summation, whatever the number of threads
PARTS = 4  # of a chunk, for kernels on a GPU that sum nothing over it: memory likes small blocks (docs/gpu.md)


# The extension's quick look at parameters and gradients; without it Python looks at each.
_quick_look, _take_versions = None, None
with contextlib.suppress(ImportError):
    from . import _C

    if _C.prepare_to_look(Tensor, torch.nn.Parameter):
        _quick_look, _take_versions = _C.look, _C.take_versions


class Table:
    """All segments of one device and dtype, of all groups, and the flat buffers behind them.

    ranks: those that the parameters, all of them DTensors then, are sharded over; () where this rank has all of each.
    chunks: how many; parts: into how many a GPU's blocks divide each where they may, 1 where most of them are small.
    `segments` stand in the order of `rows`; `params` are theirs. In the same order: `addresses` of this micro-batch's
    gradients (0: none, -1: one without elements), and `pointers` and `versions` of the parameters when we last looked.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, ranks: tuple[int, ...] = ()) -> None:
        self.device, self.dtype, self.ranks = device, dtype, ranks
        self.segments: list[Segment] = []
        self.params: list[Tensor] = []
        self._has_dtensors = False
        self.buckets: list[Bucket] = []
        self.addresses, self.pointers, self.versions = array("q"), array("q"), array("q")
        self.copies: dict[int, Tensor] = {}  # row: this micro-batch's gradient, where it had other strides
        self.rows = torch.empty(0, len(COLUMNS), dtype=torch.int64, device="cpu")
        self.chunks, self.parts = 0, 1
        self.partials: Tensor  # Σg² of each chunk, float64
        self.displacement_sq: Tensor  # ΣD² of each chunk
        self.sq_norm: Tensor  # Σg² of all chunks, [1], where a kernel adds them up
        self.arrivals: Tensor  # blocks of a grid that have finished, [1] int32; 0 between launches
        # Where ranks average their displacements: that they do; whether those of parameters below float32 are rounded
        # to their dtype; and, before a displaced outer step, != 0 for each segment that had a gradient on any rank,
        # int64 on `device`.
        self.walks_alone = self.reduces_low_precision = False
        self.moved: Tensor
        self._objects = array("q")  # of `_quick_look`
        self._states: list[dict[str, Any]] = []  # the segments'
        self._cycle_views: list[Tensor] = []  # theirs too, once all of them have one
        self._counts_alone = False  # writing into one parameter is known to change no other's version
        self._staged: list[Segment] = []  # those whose parameters have gaps
        self._complete = True  # every segment has a gradient
        self._strays: list[Segment] = []  # those whose parameters do not lie in their bucket's flat memory
        self._suspects: list[int] = []  # rows that others may have written
        self._handed_out: dict[tuple[Segment, str], int] = {}  # versions of θ and walks in the state, see `hand_out`
        self._touched = 0  # how many segments are
        self._shows_cycle_buffers = False
        self._outdated = True  # `rows` lacks a segment, a buffer or where a parameter lies now
        self._stale = self._stale_touched = True  # `rows` has addresses, or who is touched, that the device has not
        self._on_device: tuple[Tensor, ...] = ()
        self.capturing, self.replayed = False, Replayed()  # into a CUDA graph

    @property
    def first(self) -> tuple[int, int]:
        """Group and index of the first parameter."""
        return min((s.group, s.index) for s in self.segments)

    def extend(self, segments: list[Segment], *, flatten: bool) -> None:
        """Gives the segments (all of one group) zero state, and moves their weights into flat memory if allowed."""
        buckets: list[Bucket] = []
        for members, numel in bucketed(segments, STATE_DTYPE[self.dtype].itemsize):
            bucket = Bucket(members[0].group, numel, STATE_DTYPE[self.dtype], self.device)
            buckets.append(bucket)
            for name in ("exp_avg", "exp_avg_sq") + (("master",) if members[0].low_precision else ()):
                bucket.ensure(name)
            steps = torch.zeros(len(members), dtype=torch.float32, device=self.device)
            for i, segment in enumerate(members):
                segment.bucket, segment.step = bucket, torch.from_dlpack(steps[i : i + 1]).view(())
                segment.state["step"] = segment.step
                for name in bucket.buffers:
                    segment.state[name] = segment.shaped(name)
                if segment.low_precision:
                    segment.theta.copy_(segment.weight)
            if flatten:
                self._flatten(bucket, members)
        seen = {s: (self.pointers[s.row], self.versions[s.row]) for s in self.segments}
        seen.update((s, (s.local.data_ptr(), s.version)) for s in segments)
        self._enlist(self.segments + segments, self.buckets + buckets, seen)

    def forget(self, segments: list[Segment]) -> None:
        """Undoes an `extend` that may have failed on its way."""
        seen = {s: (self.pointers[s.row], self.versions[s.row]) for s in self.segments}
        kept = [s for s in self.segments if s not in segments]
        used = [s.bucket for s in kept]
        with contextlib.suppress(Exception):  # repeated by the next step
            self._enlist(kept, [bucket for bucket in self.buckets if bucket in used], seen)

    def _enlist(self, segments: list[Segment], buckets: list[Bucket], seen: dict[Segment, tuple[int, int]]) -> None:
        """Makes these all that the table has. seen: address and version of each parameter when we last looked."""
        self._outdated = True
        # In the groups' order, whenever a parameter came: the norm is summed in that order, also after a resume.
        self.segments, self.buckets = sorted(segments, key=lambda s: (s.group, s.index)), buckets
        self.params = [s.param for s in self.segments]
        self._has_dtensors = any(map(is_dtensor, self.params))
        if _quick_look is not None and self._has_dtensors:
            _C.prepare_to_look_at_dtensors(dtensor_type())
        self._objects = array("q", bytes(8 * len(self.segments)))
        self._states = [s.state for s in self.segments]
        self._cycle_views = []
        self._counts_alone = False
        self._staged = [s for s in self.segments if s.staged is not None]
        self._shows_cycle_buffers = False  # not all of them
        for row, segment in enumerate(self.segments):
            segment.row = row
        self.addresses, self._complete = array("q", bytes(8 * len(self.segments))), not self.segments
        self.copies.clear()
        self.pointers, self.versions = (array("q", [seen[s][i] for s in self.segments]) for i in (0, 1))
        self._refresh()

    def _flatten(self, bucket: Bucket, members: list[Segment]) -> None:
        # A DTensor's part stays where it lies: FSDP2 gathers from there.
        movable = [
            s for s in members if s.staged is None and s.numel and s.local is s.param and owns_its_memory(s.param)
        ]
        if not movable:
            return
        flat = bucket.flat = torch.zeros(bucket.numel, dtype=self.dtype, device=self.device)
        for segment in movable:
            target = flat[segment.start : segment.start + segment.numel]
            target.copy_(segment.weight)
            segment.param.data = shaped_like(target, segment)

    def _refresh(self) -> None:
        """Writes the table anew if segments or buffers came or a parameter's storage was replaced.

        `_outdated` is set before such a change and cleared when all is done: whatever fails on the way, for lack of
        memory for example, is repeated by the next step. RuntimeError while steps are captured into a CUDA graph.
        """
        if not self._outdated:
            return
        if graphs.capture_id([self.device]) is not None:
            raise RuntimeError(
                f"the memory of parameters on {self.device} was exchanged just before or while step() was captured "
                "into a CUDA graph: run one whole cycle before the capture"
            )
        rows: list[list[int]] = []
        counts = [-(-s.numel // CHUNK_ELEMENTS) for s in self.segments]
        chunks = 0
        for s, grad, count in zip(self.segments, self.addresses, counts, strict=True):
            weight = (s.local if s.staged is None else s.staged).data_ptr()

            def address(name: str, s: Segment = s) -> int:
                return s.buffer(name).data_ptr() if name in s.bucket.buffers else 0

            walk = address("walk") if s.low_precision else weight
            maximum = address("max_exp_avg_sq") if s.bucket.amsgrad else 0
            state = [address(s.theta_name), walk, address("exp_avg"), address("exp_avg_sq"), maximum]
            rows.append([weight, grad, *state, s.step.data_ptr(), s.numel, s.group, s.touched, chunks])
            chunks += count
        with torch.device("cpu"):  # whatever the default device is
            self.rows = torch.tensor(rows, dtype=torch.int64).view(-1, len(COLUMNS))
            row_of_chunk = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), torch.tensor(counts))
            groups = torch.tensor([s.group for s in self.segments], dtype=torch.int64)
            first_rows = torch.searchsorted(groups, torch.arange(self.segments[-1].group + 2 if rows else 1))
            first_chunks = torch.cat([self.rows[:, CHUNK], torch.tensor([chunks])])[first_rows]
            starts = torch.stack([first_rows, first_chunks], dim=1)
        self._on_device = tuple(torch.empty_like(t, device=self.device) for t in (self.rows, row_of_chunk, starts))
        upload(row_of_chunk, self._on_device[1])
        upload(starts, self._on_device[2])
        self._find_strays()
        self.chunks = chunks
        self.parts = PARTS if 2 * sum(s.numel for s in self.segments) > chunks * CHUNK_ELEMENTS else 1
        self.partials = torch.empty(chunks, dtype=torch.float64, device=self.device)
        self.displacement_sq = torch.empty_like(self.partials)  # of its own: other devices may still read the norm's
        self.sq_norm = torch.zeros(1, dtype=torch.float64, device=self.device)
        self.arrivals = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._stale, self._outdated = True, False

    def _find_strays(self) -> None:
        """Finds `_strays`; frees flat memory where no parameter lies."""
        self._strays = []
        inside: set[Bucket] = set()
        size = self.dtype.itemsize
        for segment, weight in zip(self.segments, self.rows[:, WEIGHT].tolist(), strict=True):
            flat = segment.bucket.flat
            if flat is not None and weight == flat.data_ptr() + segment.start * size:
                inside.add(segment.bucket)
            elif segment.numel:
                self._strays.append(segment)
        for bucket in self.buckets:
            if bucket not in inside:
                bucket.flat = None

    @property
    def layout(self) -> str:
        """Elements of each bucket and of what lies outside of them, which ranks that average them must share."""
        inside = [bucket.numel if bucket.flat is not None else 0 for bucket in self.buckets]
        outside = [segment.numel for segment in self._strays]
        return f"{self.dtype} from parameter {self.first}: in buckets of {inside}, outside of them {outside}"

    def on_device(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """What kernels on a GPU read: `rows` [n, 12], the row of each chunk [chunks], the first row and first chunk of
        each group and of the end [groups + 1, 2], in the device's memory, and `touch`.

        touch: 0 no parameter is touched, 1 just those with a gradient are, 2 the rows tell. Rows are copied only if an
        address changed (or who is touched, with 2), through pinned memory and without waiting.
        """
        if not self._touched:
            touch = 0
        elif (self._touched == len(self.segments) and self._complete) or torch.equal(
            self.rows[:, TOUCHED], (self.rows[:, GRAD] != 0).long()
        ):
            touch = 1
        else:
            touch = 2
        if self._stale or (touch == 2 and self._stale_touched):
            upload(self.rows, self._on_device[0], self.replayed if self.capturing else None)
            self._stale = self._stale_touched = False
        rows, row_of_chunk, starts = self._on_device
        return rows, row_of_chunk, starts, touch

    def displaced_on_device(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The same for a displaced outer step: `touched` is who `moved`, on any rank. `grad` is where their D lies in
        the parameter's dtype, or 0 where it lies at `walk`.
        """
        rows, row_of_chunk, starts, _ = self.on_device()
        moved = self.moved != 0
        rows[:, TOUCHED] = moved
        rows[:, GRAD] = rows[:, WEIGHT] * moved if self.displacement_in_weight else 0
        self._stale = True
        return rows, row_of_chunk, starts, 2

    @property
    def displacement_in_weight(self) -> bool:
        """Whether `displace` rounds D into low-precision weights; else it goes to the walks."""
        return self.reduces_low_precision and self.dtype != STATE_DTYPE[self.dtype]

    def displacement(self, segment: Segment) -> Tensor:
        """Flat view of the memory where `displace` leaves a segment's D."""
        return segment.weight if self.displacement_in_weight else segment.walk

    def distrust_device(self) -> None:
        """Has the rows copied again: replays of captured steps may have put others there, or will."""
        self._stale = True

    def hold(self) -> None:
        """Keeps alive what captured steps read and write beside weights and state."""
        sums = self.partials, self.displacement_sq, self.sq_norm, self.arrivals
        self.replayed.hold(*self._on_device, *sums)

    # One micro-batch

    def read_gradients(self, *, use: bool) -> None:
        """Looks at every parameter and, with `use`, its gradient; modifies nothing but what it remembers of them.

        Raises RuntimeError for a gradient that does not fit its parameter, or a parameter that was converted.
        """
        self._refresh()
        self.copies.clear()
        self.forget_handed_out()
        addresses = array("q", bytes(8 * len(self.segments)))
        unusual, self._suspects = self._look(addresses, use)
        for row in unusual:
            self._read_gradient(self.segments[row], addresses, use)
        if addresses != self.addresses:
            self.addresses, self._complete = addresses, 0 not in addresses
            self.rows[:, GRAD] = torch.frombuffer(addresses, dtype=torch.int64)
            self._stale = True

    def _look(self, addresses: array[int], use: bool) -> tuple[list[int], list[int]]:
        """Fills in the addresses of gradients that lie as their parameters do; returns the rows that need another look
        at the gradient, and those that may have been written by others."""
        if _quick_look is None or self._outdated:
            everything = list(range(len(self.segments)))
            return everything, everything
        buffers = (values.buffer_info()[0] for values in (addresses, self.pointers, self.versions, self._objects))
        # Else each attribute of a DTensor is preceded by a search for its `__torch_function__`.
        with torch._C.DisableTorchFunctionSubclass() if self._has_dtensors else contextlib.nullcontext():
            return _quick_look(self.params, self.rows.data_ptr(), use, *buffers)

    def _read_gradient(self, segment: Segment, addresses: array[int], use: bool) -> None:
        param, row = segment.local, segment.row
        if param.data_ptr() != self.pointers[row] and self._was_converted(segment):
            raise RuntimeError(
                f"{segment.where} was {self.dtype} on {self.device} with strides {segment.param_strides} when the "
                f"optimizer was built and is now {tuple(param.shape)} {param.dtype} on {param.device} with strides "
                f"{param.stride()}: convert or move the model (model.half(), model.to(...)) first and build the "
                "optimizer after it"
            )
        grad = segment.param.grad if use else None
        if grad is None:
            return
        if not same_layout(grad, segment.param):
            self.copies[row] = grad = _redistributed(segment, grad)
        grad = local_part(grad)
        fits = grad.layout is torch.strided and grad.shape == segment.shape
        if not fits or grad.dtype is not param.dtype or grad.device != self.device:
            raise RuntimeError(_misfit(segment, grad))
        if not self.can_read(segment, grad):
            dense = torch.empty_strided(segment.shape, segment.strides, dtype=grad.dtype, device=self.device)
            self.copies[row] = grad = dense.copy_(grad.detach())
        addresses[row] = grad.data_ptr() or -1  # an empty gradient is one all the same, without memory

    def can_read(self, segment: Segment, grad: Tensor) -> bool:
        """Whether kernels can read this gradient where it lies."""
        return (
            grad.layout is torch.strided
            and grad.dtype is segment.dtype
            and grad.stride() == segment.strides
            and grad.shape == segment.shape
            and grad.device == self.device
            and not grad.is_neg()
            and not grad.is_conj()
        )

    def _was_converted(self, segment: Segment) -> bool:
        param = segment.local
        return (
            real_dtype(param.dtype) is not self.dtype
            or param.device != self.device
            or param.shape != segment.shape
            or param.stride() != segment.param_strides
        )

    def was_written(self, segment: Segment) -> bool:
        """Whether somebody else wrote into the parameter, or replaced its storage, since we last looked."""
        row = segment.row
        return segment.version != self.versions[row] or segment.local.data_ptr() != self.pointers[row]

    def adopt_writes(self, *, restart: bool, look: bool = True, loading: bool = False) -> None:
        """Takes over what others wrote into the parameters since the last look; see `Segment.adopt`.

        `restart=False`: values written since the last step are the walk that belongs to a state just loaded.
        `look=False`: `read_gradients` has just looked. `loading`: the state is about to be replaced, perhaps by itself,
        after torch.distributed.checkpoint wrote the weights of FSDP2 in a way that leaves no trace.
        RuntimeError where a walk of this rank alone would become θ.
        """
        if look:
            _, self._suspects = self._look(self.addresses, use=False)
        suspects = self.segments if loading else [self.segments[row] for row in self._suspects]
        written = [
            s for s in suspects if (self.was_written(s) or (loading and s.low_precision)) and not self._was_converted(s)
        ]
        for segment in written:
            if self.walks_alone and segment.touched and restart and not loading and not self._was_loaded(segment):
                raise RuntimeError(
                    f"{segment.where} was written in mid-cycle, where each rank of displacement_group has weights of "
                    "its own, so that ranks would part for good: write at a boundary (optimizer.at_boundary) or inside "
                    "outer_weights(), on all ranks"
                )
        for segment in written:
            segment.adopt(restart=restart, with_state=self._was_loaded(segment))
        self._remember(written)

    def adopt_writes_into_theta(self) -> None:
        """The same while θ is shown, for the masters that a state saved now must hold; `show_walk` looks again."""
        for segment in self.segments:
            if segment.low_precision and self.was_written(segment):
                segment.adopt(restart=True, shown=segment.theta)

    def hand_out(self) -> None:
        """Remembers the state as it is handed out: a distributed load writes into its tensors before anything of ours
        is called, and then neither anchors nor masters follow the weights that it wrote as well."""
        for segment in self.segments:
            for name, version in segment.theta_versions():
                self._handed_out.setdefault((segment, name), version)

    def forget_handed_out(self) -> None:
        """The state is ours again: after a load, or in the next step."""
        self._handed_out.clear()

    def _was_loaded(self, segment: Segment) -> bool:
        """Whether somebody else wrote into the θ or the walk that were handed out."""
        known = self._handed_out
        return any(known.get((segment, name), version) != version for name, version in segment.theta_versions())

    def _remember(self, segments: list[Segment]) -> None:
        for segment in segments:
            self._counts_alone = False  # who writes may also have made views
            pointer = segment.local.data_ptr()
            self._outdated |= pointer != self.pointers[segment.row]
            self.pointers[segment.row], self.versions[segment.row] = pointer, segment.version
        self._refresh()

    def wrote(self, segments: list[Segment]) -> None:
        """Tells autograd, and the check for other writers, that a kernel wrote these segments' weights."""
        for segment in self._staged:
            if segment in segments:
                segment.local.detach().copy_(segment.staged)  # type: ignore[arg-type]
        if segments is self.segments and _take_versions is not None:
            torch.autograd.graph.increment_version(self.params)
            # Mostly each is one more than when we looked; views of one tensor, though, share one count.
            self._counts_alone = _take_versions(self.params, self.versions.buffer_info()[0], self._counts_alone)
        else:
            torch.autograd.graph.increment_version([s.param for s in segments])
            for segment in segments:
                self.versions[segment.row] = segment.version

    def gradient(self, segment: Segment) -> Tensor | None:
        """This micro-batch's gradient of a segment, dense with its strides; None without one."""
        if not self.addresses[segment.row]:
            return None
        copied = self.copies.get(segment.row)
        return copied if copied is not None else local_part(segment.param.grad)

    def with_gradient(self) -> list[Segment]:
        """The segments that have a gradient in this micro-batch."""
        if self._complete:
            return self.segments
        return [s for s, address in zip(self.segments, self.addresses, strict=True) if address]

    def moving(self) -> list[Segment]:
        """The segments that take part in the outer step: those with a gradient at any time in this cycle."""
        if self._touched == len(self.segments) or self._complete:
            return self.segments
        return [s for s, address in zip(self.segments, self.addresses, strict=True) if address or s.touched]

    # Walks of several ranks

    def took_part(self) -> Tensor:
        """Which segments had a gradient in this cycle, with this micro-batch's: [segments] bool, on the CPU."""
        return (self.rows[:, GRAD] != 0) | (self.rows[:, TOUCHED] != 0)

    def displacements(self) -> list[Tensor]:
        """The memory where a backend's `displace` has left D, to be reduced in place: flat, one for each bucket, and
        one for each parameter that lies outside. What lies between parameters is of no account."""
        if self.dtype != STATE_DTYPE[self.dtype] and not self.displacement_in_weight:
            return [bucket.buffers["walk"] for bucket in self.buckets]
        flats = [bucket.flat for bucket in self.buckets if bucket.flat is not None]
        return flats + [segment.weight for segment in self._strays]

    def return_to_theta(self) -> None:
        """After `displace`: all parameters hold θ again, and nothing of the cycle is left."""
        for segment in self.segments:
            segment.weight.copy_(segment.theta)
        self.finish_outer_step(displaced=True)

    # One cycle

    def finish_inner_step(self) -> None:
        """After a backend's inner_step: what it wrote is known, copies of gradients are let go."""
        moved = self.with_gradient()
        self.wrote(moved)
        if self._touched < len(self.segments):
            self.set_touched([s for s in moved if not s.touched] if self._touched else moved, True)
        self.copies.clear()

    def finish_outer_step(self, *, displaced: bool = False) -> None:
        """After a backend's outer_step: all parameters hold θ, nothing of the cycle is left."""
        self.wrote(self.segments if displaced else self.moving())
        self.set_touched(self.segments, False)
        self.hide_cycle_buffers()
        self.copies.clear()

    def set_touched(self, segments: list[Segment], touched: bool) -> None:
        """Records whether theta and walk of the segments are valid."""
        for segment in segments:
            segment.touched = touched
        if len(segments) == len(self.segments):
            self.rows[:, TOUCHED] = touched
            self._touched = touched * len(segments)
        elif segments:
            self.rows[[s.row for s in segments], TOUCHED] = int(touched)
            self._touched = int(self.rows[:, TOUCHED].sum())
        self._stale_touched |= bool(segments)

    def show_theta(self) -> None:
        """Puts θ into the parameters and the walk aside; `show_walk` undoes it, bit for bit."""
        shown = [s for s in self.segments if s.touched]
        for segment in shown:
            if segment.low_precision:
                segment.weight.copy_(segment.theta)
            else:
                _swap(segment.weight, segment.theta)
        self.wrote(shown)
        self.hide_cycle_buffers()

    def show_walk(self) -> None:
        """Puts the walk back; a parameter that was written meanwhile keeps the value, which is θ now."""
        shown = [s for s in self.segments if s.touched]
        for segment in shown:
            if self.was_written(segment):
                segment.adopt(restart=True, shown=segment.theta)
            elif not segment.low_precision:
                _swap(segment.weight, segment.theta)
            if segment.low_precision:
                segment.weight.copy_(segment.walk)
        self.wrote(shown)
        self._remember(shown)

    def show_low_precision(self) -> None:
        """Rounds walks and masters, just restored, into their parameters."""
        mirrors = [s for s in self.segments if s.low_precision]
        for segment in mirrors:
            segment.weight.copy_(segment.walk if segment.touched else segment.theta)
        self.wrote(mirrors)

    @property
    def _cycle_key(self) -> str:
        return "walk" if self.dtype != STATE_DTYPE[self.dtype] else "anchor"

    def ensure_cycle_buffers(self) -> None:
        """Allocates anchors (below float32: walks) where they are missing and shows them in the state."""
        if self._shows_cycle_buffers and not self._outdated:
            return
        name = self._cycle_key
        self._outdated |= any(name not in bucket.buffers for bucket in self.buckets)
        for bucket in self.buckets:
            bucket.ensure(name)
        self._refresh()
        if not self._cycle_views:
            for segment in self.segments:
                if segment.cycle_view is None:
                    segment.cycle_view = segment.shaped(name)
            self._cycle_views = [s.cycle_view for s in self.segments if s.cycle_view is not None]
        for state, view in zip(self._states, self._cycle_views, strict=True):
            state[name] = view
        self._shows_cycle_buffers = True

    @property
    def shows_cycle_buffers(self) -> bool:
        """Whether the state holds anchors or walks."""
        return any(segment.cycle_key in segment.state for segment in self.segments)

    def hide_cycle_buffers(self) -> None:
        """Removes anchors and walks from the state; the memory stays ours for the next cycle."""
        self._shows_cycle_buffers = False
        name = self._cycle_key
        for state in self._states:
            state.pop(name, None)

    def fill_untouched(self) -> None:
        """Gives parameters that have not moved in this cycle an anchor (a walk) equal to where they are."""
        for segment in self.segments:
            if not segment.touched and segment.cycle_key in segment.state and not self._was_loaded(segment):
                if segment.low_precision:
                    segment.walk.copy_(segment.theta)
                else:
                    segment.theta.copy_(segment.weight)

    def set_amsgrad(self, group: int, amsgrad: bool) -> None:
        """Switches a group's maxima on, zeros if it never had them, or off; off, they stay in the state."""
        for bucket in self.buckets:
            if bucket.group == group and bucket.amsgrad != amsgrad:
                self._outdated = True
                if amsgrad and bucket.ensure("max_exp_avg_sq"):
                    for segment in self.segments:
                        if segment.bucket is bucket:
                            segment.state["max_exp_avg_sq"] = segment.shaped("max_exp_avg_sq")
                bucket.amsgrad = amsgrad
        self._refresh()


def _swap(a: Tensor, b: Tensor) -> None:
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def _redistributed(segment: Segment, grad: Tensor) -> Tensor:
    """This rank's part of a gradient that is spread otherwise than its parameter, or has not been reduced yet."""
    param: Any = segment.param
    if is_dtensor(grad) and is_dtensor(param) and grad.device_mesh == param.device_mesh:  # type: ignore[attr-defined]
        return local_part(grad.redistribute(param.device_mesh, param.placements))  # type: ignore[attr-defined]
    raise RuntimeError(
        f"the gradient of {segment.where} is a {type(grad).__name__} and its parameter a {type(param).__name__}, or "
        "they are DTensors on different meshes: set p.grad to None or to a tensor that is spread as p is"
    )


def _misfit(segment: Segment, grad: Tensor) -> str:
    """Why this gradient cannot be used, and what to do."""
    if grad.layout is not torch.strided:
        return (
            f"the gradient of {segment.where} is sparse ({grad.layout}), which NexusAdamW does not support: "
            "use nn.Embedding(sparse=False) or torch.optim.SparseAdam for this parameter"
        )
    return (
        f"the gradient of {segment.where} has shape {tuple(grad.shape)}, {grad.dtype} on {grad.device}, its parameter "
        f"{tuple(segment.shape)}, {segment.param.dtype} on {segment.local.device}: "
        "set p.grad to None or to a tensor like p"
    )
