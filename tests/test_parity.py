"""Every backend against reference.py, function by function, over one table of dtypes, sizes and alignments.

Backends get the same scalars, so elements must be equal bit for bit. Exception: float64's square root, which PyTorch
on a CPU may round one unit away; from there at most a few units in θ.
"""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, COMPLEX, DTYPES, assert_same, build, exact, run, values
from kernel_tables import (
    LOW,
    OFFSETS,
    SIZES,
    check_conversions,
    compare,
    contents,
    give_gradients,
    make_cycle,
    make_table,
    run_function,
    sq_norm,
)

from nexus_fused import reference
from nexus_fused.cycle import MicroBatch
from nexus_fused.flat import COLUMNS, KEPT
from nexus_fused.flat import DTYPES as DTYPE_NUMBERS
from nexus_fused.table import CHUNK_ELEMENTS

FUNCTIONS = ["inner_step", "outer_step", "end_walk", "adamw", "gradients"]
FUSED = [name for name in BACKENDS if name != "reference"]


@pytest.mark.interpreted
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestParity:
    @pytest.mark.interpreted(size=[size for size in SIZES if size < CHUNK_ELEMENTS - 1])
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("offsets", OFFSETS)
    def test_sizes_and_alignments(self, name, dtype, size, offsets):
        made = make_table(dtype, [size, 5, size], offsets=offsets)
        torch.testing.assert_close(sq_norm(name, made), reference.sq_norm(made), rtol=1e-12, atol=0)
        # Of large ones a minute and more passes in Triton's interpreter: there both in one call.
        touches = ((0,),) if name == "triton" and size > 10000 else ((), (0, 1, 2))
        for function in ("inner_step", "outer_step"):
            for touched in touches:
                compare(function, name, dtype, sizes=[size, 5, size], offsets=offsets, touched=touched)

    @pytest.mark.interpreted(dtype=[torch.float32, torch.bfloat16])
    def test_several_chunks(self, name, dtype):
        for function in ("inner_step", "outer_step"):
            compare(function, name, dtype, sizes=[2 * CHUNK_ELEMENTS + 17, 5, CHUNK_ELEMENTS], touched=(0,))

    @pytest.mark.parametrize("position", range(3))
    def test_empty_parameter_in_every_position(self, name, dtype, position):
        sizes = [100, 33]
        sizes.insert(position, 0)
        for function in ("inner_step", "outer_step"):
            compare(function, name, dtype, sizes=sizes)

    def test_nothing_but_empty(self, name, dtype):
        assert sq_norm(name, make_table(dtype, [0, 0])) == 0
        compare("outer_step", name, dtype, sizes=[0, 0])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_skipped_step(self, name, dtype, bad):
        assert not sq_norm(name, make_table(dtype, [40, 9], bad=bad)).isfinite()
        for function in ("inner_step", "outer_step"):
            for touched in ((), (0,), (0, 1)):
                compare(function, name, dtype, sizes=[40, 9], touched=touched, bad=bad)

    @pytest.mark.parametrize("flatten", [False, True])
    @pytest.mark.parametrize("amsgrad", [False, True])
    @pytest.mark.parametrize(
        "hyper", [{}, {"normalize": 0}, {"sign": -1}, {"beta1": 0.0}, {"beta1": 0.3, "beta2": 0.0}, {"lr": 0}]
    )
    def test_options(self, name, dtype, flatten, amsgrad, hyper):
        compare(
            "outer_step",
            name,
            dtype,
            sizes=[70, 2000],
            touched=(1,),
            flatten=flatten,
            amsgrad=amsgrad,
            hyper=hyper,
        )

    def test_who_takes_part(self, name, dtype):
        """Touched or not, with or without a gradient: all four."""
        for function in ("inner_step", "outer_step"):
            compare(function, name, dtype, sizes=[50, 60, 70, 80], touched=(0, 1), gradients=(1, 2))

    def test_no_last_gradient(self, name, dtype):
        compare("outer_step", name, dtype, sizes=[50, 60], touched=(0, 1), gradients=(), last_gradient=False)

    def test_group_that_never_walked(self, name, dtype):
        for bad in (None, float("nan")):
            kwargs = {"touched": (0, 1), "bad": bad, "last_gradient": bad is not None}
            compare("outer_step", name, dtype, sizes=[50, 60], walk_length=0, **kwargs)

    @pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e25, 1e37])
    def test_range_of_the_norm(self, name, dtype, scale):
        if dtype == torch.float16:
            scale = {1e-38: 6e-8, 1e-25: 1e-5, 1e25: 1e3, 1e37: 5e4}[scale]
        table = make_table(dtype, [1000])
        table.segments[0].param.grad.fill_(scale)
        exact = table.segments[0].param.grad[0].double() ** 2 * 1000
        assert sq_norm(name, table).item() == pytest.approx(exact.item(), rel=1e-12)
        assert sq_norm(name, table) > 0


