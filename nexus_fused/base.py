"""What every optimizer with a walk in front can do: step, look, show θ. For what a cycle does, see walk.py."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from . import agreement, backends, checkpoint
from .cycle import combine, summarize
from .frameworks import AccumulationWatch, of_the_optimizer, on_its_own, uninterrupted
from .options import GROUP_KEYS, is_frozen
from .passes import ForScaler, Passes
from .ranks import Ranks
from .state import State
from .traps import Traps
from .walk import Choices, Outer, Walk, entries_of


class WalkingOptimizer(Optimizer):
    """The methods that NexusAdamW and Nexus have in common."""

    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands over `grad_scale` and `found_inf`

    def _build(self, choices: Choices, ranks: Ranks, outer: Outer | None = None) -> None:
        self._itself = weakref.ref(self)
        self._watch, self._traps = AccumulationWatch(type(self).__name__), Traps()
        backends.check_choice(*choices[1:3])
        self._choices = choices  # of the constructor, as `Walk` takes them
        self._walk = Walk(choices, ranks, outer)
        itself: Any = self._itself
        self._for_scaler = ForScaler()
        self._passes = Passes(self._for_scaler.hide, lambda: itself()._end_pass()) if self._walk.is_open else None
        self._told_of_zeroing = False
        self._state = State(self, self._walk, lambda: itself()._follow_passes())
        self._built = False

    def _follow_passes(self) -> None:
        """Sees the backward passes of all parameters that there are now."""
        if self._passes is not None:
            self._passes.follow((p for group in self.param_groups for p in group["params"]), self._walk.ranks.modules)
            self._for_scaler.forget()

    @on_its_own
    def _take_groups(self, first: int, when: str) -> None:
        """Gives the parameters of the groups from the first on a place, if all ranks do."""
        entries = entries_of(self.param_groups)
        entries = [entry for entry in entries if entry[0] >= first]
        live = [entry for entry in entries if not is_frozen(entry[2])]
        self._walk.follow_ranks(live, self.param_groups)
        self._compare_ranks(when, weights=[p for *_, p in entries])
        self._state.register(entries, flatten=self._walk.flatten)

    # Stepping

    @on_its_own
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Consumes the gradients of one micro-batch: an inner step, or in the last of a cycle also the outer step.

        With `inner_steps=None` the outer step, after as many inner ones as there were backward passes since the last;
        without any it does nothing.

        Updates weights and state in place; waits for a device only if other parameters lie on the CPU.
        Returns what `closure` returns. Captured into a CUDA graph, it reads gradients where they lie now, and
        hyperparameters that are tensors on the device, at every replay; others keep their values. A capture holds whole
        cycles, after one outside of it: replays of a part of one would never reach AdamW, and nobody could tell. Where
        K is open a backward pass or `step()` may be captured alone, since the device counts inner steps then (with the
        "cuda" or "triton" backend, and without other ranks). It must be repeated after groups were added, parameters
        unfrozen or moved, or amsgrad changed.
        RuntimeError, ValueError or TypeError for a gradient, parameter or hyperparameter that cannot be used, naming
        its group; nothing is modified then.
        """
        self._refuse_inside_outer_weights("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._passes is not None:
            self._end_cycle(self._passes)
            return loss
        with uninterrupted():
            assert self.inner_steps is not None
            params = (p for group in self.param_groups for p in group["params"])
            self._watch.look(params, closure, self.inner_steps)
            self._state.follow_members()
            last = self.cycle_position + 1 == self.inner_steps
            self._compare_for_debugging("in step()", averages=last)
            self._state.refresh(gradients=True, moments=last)
            self._traps.look(self.param_groups, self._walk)
            try:
                self._walk.step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
            finally:
                self._state.show_position()
        return loss

    @on_its_own
    def _end_pass(self) -> None:
        """Takes the inner step of a backward pass that ends, and lets its gradients go."""
        self._refuse_inside_outer_weights("a backward pass", ", then zero_grad(), and run the pass again")
        with uninterrupted():
            self._for_scaler.hide()
            self._tell_of_zeroing()
            self._state.follow_members()
            self._compare_for_debugging("in a backward pass", averages=False)
            self._state.refresh(gradients=True, moments=False)
            self._traps.look_at_pass(self._walk)
            if not self._walk.is_blind and self._walk.make_room(self._walk.position + 1):
                self._state.show(in_cycle=True)
            try:
                self._walk.step(None, None)
            finally:
                self._state.show_position()
            self._walk.let_gradients_go()
            self._for_scaler.show(self._walk.work)

    def _end_cycle(self, passes: Passes) -> None:
        """Takes the outer step of an open cycle."""
        if passes.merges:
            raise RuntimeError(
                "step() inside one_micro_batch(): leave the with block first, which takes the inner step"
            )
        if passes.is_replaced:
            raise RuntimeError(
                "another optimizer with inner_steps=None was built for some of its parameters, and takes their inner "
                "steps now: use that one, or build this one again"
            )
        with uninterrupted():
            self._state.follow_members()
            self._check_nothing_waits()
            self._for_scaler.hide()
            self._tell_of_zeroing()
            if not self._walk.is_blind:  # else a replay may have taken inner steps
                self._traps.look_at_cycle(self.param_groups, self._walk)
                if self.at_boundary and not self._walk.is_local:
                    return
            self._compare_for_debugging("in step()", averages=True)
            self._state.refresh(gradients=False)
            self._walk.unscale_norms(getattr(self, "grad_scale", None))
            try:
                self._walk.finish(None)
            finally:
                self._state.show_position()

    def _waiting(self) -> tuple[int, int] | None:
        """The group, and the place in it, of a parameter whose gradient no inner step has taken, if there is one."""
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None and not self._for_scaler.holds(param):
                    return index, i
        return None

    def _check_nothing_waits(self) -> None:
        """Raises RuntimeError for gradients that no inner step has taken: they would be lost, or merged with others."""
        waiting = self._waiting()
        if waiting is not None:
            raise RuntimeError(
                f"parameter {waiting[1]} of group {waiting[0]} has a gradient at step() that no inner step has taken. "
                "With inner_steps=None each backward pass takes its inner step when it ends. If a pass failed, call "
                "zero_grad() and run it again. If you set p.grad yourself, do that inside `with "
                "optimizer.one_micro_batch():`"
            )

    @of_the_optimizer
    @contextlib.contextmanager
    def one_micro_batch(self) -> Iterator[None]:
        """Lets the gradients of several backward passes add up, for `inner_steps=None`: one inner step on their sum is
        taken at the end, none where they were zeroed inside or an error leaves the block.

        For losses whose backward passes need the same weights, for passes whose gradients are thrown away, for
        gradients set by hand. An error leaves the gradients where they are: call zero_grad() before the next pass,
        which raises otherwise. RuntimeError with a number of inner steps, where `step()` says what a micro-batch is.
        """
        passes = self._passes
        if passes is None:
            raise RuntimeError(
                f"one_micro_batch() is for inner_steps=None: with inner_steps={self.inner_steps} gradients add up "
                "until step(), which takes one inner step on their sum"
            )
        if passes.merges:  # the outermost block ends the micro-batch
            yield
            return
        self._for_scaler.hide()
        passes.merges = True
        try:
            yield
        except BaseException:
            passes.note_failure()
            raise
        finally:
            passes.merges = False
        if self._waiting() is not None:
            passes.end()
        else:
            self._show_again()

    def _show_again(self) -> None:
        """Shows GradScaler a gradient where none came in place of the one that was hidden."""
        if self._passes is not None and not self._walk.is_blind and not self.at_boundary:
            self._for_scaler.show(self._walk.work)

    @of_the_optimizer
    def discard_cycle(self) -> None:
        """Forgets the running cycle: the parameters return to θ, AdamW is not called. At a boundary does nothing.

        With a `displacement_group` all ranks call it.
        """
        self._refuse_inside_outer_weights("discard_cycle()")
        self._for_scaler.hide()
        if self.at_boundary:
            return
        with uninterrupted():
            self._state.follow_members()
            self._state.refresh(gradients=False, moments=False)
            try:
                self._walk.return_to_theta()
            finally:
                self._state.show_position()
            if self._passes is not None:  # GradScaler steps all the same
                self._for_scaler.show(self._walk.work)

    @on_its_own
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's. With `inner_steps=None` gradients are gone anyway; in mid-cycle warns once that their
        micro-batches are not."""
        optimizer: Any = self._itself()
        optimizer._watch.zeroed()
        passes = optimizer._passes
        if passes is not None:
            passes.forget_failure()
            if passes.merges:
                set_to_none = True  # a gradient of zeros would be a micro-batch
            elif not (optimizer._walk.is_blind or optimizer.at_boundary) and optimizer._waiting() is None:
                optimizer._for_scaler.was_zeroed = True  # else they are of a pass that failed
                optimizer._tell_of_zeroing()
        super().zero_grad(set_to_none)

    def _tell_of_zeroing(self) -> None:
        """Warns once where gradients were zeroed in mid-cycle, by zero_grad() or the model's."""
        if self._for_scaler.was_zeroed and not (self._told_of_zeroing or self._walk.is_blind):
            self._told_of_zeroing = True
            warnings.warn(
                f"gradients were zeroed after {self.cycle_position} backward pass(es) without a step(): with "
                "inner_steps=None each of them has taken its inner step, which zeroing does not take back. To throw "
                "passes away, such as a generator's through its discriminator, run them inside `with "
                "optimizer.one_micro_batch():` and call zero_grad() there, or call discard_cycle(). To have the K-th "
                "step() end the cycle, build with inner_steps=K",
                stacklevel=1,
            )

    @of_the_optimizer
    def outer_step(self) -> None:
        """Ends a partial cycle: applies the displacement so far. Gradients that wait are not used.

        Without any inner step it does nothing. Errors as `step()`. With a `displacement_group` all ranks call it once
        their micro-batches are used up, however many each had: it takes part in the averages of those that still call
        `step()`, returns when all have come, and waits for the device.
        """
        self._refuse_inside_outer_weights("outer_step()")
        self._for_scaler.hide()
        if self.at_boundary and not self._walk.is_local:
            return
        everybody_is_here = False
        while not everybody_is_here:
            with uninterrupted():
                self._state.follow_members()
                self._compare_for_debugging("in outer_step()", averages=self._walk.is_local)
                self._state.refresh(gradients=False)
                try:
                    everybody_is_here = self._walk.finish(None, leaves=True)
                finally:
                    self._state.show_position()

    @property
    def inner_steps(self) -> int | None:
        """K, micro-batches in a cycle; None where `step()` ends it."""
        return self._walk.inner_steps

    @property
    def cycle_position(self) -> int:
        """Inner steps taken in the running cycle, 0 … inner_steps-1, or as many as there were."""
        return self._walk.position

    @property
    def at_boundary(self) -> bool:
        """Whether the parameters hold θ: the time for averages of weights, checkpoints and evaluations."""
        return self._walk.position == 0

    # Looking

    @property  # type: ignore[override]
    def state(self) -> dict[Any, Any]:
        """Each parameter's state, as torch.optim's. What its reader changes, assigns or moves is taken over."""
        optimizer: Any = self._itself()
        optimizer._walk.wait_for_host_state()
        optimizer._state.catch_up()
        optimizer._state.entries.known = True
        optimizer._state.entries.reveal()
        state: dict[Any, Any] = optimizer.__dict__["state"]
        return state

    @state.setter
    def state(self, state: dict[Any, Any]) -> None:
        optimizer: Any = self._itself()
        if not optimizer._walk.keeps:
            raise AttributeError("the state is that of the optimizers behind the walk: assign theirs, at a boundary")
        optimizer._state.entries.known = True
        optimizer.__dict__["state"] = state

    @of_the_optimizer
    def eval(self) -> None:
        """Shows θ in the parameters until `train()`, as `outer_weights()` does; for trainers that call it by itself.

        `state_dict()` then describes the boundary, and in mid-cycle warns once of what it leaves out. At a boundary
        loading (which ends it) and copying go on. Inside `outer_weights()` it and `train()` do nothing.
        """
        with uninterrupted():
            self._state.show_theta()

    @of_the_optimizer
    def train(self) -> None:
        """Puts the walk back after `eval()`, bit for bit; without it does nothing."""
        if not self._state.in_outer_weights:
            with uninterrupted():
                self._state.show_walk()

    @of_the_optimizer
    @contextlib.contextmanager
    def outer_weights(self) -> Iterator[None]:
        """Shows θ in the parameters, for evaluations and checkpoints in mid-cycle; puts the walk back, bit for bit.

        Holds a copy of the weights that walk. Inside, `state_dict()` describes the boundary; `step()`, `outer_step()`
        and loading raise RuntimeError. A value written into a parameter inside becomes θ, and the walk moves along. May
        be nested; after `eval()` θ stays until `train()`.
        """
        state = self._state
        shown, inside = state.shows_theta, state.in_outer_weights
        self.eval()
        state.in_outer_weights = True
        try:
            yield
        finally:
            state.in_outer_weights = inside
            if not shown:
                self.train()

    @of_the_optimizer
    def metrics(self) -> dict[str, Any]:
        """Figures of the last finished cycle, partial ones too; waits for the device, not for other ranks.

        alignment: mean pairwise cosine similarity of the cycle's unit gradients, each at its own point of the walk;
        NaN where fewer than two were taken. grad_norms: ‖g_k‖ of each micro-batch, unscaled (still scaled with
        inner_steps=None in a loop that calls GradScaler's `unscale_()`). lost_fraction: the share of element moves in
        the walk, since a load in it, that left the weight where it was; where it is not small, inner_lr is too small
        for the model. skipped_inner_steps, skipped_outer_steps: totals of steps and cycles in which nothing moved.
        """
        cycles = list(self._walk.cycles.values())
        return {
            **summarize(combine(cycles), cycles[0].room),
            "skipped_inner_steps": int(cycles[0].skipped_inner_steps),
            "skipped_outer_steps": int(cycles[0].skipped_outer_steps),
        }

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} (inner_steps: {self.inner_steps}, cycle_position: {self.cycle_position}"]
        for index, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {index}")
            hidden = ("params", "inner_steps", *GROUP_KEYS)
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key not in hidden]
        return "\n".join(lines) + "\n)"

    def _refuse_inside_outer_weights(self, what: str, then: str = " first") -> None:
        if self._state.shows_theta:
            inside = self._state.in_outer_weights
            where = "inside outer_weights()" if inside else "after eval()"
            remedy = "leave the with block" if inside else "call train()"
            raise RuntimeError(f"{what} {where}: the parameters show θ there; {remedy}{then}")

    @of_the_optimizer
    def check_ranks(self, group: Any = None) -> None:
        """Raises RuntimeError on all ranks of a process group (None: the default one), naming the first difference,
        unless inner_steps, cycle_position, hyperparameters and the parameters' shapes, dtypes, shardings and
        requires_grad are the same, and so are the norms that it has taken last. The values of parameters are not
        compared. Waits for the device.

        All of them call it. Where step() communicates that is done without asking, for the ranks it concerns, when the
        optimizer is built or loaded; use it for replicas that others keep equal, as DistributedDataParallel does.
        """
        self._state.follow_members()
        agreement.compare_replicas(self._walk, self.param_groups, self._state.entries.state, group)

    def _compare_ranks(self, when: str, error: Exception | None = None, **what: Any) -> None:
        agreement.compare(self._walk, self.param_groups, self._state.entries.state, when, error, **what)

    def _compare_for_debugging(self, when: str, *, averages: bool) -> None:
        agreement.compare_for_debugging(
            self._walk, self.param_groups, self._state.entries.state, when, averages=averages
        )

    # Saving and loading

    @of_the_optimizer
    def state_dict(self) -> dict[str, Any]:
        """The state of torch.optim.AdamW, or of the optimizers behind the walk, with what a walk adds: below float32
        each parameter's remainder, in mid-cycle its displacement.

        Saving and loading it after any micro-batch continues bit for bit, together with the model's state of the
        same moment. Tensors are the live ones, as torch.optim's.
        """
        if self._walk.is_local and not self.at_boundary and not self._state.shows_theta:
            warnings.warn(
                f"state_dict() in mid-cycle ({self._walk.progress}), where each rank "
                "of displacement_group has a walk of its own: have every rank save its model and optimizer for itself, "
                "or save inside outer_weights() or at a boundary",
                stacklevel=6,
            )
        self._state.prepare_to_save()
        packed = self._pack()
        for hook in self._optimizer_state_dict_post_hooks.values():
            packed = hook(self, packed) or packed
        return packed

    @of_the_optimizer
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of any position, or one without a walk, in place. Of ours only displacements are narrowed.

        ValueError or TypeError, naming group and parameter, for a state that does not fit; nothing is modified then.
        """
        if self._state.hides_walk:
            self._refuse_inside_outer_weights("load_state_dict()")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self._state.follow_members()
        try:
            groups, *rest = self._check(state_dict)
        except Exception as error:  # whatever it is, others must not wait for this rank
            self._compare_ranks("in load_state_dict()", error)
            raise
        self._compare_ranks("in load_state_dict()", loads=groups[0].get("cycle_position", 0) if groups else 0)
        with uninterrupted():
            self._for_scaler.hide()
            self._restore(groups, *rest)
            self._traps.knows_schedule = False
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _state_to_copy(self) -> dict[str, Any]:
        """What a copy needs beside groups and state, which are up to date afterwards."""
        if self._state.hides_walk:
            self._refuse_inside_outer_weights("copying or pickling the optimizer")
        if self._walk.ranks.has_groups:
            raise RuntimeError(
                "an optimizer with a process group cannot be copied or pickled: save its state_dict(), build another "
                "one with its own group and load that"
            )
        self._state.prepare_to_save()
        finished = combine(list(self._walk.cycles.values()))
        # As lists: other processes are sent where a tensor lies, and these would be gone when they look.
        kept = None if finished is None else [sums.tolist() for sums in finished]
        return {"_choices": self._choices, "_finished": kept, "_for_scaler": self._for_scaler.shown()}

    def _take_rest(self, state: dict[str, Any]) -> None:
        """Ends the building of a copy from `_state_to_copy`; its figures of the last cycle are the original's."""
        self._built, self._traps.knows_schedule, self._state.entries.known = True, False, False
        for param in state["_for_scaler"]:  # a copy of what it showed
            param.grad = None
        finished = state["_finished"]
        if finished is not None:
            of_all = next(iter(self._walk.cycles.values()))
            if self._walk.make_room(len(finished[0]) - 3 * len(self.param_groups)):
                self._state.show(in_cycle=self._walk.position > 0)
            with torch.device("cpu"):  # whatever the default device is
                sums, counts = finished
                of_all.finished = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.int64)

    def _pack(self) -> dict[str, Any]:
        """What `state_dict()` returns, before its hooks."""
        hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, OrderedDict()
        try:
            return checkpoint.pack(super().state_dict())
        finally:
            self._optimizer_state_dict_post_hooks = hooks

    def _check(self, state_dict: dict[str, Any]) -> tuple[Any, ...]:
        """What `_restore` takes, groups first; raises for a state that does not fit, and modifies nothing."""
        return checkpoint.check(state_dict, self.param_groups, self._walk)

    def _restore(self, groups: Any, *rest: Any) -> None:
        entries, foreign = rest
        self._state.restore(groups, entries)
        self._state.entries.state.update(foreign)

    @of_the_optimizer
    def materialize_displacements(self) -> None:
        """Makes the state hold zero displacements, so that a load that fills only keys it finds can receive a
        checkpoint of mid-cycle. They are dropped again if the loaded position is 0, or at the end of the next cycle.
        """
        self._refuse_inside_outer_weights("materialize_displacements()")
        if self.inner_steps != 1:
            self._state.materialize_displacements()
