"""The table of segments that kernels walk. Autograd puts every gradient into memory of its own, so kernels read
gradients where they lie. Weights and state are ours and lie in large flat buffers. One row of the table, a segment,
holds the addresses of one parameter. A kernel is started once for a table, not once for a parameter.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from . import graphs
from .flat import (
    CHUNK,
    COLUMNS,
    DTYPES,
    GRAD,
    IN_CYCLE,
    KEPT,
    MOMENTS,
    STATE_DTYPE,
    TOUCHED,
    Bucket,
    Segment,
    bucketed,
    is_apart,
    owns_its_memory,
    shaped_like,
    state_dtypes,
)
from .graphs import Replayed, upload
from .observer import Observer
from .ranks import WHOLE, Spread

CHUNK_ELEMENTS = 16384  # one partial sum each: fixes the order of summation, whatever the number of threads
LARGEST = 0x7FF7  # remainder: leaves room for the rounding of θ = w + D, which shall come back to the same parameter
PARTS = 4  # of a chunk, for kernels on a GPU that sum nothing over it: memory likes small blocks (docs/gpu.md)


@functools.cache
def hashed(device: torch.device) -> Tensor:
    """Returns numbers that look random, [65521] int16. The length is a prime, so that equal ones do not line up in the
    columns of a matrix.
    """
    number = torch.arange(65521, dtype=torch.int64, device="cpu") + 1
    for factor in (0x85EBCA6B, 0xC2B2AE35):  # MurmurHash3's last steps, on 32 bits
        number = ((number ^ (number >> 16)) * factor) & 0xFFFFFFFF
    return (number >> 16).to(torch.int16).to(device)


class Table:
    """All segments of one device and dtype, of all groups, and the flat buffers behind them.

    displacement_dtype: of D. spread: the ranks that share out the parameters, all of them DTensors then, and whether
    they are replicated. keeps_anchor: keep θ beside w, for ranks that walk on their own. keeps: the keys of a state
    that outlives a cycle, flat.KEPT, or () if others' optimizers have their own. offload: moments and anchors lie in
    host memory, if the device has memory apart from it.
    elements, chunks: how many there are. parts: into how many a GPU's blocks may divide each chunk; 1 if most are
    small. `segments` stand in the order of `rows`.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        displacement_dtype: torch.dtype,
        spread: Spread = WHOLE,
        *,
        keeps_anchor: bool = False,
        keeps: tuple[str, ...] = KEPT,
        offload: bool = False,
    ) -> None:
        self.device, self.dtype, self.displacement_dtype, self.spread = device, dtype, displacement_dtype, spread
        self.keeps_anchor, self.keeps, self.offloads = keeps_anchor, keeps, offload and is_apart(device)
        self._dtype_of = state_dtypes(dtype, displacement_dtype)
        self.segments: list[Segment] = []
        self.buckets: list[Bucket] = []
        self.rows = torch.empty(0, len(COLUMNS), dtype=torch.int64, device="cpu")
        self.elements, self.chunks, self.parts = 0, 0, 1
        self.partials: Tensor  # Σg² of each chunk, float64
        self.displacement_sq: Tensor  # ΣD² of each chunk
        self.sq_norm: Tensor  # Σg² of all chunks, [1], where a kernel adds them up
        self.arrivals: Tensor  # blocks of a grid that have finished, [1] int32; 0 between launches
        self.observer = Observer([], device, versions=False)
        self._staged: list[Segment] = []  # those whose parameters have gaps
        self._touched, self._flags = 0, bytearray()  # how many segments are, and which
        self._outdated = True  # `rows` lacks a segment, a buffer or where a parameter lies now
        self._stale = self._stale_touched = True  # `rows` has addresses, or who is touched, that the device has not
        self._on_device: tuple[Tensor, ...] = ()
        self._kept_touched: Tensor
        self.capturing, self.replayed = False, Replayed()  # into a CUDA graph
        self._touched_on_device = False  # the device alone keeps who is
        self._device_is_told = False  # what the host knew of it

    @property
    def dtypes(self) -> tuple[int, int]:
        """The dtypes of parameters and of displacements, as kernels number them."""
        return DTYPES[self.dtype], DTYPES[self.displacement_dtype]

    @property
    def counts_parameters(self) -> bool:
        """Whether a move counts as lost if the parameter stays, even if w moves: where remainders are dropped."""
        return self.low_precision and not self.keeps

    @property
    def low_precision(self) -> bool:
        """Whether weights have a remainder."""
        return self.dtype != STATE_DTYPE[self.dtype]

    # Memory

    def extend(self, segments: list[Segment], *, flatten: bool) -> None:
        """Gives the segments zero moments, and moves their weights into flat memory if allowed."""
        buckets: list[Bucket] = []
        for members, numel in bucketed(segments, STATE_DTYPE[self.dtype].itemsize):
            bucket = Bucket(members[0].group, numel, self.device, self.keeps, self.offloads)
            buckets.append(bucket)
            for name in (*MOMENTS, *(["remainder"] if self.low_precision else [])) if self.keeps else ():
                bucket.ensure(name, self._dtype_of[name])
            steps = torch.zeros(len(members), dtype=torch.float32, device=self.device)
            for i, segment in enumerate(members):
                segment.bucket, segment.step = bucket, steps[i]
            if flatten:
                self._flatten(members, numel)
        self._enlist(self.segments + segments, self.buckets + buckets)

    def forget(self, segments: list[Segment]) -> None:
        """Undoes an `extend` that may have failed on its way."""
        kept = [s for s in self.segments if s not in segments]
        used = [s.bucket for s in kept]
        with contextlib.suppress(Exception):  # repeated by the next step
            self._enlist(kept, [bucket for bucket in self.buckets if bucket in used])

    def _enlist(self, segments: list[Segment], buckets: list[Bucket]) -> None:
        """Makes these all the segments of the table."""
        self._outdated = True
        # In the groups' order, whenever a parameter came: the norm is summed in that order, also after a resume.
        self.segments, self.buckets = sorted(segments, key=lambda s: s.place), buckets
        self._staged = [s for s in self.segments if s.staged is not None]
        self._flags = bytearray(segment.touched for segment in self.segments)
        for row, segment in enumerate(self.segments):
            segment.row, segment.flags = row, self._flags
        self.observer = Observer(self.segments, self.device, versions=self.keeps_anchor)
        self.refresh()
        self.observer.take_versions()

    def _flatten(self, members: list[Segment], numel: int) -> None:
        """Moves weights into memory of `numel` elements, which lives as long as one of them lies there."""
        # A DTensor's part stays where it lies: FSDP2 gathers from there.
        movable = [
            s for s in members if s.staged is None and s.numel and s.local is s.param and owns_its_memory(s.param)
        ]
        if not movable:
            return
        flat = torch.zeros(numel, dtype=self.dtype, device=self.device)
        for segment in movable:
            target = flat[segment.start : segment.start + segment.numel]
            target.copy_(segment.weight)
            segment.param.data = shaped_like(target, segment)

    def ensure_displacements(self) -> None:
        """Allocates displacements (and anchors, and remainders of a walk alone) that are missing."""
        names = [*(IN_CYCLE if self.keeps_anchor else IN_CYCLE[:1]), *(["remainder"] if self.low_precision else [])]
        for bucket in self.buckets:
            for name in names:
                if bucket.ensure(name, self._dtype_of[name]):
                    self._outdated = True
                    if name == "remainder":
                        self._fill_remainder(bucket, hashed(self.device).clamp(-LARGEST, LARGEST))
        self.refresh()

    def fill_remainders(self, seed: Tensor) -> None:
        """Makes every remainder, if weights have one, another number within the rounding of its parameter, which stays.
        seed: 0-dim float64, on the device; the same one gives the same numbers. Moves 2 bytes for each element.
        """
        if self.low_precision:
            # The middle of a float64's bits: the last ones depend on the order of a sum, the first ones hardly change.
            shift = (seed.view(torch.int64) >> 28).to(torch.int16)
            numbers = (hashed(self.device) ^ shift).clamp_(-LARGEST, LARGEST)
            for bucket in self.buckets:
                self._fill_remainder(bucket, numbers)

    def _fill_remainder(self, bucket: Bucket, numbers: Tensor) -> None:
        """Repeats numbers over a bucket: int16 from -LARGEST to LARGEST, in units of 2^-16 of a parameter's spacing."""
        sign = torch.iinfo(torch.int16).min
        if self.dtype == torch.float16:  # sign and magnitude
            numbers = torch.where(numbers < 0, -numbers | sign, numbers)
        flat = bucket.buffers["remainder"].view(torch.int16)
        whole = len(flat) // len(numbers) * len(numbers)
        flat[:whole].view(-1, len(numbers)).copy_(numbers)
        flat[whole:].copy_(numbers[: len(flat) - whole])
        if self.dtype == torch.float16:  # whose neighbours below a power of two are half as far
            for segment in [s for s in self.segments if s.bucket is bucket]:
                number, parameter = segment.buffer("remainder").view(torch.int16), segment.weight.view(torch.int16)
                near = (number < 0) & (parameter & 0x3FF == 0)
                number.copy_(torch.where(near, (number & 0x7FFF) >> 1 | sign, number))

    def follow_amsgrad(self, wanted: list[bool]) -> bool:
        """Switches each group's maxima on, zeros if it never had them, or off. Returns whether it allocated some."""
        made = False
        for bucket in self.buckets:
            amsgrad = wanted[bucket.group]
            if bucket.amsgrad != amsgrad:
                self._outdated = True
                made |= amsgrad and bucket.ensure("max_exp_avg_sq", self._dtype_of["max_exp_avg_sq"])
                bucket.amsgrad = amsgrad
        self.refresh()
        return made

    def refresh(self) -> None:
        """Writes the table anew if segments or buffers came or a parameter's storage was replaced. `_outdated` is set
        before such a change and cleared when all is done, so that the next step repeats whatever failed on the way,
        for lack of memory for example. Raises RuntimeError while steps are captured into a CUDA graph.
        """
        if not self._outdated:
            return
        if graphs.capture_id([self.device]) is not None:
            raise RuntimeError(
                f"the memory of parameters on {self.device} was exchanged just before or while step() was captured "
                "into a CUDA graph: run one whole cycle before the capture"
            )
        if self._touched_on_device and len(self._on_device[0]) == len(self._flags):
            self.learn_touched()
        known = len(self.rows) == len(self.segments)
        gradients = self.rows[:, GRAD : GRAD + 2].tolist() if known else [[0, DTYPES[self.dtype]]] * len(self.segments)
        rows: list[list[int]] = []
        counts = [-(-s.numel // CHUNK_ELEMENTS) for s in self.segments]
        chunks = 0
        for s, gradient, count in zip(self.segments, gradients, counts, strict=True):

            def address(name: str, s: Segment = s) -> int:
                return s.buffer(name).data_ptr() if name in s.bucket.buffers else 0

            weight = (s.local if s.staged is None else s.staged).data_ptr()
            maximum = address("max_exp_avg_sq") if s.bucket.amsgrad else 0
            walk = [weight, address("remainder"), address("displacement"), address("anchor"), *gradient]
            state = [address("exp_avg"), address("exp_avg_sq"), maximum, s.step.data_ptr()]
            rows.append([*walk, *state, s.numel, s.group, s.touched, chunks])
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
        self.elements, self.chunks = sum(s.numel for s in self.segments), chunks
        self.parts = PARTS if 2 * self.elements > chunks * CHUNK_ELEMENTS else 1
        self.partials = torch.empty(chunks, dtype=torch.float64, device=self.device)
        self.displacement_sq = torch.empty_like(self.partials)  # of its own: other devices may still read the norm's
        self.sq_norm = torch.zeros(1, dtype=torch.float64, device=self.device)
        self.arrivals = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._touched = sum(self._flags)
        self._kept_touched = torch.zeros_like(self._on_device[0][:, TOUCHED])
        self._stale, self._outdated, self._device_is_told = True, False, False

    # On the device

    def on_device(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Returns what kernels on a GPU read, in the device's memory: `rows` [n, 14]; the row of each chunk [chunks];
        the first row and first chunk of each group and of the end [groups + 1, 2]; and `touch`.

        touch: 0 no parameter is touched, 1 exactly those with a gradient are, 2 the rows tell. Rows are copied only if
        an address changed (or who is touched, with 2), through pinned memory and without waiting.
        """
        if self._touched_on_device:
            touch = 2
        elif not self._touched:
            touch = 0
        elif (self._touched == len(self.segments) and self.observer.complete) or torch.equal(
            self.rows[:, TOUCHED], (self.rows[:, GRAD] != 0).long()
        ):
            touch = 1
        else:
            touch = 2
        if self._stale or (touch == 2 and self._stale_touched):
            self._upload_rows()
            self._stale = self._stale_touched = False
        return (*self._on_device, touch)  # type: ignore[return-value]

    def _upload_rows(self) -> None:
        keeps = self._touched_on_device and self._device_is_told
        if keeps:
            self._keep_touched(aside=True)
        upload(self.rows, self._on_device[0], self.replayed if self.capturing else None)
        if keeps:
            self._keep_touched(aside=False)
        self._device_is_told = True

    def _keep_touched(self, *, aside: bool) -> None:
        """Saves the device's own record of who is touched, or puts it back."""
        here, there = self._on_device[0][:, TOUCHED], self._kept_touched
        (there if aside else here).copy_(here if aside else there)

    def keep_touched_on_device(self, keeps: bool) -> None:
        """Leaves it to the device, once it was told, or to the host again, to know whose displacements are valid."""
        self._touched_on_device, self._device_is_told = keeps, False
        self._stale = True

    def learn_touched(self) -> None:
        """Tells the host whose displacements are valid, if only the device knows; waits for it."""
        if self._device_is_told:
            flags = self._on_device[0][:, TOUCHED].tolist()
            self._flags[:], self._touched = bytes(flags), sum(flags)
            self.rows[:, TOUCHED] = torch.tensor(flags, dtype=torch.int64, device="cpu")

    def _note_on_device(self, *, moved: bool) -> None:
        """Notes that displacements of segments with a gradient are valid, or none any more."""
        rows = self._on_device[0]
        if moved:
            rows[:, TOUCHED] |= rows[:, GRAD] != 0
        else:
            rows[:, TOUCHED] = 0

    def on_device_after_walk(self, moved: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Returns what `on_device` does, for an outer step after the end of a walk, when no segment has a gradient any
        more. moved: [segments], on the device, != 0 for each segment that had a gradient on any rank.
        """
        rows, row_of_chunk, starts, _ = self.on_device()
        rows[:, TOUCHED] = (moved != 0).long()
        rows[:, GRAD] = 0
        self._stale = True
        return rows, row_of_chunk, starts, 2

    def on_device_with(self, targets: list[Tensor | None]) -> tuple[Tensor, Tensor, Tensor, int]:
        """Returns what `on_device` does, for `gradients`, after the end of a walk: a row holds the segment's target in
        the place of the gradient.
        """
        addresses = [0 if target is None else target.data_ptr() for target in targets]
        rows = self.rows.clone()
        rows[:, GRAD] = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        upload(rows, self._on_device[0])
        self._stale = True
        return (*self._on_device, 2)  # type: ignore[return-value]

    def distrust_device(self) -> None:
        """Copies the rows again next time: replays of captured steps may have put others there, or will."""
        self._stale = True

    def hold(self) -> None:
        """Keeps alive what captured steps read and write beside weights and state."""
        self.replayed.hold(
            *self._on_device, self._kept_touched, self.partials, self.displacement_sq, self.sq_norm, self.arrivals
        )

    # One micro-batch

    def read_gradients(self, *, use: bool) -> None:
        """Looks at every parameter and, with `use`, its gradient; modifies nothing but what it remembers of them.
        Raises RuntimeError for a gradient that does not fit its parameter, or a parameter that was converted.
        """
        self.refresh()
        stale, self._stale = self._stale, True  # until the look is through
        changed, elsewhere = self.observer.look(self.rows, use=use)
        self._stale = stale or changed
        self._outdated |= elsewhere
        self.refresh()

    def gradient(self, segment: Segment) -> Tensor | None:
        """Returns this micro-batch's gradient of a segment, dense with its strides; None without one."""
        return self.observer.gradient(segment) if self.rows[segment.row, GRAD] else None

    def with_gradient(self) -> list[Segment]:
        """Returns the segments that have a gradient in this micro-batch."""
        if self.observer.complete:
            return self.segments
        return [s for s, address in zip(self.segments, self.rows[:, GRAD].tolist(), strict=True) if address]

    def moving(self) -> list[Segment]:
        """Returns the segments that take part in the outer step: those with a gradient at any time in this cycle."""
        if self._touched == len(self.segments) or self.observer.complete:
            return self.segments
        return [
            s for s, address in zip(self.segments, self.rows[:, GRAD].tolist(), strict=True) if address or s.touched
        ]

    def wrote(self, segments: list[Segment]) -> None:
        """Tells autograd and autocast that these segments' weights were written, and updates parameters with gaps."""
        for segment in set(segments).intersection(self._staged) if self._staged else ():
            segment.local.detach().copy_(segment.staged)  # type: ignore[arg-type]
        params = self.observer.params if segments is self.segments else [s.param for s in segments]
        torch.autograd.graph.increment_version(params)
        torch.clear_autocast_cache()  # of weights in low precision, kept until the caller's autocast block ends
        self.observer.take_versions()

    # One cycle

    def took_part(self) -> Tensor:
        """Returns which segments had a gradient in this cycle, with this micro-batch's: [segments] bool, on the CPU."""
        return (self.rows[:, GRAD] != 0) | (self.rows[:, TOUCHED] != 0)

    def displacements(self) -> list[Tensor]:
        """Returns D as it lies: a flat tensor for each bucket. What lies between parameters does not matter."""
        return [bucket.buffers["displacement"] for bucket in self.buckets]

    def clear_untouched(self) -> None:
        """Sets the displacements of parameters that have not moved in this cycle to zero, before others read them."""
        for segment in self.segments:
            if not segment.touched and "displacement" in segment.bucket.buffers:
                segment.buffer("displacement").zero_()

    def finish_inner_step(self) -> None:
        """Ends the micro-batch after a backend's inner_step, and frees copies of gradients."""
        moved = self.with_gradient()
        self.wrote(moved)
        if self._touched_on_device:
            self._note_on_device(moved=True)
        elif self._touched < len(self.segments):
            self.set_touched([s for s in moved if not s.touched] if self._touched else moved, True)
        self.observer.copies.clear()

    def finish_outer_step(self, *, everything: bool = False) -> None:
        """Ends the cycle after a backend's outer step, which wrote the weights of those who took part, or of all."""
        self.wrote(self.segments if everything else self.moving())
        for bucket in self.buckets if self.offloads else ():
            bucket.hold()
        if self._touched_on_device:
            self._note_on_device(moved=False)
        else:
            self.set_touched(self.segments, False)
        self.observer.copies.clear()

    def set_touched(self, segments: list[Segment], touched: bool) -> None:
        """Records whether the segments' displacements are valid."""
        if len(segments) == len(self.segments):
            self._flags[:] = bytes([touched]) * len(segments)
            self.rows[:, TOUCHED] = touched
            self._touched = touched * len(segments)
        elif segments:
            for segment in segments:
                self._flags[segment.row] = touched
            self.rows[[s.row for s in segments], TOUCHED] = int(touched)
            self._touched = sum(self._flags)
        self._stale_touched |= bool(segments)
        self._device_is_told &= not segments