@pytest.mark.interpreted
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("dtype", "kept"), [(d, k) for d in DTYPES for k in (torch.bfloat16, torch.float32)], ids=str)
class TestDisplacements:
    """D in both dtypes, with and without an anchor, through all functions; `adamw` and `gradients` after `end_walk`."""

    @pytest.mark.parametrize("anchor", [False, True])
    @pytest.mark.parametrize(("sizes", "offsets"), [([1023, 5, 0, 33], (1, 1)), ([1100], (0, 3)), ([1, 2048], (0, 0))])
    def test_sizes_and_alignments(self, name, dtype, kept, sizes, offsets, anchor):
        for function in FUNCTIONS:
            for touched in ((), range(len(sizes))):
                kwargs = {"sizes": sizes, "offsets": offsets, "touched": touched, "anchor": anchor}
                compare(function, name, dtype, displacement_dtype=kept, **kwargs)

    @pytest.mark.interpreted(dtype=[])
    def test_several_chunks(self, name, dtype, kept):
        for function in FUNCTIONS:
            sizes = [2 * CHUNK_ELEMENTS + 17, 5, CHUNK_ELEMENTS]
            compare(function, name, dtype, sizes=sizes, touched=(0,), displacement_dtype=kept)

    def test_who_takes_part(self, name, dtype, kept):
        """Touched or not, with or without a gradient, moved on another rank or on none."""
        for touched in ((0, 1), (0, 1, 2)):  # others than those with a gradient, and just those
            gradients = (0, 1, 2) if len(touched) == 3 else (1, 2)
            kwargs = {"sizes": [50, 60, 1025, 0, 80], "touched": touched, "gradients": gradients}
            for moved in (None, (1, 3, 4)):
                for function in ("adamw", "gradients"):
                    compare(function, name, dtype, moved=moved, displacement_dtype=kept, **kwargs)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_skipped_step(self, name, dtype, kept, bad):
        for function in FUNCTIONS:
            for touched in ((), (0,)):
                kwargs = {"sizes": [1100, 9], "touched": touched, "bad": bad, "anchor": True}
                compare(function, name, dtype, displacement_dtype=kept, **kwargs)

    def test_no_last_gradient(self, name, dtype, kept):
        kwargs = {"sizes": [50, 60, 70], "touched": (0, 1), "gradients": (), "last_gradient": False}
        for function in FUNCTIONS[1:]:
            compare(function, name, dtype, displacement_dtype=kept, **kwargs)

    @pytest.mark.parametrize("hyper", [{}, {"normalize": 0}, {"sign": -1, "beta1": 0.3}])
    def test_options(self, name, dtype, kept, hyper):
        kwargs = {"sizes": [70, 1100], "touched": (1,), "amsgrad": not hyper, "hyper": hyper}
        compare("adamw", name, dtype, displacement_dtype=kept, **kwargs)

    def test_group_that_never_walked(self, name, dtype, kept):
        """Its last step is skipped too: weights are θ again."""
        kwargs = {"sizes": [1050, 0, 60], "touched": (0,), "bad": float("nan"), "walk_length": 0, "anchor": True}
        compare("adamw", name, dtype, displacement_dtype=kept, **kwargs)


