"""NexusAdamW: options, groups and state of an optimizer as torch.optim knows it. For what a cycle does, see walk.py."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import agreement, backends, checkpoint, options
from .cycle import combine, summarize
from .frameworks import AccumulationWatch, of_the_optimizer, on_its_own, uninterrupted
from .options import GROUP_KEYS, is_frozen
from .ranks import Ranks
from .state import State
from .traps import Traps
from .walk import Choices, Walk


class NexusAdamW(Optimizer):
    """AdamW whose gradient is the displacement of a short walk of normalized SGD steps, one per micro-batch.

    Call `step()` after the backward pass of every micro-batch, without gradient accumulation or clipping. Of
    `inner_steps` calls (K, one cycle) the first K-1 move the weights along the walk; the last one takes the last step,
    returns to the start θ and applies AdamW to the displacement. Source: arXiv 2604.09258, Algorithm 3.

    Args:
        params: tensors, (name, tensor) pairs or parameter groups, as for torch.optim.AdamW. float64, float32, bfloat16,
            float16, complex64, complex128; dense gradients, of these dtypes or of another floating one
            (`p.grad_dtype`). Below float32 the state holds a `remainder`, 16 bits that make the weight float32.
            `p.data` may be re-pointed here, once, into flat memory; values and identity stay.
        lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as for torch.optim.AdamW. `lr` may be a tensor of
            one element, of which each group gets its own copy. With `capturable=True` a whole cycle, K backward passes
            with their `step()`, may be captured into one CUDA graph; see `step`.
        inner_lr: γ, length of an inner step, > 0; per group; may be a tensor of one element.
        inner_steps: K, micro-batches in a cycle, one for the optimizer. 1 is AdamW on g/‖g‖.
        normalize_displacement: give AdamW D/Γ (Γ: the length of the walk) instead of D, so that `lr`, `eps` and
            `betas` keep AdamW's meaning. False is the paper's choice.
        inner_lr_follows_lr: γ_k = inner_lr · max(lr/base_lr, 0.1), with base_lr the group's learning rate when it was
            added, or the peak (`max_lr`) that a OneCycleLR recorded.
        displacement_dtype: of the displacement, kept in mid-cycle and averaged over a `displacement_group`:
            torch.bfloat16, torch.float32, or None: bfloat16 up to 32 inner steps, else float32. float64 parameters
            have float64.
        foreach: accepted with any value; chooses nothing here.
        differentiable: must be False.
        fused: True demands a fused backend, False selects the reference, None the best there is.
        backend: None (best for each device), "reference", "cpu", "triton" or "cuda"; an explicit one that cannot
            run raises RuntimeError.
        flatten: move parameters that own their memory into flat buffers. False leaves all where they are.
        norm_group: a process group whose ranks hold other parameters of the same model, as the stages of a pipeline
            do: ‖g‖ is that of the gradients of all of them, and skipping is common. One rank of each stage, those with
            this one's place in the other dimensions of the mesh (`mesh.get_group("pp")`): shards are summed before.
            What all of its ranks hold, as the layers beside experts, is a group with `"replicated": True`: it counts
            once.
        displacement_group: a process group whose ranks hold the same parameters and walk on their own: each takes the
            inner steps of its own micro-batches, gradients are not reduced across them (leave DistributedDataParallel
            away, or run forward and backward passes under its `no_sync()`), and once in a cycle D and Γ are averaged
            over them, w ← AdamW(θ, mean D / mean Γ): one average in place of K. θ is kept beside (`anchor`, float32),
            so that it stays equal on all ranks. All ranks start from the same weights, and call `step()` and
            `outer_step()` together; AdamW's hyperparameters are the mean of those of the ranks that walked. In
            mid-cycle each has a walk of its own: what is saved then must be saved by every rank, for itself, and
            weights that others write raise RuntimeError (writes through `p.data` are not seen).

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
        displacement_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        flatten: bool = True,
        norm_group: Any = None,
        displacement_group: Any = None,
    ) -> None:
        steps = options.inner_steps(inner_steps)
        choices = (
            steps,
            backend,
            options.plain("fused", fused),
            flatten,
            options.displacement_dtype(displacement_dtype, steps),
        )
        self._build(choices, Ranks(norm_group, displacement_group))
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
            "inner_steps": steps,
            "normalize_displacement": normalize_displacement,
            "inner_lr_follows_lr": inner_lr_follows_lr,
            "replicated": False,
        }
        options.group_row({"base_lr": lr, **defaults}, 0, steps)
        super().__init__(params, defaults)
        self._take_groups(0, "at construction")
        self._built, self._state.entries.known = True, False
        if not self._walk.is_local:
            self._walk.ranks.replicas.find(self.param_groups)

    def _build(self, choices: Choices, ranks: Ranks) -> None:
        self._itself = weakref.ref(self)
        self._watch, self._traps = AccumulationWatch(), Traps()
        backends.check_choice(*choices[1:3])
        self._choices = choices  # of the constructor, as `Walk` takes them
        self._walk = Walk(choices, ranks)
        self._state = State(self, self._walk)
        self._built = False
        self._known: set[Tensor] = set()  # the parameters of all groups

    # Parameters

    @of_the_optimizer
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group as torch.optim does; in mid-cycle it joins the walk from here, with a Γ of its own."""
        self._refuse_inside_outer_weights("add_param_group()")
        if self._built:
            self._state.follow_members()
        self._walk.check_writes()
        self._state.adopt()
        index = len(self.param_groups)
        unique = options.check_new_group(param_group, self.defaults, index, self.inner_steps, self._known)
        with uninterrupted():
            super().add_param_group(param_group)
            group = self.param_groups[index]
            try:
                self._complete(group, unique)
                if self._built:  # the constructor takes all groups at once
                    self._take_groups(index, "in add_param_group()")
            except BaseException:
                self.param_groups.pop()
                self._known.difference_update(unique)
                if self._built:
                    self._walk.follow_ranks([], self.param_groups)
                raise

    def _complete(self, group: dict[str, Any], unique: list[Tensor]) -> None:
        """Makes a group that torch.optim has appended one of ours."""
        options.tidy(group)
        if len(unique) < len(group["params"]):  # the base class has warned
            if "param_names" in group:
                names = dict(zip(reversed(group["params"]), reversed(group["param_names"]), strict=True))
                group["param_names"] = [names[p] for p in unique]
            group["params"] = unique
        for key in ("lr", "inner_lr"):
            if isinstance(group[key], Tensor):  # schedulers write into it: each group needs its own
                group[key] = group[key].detach().clone()
        group["base_lr"] = float(group["lr"])
        self._known.update(unique)

    @on_its_own
    def _take_groups(self, first: int, when: str) -> None:
        """Gives the parameters of the groups from the first on state, if all ranks do."""
        entries = [
            (g, i, p) for g, group in enumerate(self.param_groups[first:], first) for i, p in enumerate(group["params"])
        ]
        live = [entry for entry in entries if not is_frozen(entry[2])]
        self._walk.follow_ranks(live, self.param_groups)
        self._compare_ranks(when, weights=[p for *_, p in entries])
        self._state.register(entries, flatten=self._walk.flatten)

    # Stepping

    @on_its_own
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
        with uninterrupted():
            self._watch.look((p for group in self.param_groups for p in group["params"]), closure)
            self._state.follow_members()
            last = self.cycle_position + 1 == self.inner_steps
            agreement.compare_for_debugging(
                self._walk, self.param_groups, self._state.entries.state, "in step()", averages=last
            )
            self._state.refresh(gradients=True, moments=last)
            self._traps.look(self.param_groups, self._walk)
            try:
                self._walk.step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
            finally:
                self._state.show_position()
        return loss

    @of_the_optimizer
    def outer_step(self) -> None:
        """Ends a partial cycle: applies the displacement so far. Gradients that wait are not used.

        Without any inner step it does nothing. Errors as `step()`. With a `displacement_group` all ranks call it once
        their micro-batches are used up, however many each had: it takes part in the averages of those that still call
        `step()`, returns when all have come, and waits for the device.
        """
        self._refuse_inside_outer_weights("outer_step()")
        if self.at_boundary and not self._walk.is_local:
            return
        everybody_is_here = False
        while not everybody_is_here:
            with uninterrupted():
                self._state.follow_members()
                here = self._walk, self.param_groups, self._state.entries.state
                agreement.compare_for_debugging(*here, "in outer_step()", averages=self._walk.is_local)
                self._state.refresh(gradients=False)
                try:
                    everybody_is_here = self._walk.finish(None)
                finally:
                    self._state.show_position()

    @property
    def inner_steps(self) -> int:
        """K, micro-batches in a cycle."""
        return self._walk.inner_steps

    @property
    def cycle_position(self) -> int:
        """Inner steps taken in the running cycle, 0 … inner_steps-1."""
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
        optimizer._state.entries.known = True
        state: dict[Any, Any] = optimizer.__dict__["state"]
        return state

    @state.setter
    def state(self, state: dict[Any, Any]) -> None:
        optimizer: Any = self._itself()
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
        NaN where fewer than two were taken. grad_norms: ‖g_k‖ of each micro-batch, unscaled. lost_fraction: the share
        of element moves in the walk, since a load in it, that left the weight where it was; where it is not small,
        inner_lr is too small for the model. skipped_inner_steps, skipped_outer_steps: totals of steps and cycles in
        which nothing moved.
        """
        cycles = list(self._walk.cycles.values())
        return {
            **summarize(combine(cycles), self.inner_steps),
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

    def _refuse_inside_outer_weights(self, what: str) -> None:
        if self._state.shows_theta:
            inside = self._state.in_outer_weights
            where = "inside outer_weights()" if inside else "after eval()"
            remedy = "leave the with block" if inside else "call train()"
            raise RuntimeError(f"{what} {where}: the parameters show θ there; {remedy} first")

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

    # Saving and loading

    @of_the_optimizer
    def state_dict(self) -> dict[str, Any]:
        """torch.optim.AdamW's state, below float32 with each parameter's remainder, in mid-cycle with its displacement.

        Saving and loading it after any micro-batch continues bit for bit, together with the model's state of the
        same moment. Tensors are the live ones, as torch.optim's.
        """
        if self._walk.is_local and not self.at_boundary and not self._state.shows_theta:
            warnings.warn(
                f"state_dict() in mid-cycle ({self.cycle_position} of {self.inner_steps} inner steps), where each rank "
                "of displacement_group has a walk of its own: have every rank save its model and optimizer for itself, "
                "or save inside outer_weights() or at a boundary",
                stacklevel=6,
            )
        self._state.prepare_to_save()
        hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, OrderedDict()
        try:
            packed = checkpoint.pack(super().state_dict())
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        for hook in hooks.values():
            packed = hook(self, packed) or packed
        return packed

    @of_the_optimizer
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads NexusAdamW's state of any position, or AdamW's, in place. Only displacements are narrowed.

        ValueError or TypeError, naming group and parameter, for a state that does not fit; nothing is modified then.
        """
        if self._state.hides_walk:
            self._refuse_inside_outer_weights("load_state_dict()")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self._state.follow_members()
        try:
            groups, entries, foreign = checkpoint.check(state_dict, self.param_groups, self._walk)
        except Exception as error:  # whatever it is, others must not wait for this rank
            self._compare_ranks("in load_state_dict()", error)
            raise
        self._compare_ranks("in load_state_dict()", loads=groups[0].get("cycle_position", 0) if groups else 0)
        with uninterrupted():
            self._state.restore(groups, entries)
            self._traps.knows_schedule = False
            self._state.entries.state.update(foreign)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @of_the_optimizer
    def materialize_displacements(self) -> None:
        """Makes the state hold zero displacements, so that a load that fills only keys it finds can receive a
        checkpoint of mid-cycle. They are dropped again if the loaded position is 0, or at the end of the next cycle.
        """
        self._refuse_inside_outer_weights("materialize_displacements()")
        if self.inner_steps > 1:
            self._state.materialize_displacements()

    @on_its_own
    def __getstate__(self) -> dict[str, Any]:
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
        return {**super().__getstate__(), "_choices": self._choices, "_finished": kept}

    @on_its_own
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Builds tables around copied or unpickled parameters and state."""
        groups, entries = state["param_groups"], dict(state["state"])
        self._build(state["_choices"], Ranks())
        super().__setstate__({"defaults": state["defaults"], "param_groups": groups, "state": defaultdict(dict)})
        loaded = [dict(group) for group in groups]
        params = [(g, i, p) for g, group in enumerate(groups) for i, p in enumerate(group["params"])]
        self._known.update(p for *_, p in params)
        self._state.register(params, flatten=self._walk.flatten, known=entries)
        self._traps.knows_schedule = False
        self._state.restore(loaded, {p: entry for p, entry in entries.items() if isinstance(p, Tensor)})
        self._built = True
        self._state.entries.state.update({key: value for key, value in entries.items() if not isinstance(key, Tensor)})
        self._state.entries.known = False
        finished = state["_finished"]
        if finished is not None:
            of_all = next(iter(self._walk.cycles.values()))
            with torch.device("cpu"):  # whatever the default device is
                sums, counts = finished
                of_all.finished = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.int64)