@pytest.mark.interpreted(dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("dtype", "kept"), [(d, k) for d in DTYPES for k in (torch.bfloat16, torch.float32)], ids=str)
class TestWithoutMoments:
    """Tables of others' optimizers, which have just what a walk needs: remainders, and no moments."""

    FUNCTIONS = ("inner_step", "end_walk", "gradients")

    @pytest.mark.parametrize(
        ("sizes", "offsets", "anchor"),
        [([1023, 5, 0, 33], (1, 1), True), ([1100], (0, 3), False), ([1, 2048], (0, 0), True)],
    )
    def test_sizes_and_alignments(self, name, dtype, kept, sizes, offsets, anchor):
        for function in self.FUNCTIONS:
            for touched in ((), range(len(sizes))):
                kwargs = {"sizes": sizes, "offsets": offsets, "touched": touched, "anchor": anchor, "keeps": ()}
                compare(function, name, dtype, displacement_dtype=kept, **kwargs)

    @pytest.mark.interpreted(dtype=[])
    def test_several_chunks(self, name, dtype, kept):
        for function in self.FUNCTIONS:
            sizes = [2 * CHUNK_ELEMENTS + 17, 5, CHUNK_ELEMENTS]
            compare(function, name, dtype, sizes=sizes, touched=(0,), displacement_dtype=kept, keeps=())

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_skipped_step(self, name, dtype, kept, bad):
        for function in self.FUNCTIONS:
            for touched in ((), (0,)):
                kwargs = {"sizes": [1100, 9], "touched": touched, "bad": bad, "keeps": ()}
                compare(function, name, dtype, displacement_dtype=kept, **kwargs)

    def test_nothing_but_empty(self, name, dtype, kept):
        for function in self.FUNCTIONS:
            compare(function, name, dtype, sizes=[0, 0], displacement_dtype=kept, keeps=())


@pytest.mark.interpreted
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("touched", [(), (0, 1)])
@pytest.mark.parametrize("offset", [0, 1])
def test_lost_moves(name, dtype, touched, offset):
    """Where w did not change or, in a table that drops remainders, the parameter did not."""
    lost = {}
    for keeps in (KEPT, ()):
        table = make_table(dtype, [1100, 60], offsets=(offset, 0), touched=touched, keeps=keeps)
        cycle = make_cycle(name)
        before, w = ([f(s).clone() for s in table.segments] for f in (lambda s: s.weight, reference.weight))
        run_function("inner_step", table, cycle, MicroBatch([reference.sq_norm(table)], 0))
        now = [segment.weight if table.counts_parameters else reference.weight(segment) for segment in table.segments]
        then = before if table.counts_parameters else w
        moved = [segment.param.grad != 0 for segment in table.segments]
        stays = [a == b for a, b in zip(now, then, strict=True)]
        assert cycle.moves == sum(m.sum() for m in moved)
        lost[keeps] = sum((m & s).sum() for m, s in zip(moved, stays, strict=True))
        assert cycle.lost_moves == lost[keeps]
    assert (lost[()] > lost[KEPT]) == (dtype in LOW)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("groups", [3, 10])
def test_sums_of_several_groups(name, groups):
    """Of a few and of many, for which the CUDA kernels have different ways."""
    for function in ("outer_step", "adamw", "gradients"):
        compare(function, name, torch.float32, sizes=[7, 0, 600, 5] * 3, touched=(0, 1, 2, 7), groups=groups)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", FUSED)
def test_sums_of_gradients_add_up(name):
    """Of several tables, and to what is there."""
    cycles = [make_cycle(which, groups=2) for which in ("reference", name)]
    for cycle in cycles:
        cycle.displacement_sq.fill_(0.5)
        for dtype in (torch.float32, torch.bfloat16):
            table = make_table(dtype, [1100, 7, 30], touched=(0, 1, 2), gradients=(), groups=2, keeps=())
            give_gradients(table, cycle, (0, 2))
    expected, made = (cycle.displacement_sq for cycle in cycles)
    assert (expected > 0.5).all()
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=0)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_are_themselves_after_gradients(name):
    """Their targets were in the place of gradients only there."""
    table, cycle = make_table(torch.float32, [50, 60]), make_cycle(name)
    rows, norm = table.rows.clone(), sq_norm(name, table).clone()
    table.clear_untouched()
    before, written = contents(table, cycle)[0], give_gradients(table, cycle)
    assert_same(contents(table, cycle)[0], before)
    assert all((memory[:-3] == 0).all() and memory[-3:].isnan().all() for memory in written)
    assert torch.equal(table.rows, rows)
    assert sq_norm(name, table) == norm


@pytest.mark.interpreted
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("dtype", "of_gradient"), [(d, g) for d in DTYPES for g in DTYPES if d != g], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_of_another_dtype(name, dtype, of_gradient, offset):
    """Read as they are."""
    kwargs = {"sizes": [1100, 5, 40], "offsets": (0, offset), "grad_dtype": of_gradient}
    made = make_table(dtype, **kwargs)
    torch.testing.assert_close(sq_norm(name, made), reference.sq_norm(made), rtol=1e-12, atol=0)
    for function in FUNCTIONS[:-1]:
        for touched in ((), (0, 1)):
            compare(function, name, dtype, touched=touched, **kwargs)
    compare("inner_step", name, dtype, bad=float("nan"), **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_and_threads_agree(dtype):
    """Bit for bit, sums included: neither the width of a register nor the number of threads shows."""
    extension = pytest.importorskip("nexus_fused._C")
    threads, best = torch.get_num_threads(), extension.instruction_set()
    results = []
    try:
        for isa in extension.instruction_sets():
            for n in (1, 2, 3, 7):
                extension.set_instruction_set(isa)
                torch.set_num_threads(n)
                table, cycle = make_table(dtype, [50, 70000, 1, 33000]), make_cycle("cpu")
                norms = cycle.backend.sq_norm(table)
                run_function("inner_step", table, cycle, MicroBatch([norms], 0))
                table.set_touched(table.segments, True)
                run_function("outer_step", table, cycle, MicroBatch([norms], 1))
                tensors, sums = contents(table, cycle)
                run_function("adamw", table, cycle, MicroBatch([norms], 0))
                given = give_gradients(table, cycle)
                results.append([norms, *tensors, *sums, *contents(table, cycle)[0], *given, cycle.displacement_sq])
    finally:
        extension.set_instruction_set(best)
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's in Triton's interpreter, of inf − inf
@pytest.mark.interpreted
@pytest.mark.parametrize("storage", LOW, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_every_conversion_is_pytorchs(name, storage):
    check_conversions(name, storage)


@pytest.mark.parametrize("dtype", [*DTYPES, *COMPLEX], ids=str)
def test_whole_runs_on_a_cpu(dtype):
    """Bit for bit; in float64 PyTorch sums norms in another order and rounds square roots otherwise."""
    pytest.importorskip("nexus_fused._C")
    ends = []
    for backend in ("reference", "cpu"):
        params, optimizer = build((50, 33), (CHUNK_ELEMENTS + 7,), dtype=dtype, backend=backend)
        run(optimizer, params, 12)
        ends.append([exact(optimizer, p) for p in params] if not dtype.is_complex else values(params))
    in_float64 = dtype in (torch.float64, torch.complex128)
    for reference_end, end in zip(*ends, strict=True):
        torch.testing.assert_close(end, reference_end, rtol=0, atol=1e-13 if in_float64 else 0)


def test_layout_of_tables():
    """The structs of csrc/nexus_math.h have the columns in Python as members, in this order."""
    from nexus_fused.options import HYPER

    extension = pytest.importorskip("nexus_fused._C")
    assert extension.SEGMENT.split(", ") == list(COLUMNS)
    assert extension.HYPER.split(", ") == list(HYPER)
    assert extension.CHUNK_ELEMENTS == CHUNK_ELEMENTS
    assert {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3} == DTYPE_NUMBERS
