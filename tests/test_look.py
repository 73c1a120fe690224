"""The extension's quick look at parameters and gradients sees what Python sees, whatever lies there."""

from __future__ import annotations

import inside
import pytest
import torch
from conftest import assert_same, build, run, values
from torch import nn

from nexus_fused import NexusAdamW
from nexus_fused.flat import DTYPES, GRAD, GRAD_DTYPE, WEIGHT

pytestmark = pytest.mark.skipif(
    not inside.compiled_look, reason="no compiled extension, or a PyTorch without DLPack's C API"
)


class Subclass(torch.Tensor):
    pass


def _neg_view():
    z = torch.randn(6, 4, dtype=torch.complex64)
    assert z.conj().imag.is_neg()
    return z.conj().imag


GRADIENTS = {
    "none": lambda: None,
    "plain": lambda: torch.randn(6, 4),
    "other strides": lambda: torch.randn(4, 6).t(),
    "with gaps": lambda: torch.randn(6, 8)[:, ::2],
    "expanded": lambda: torch.randn(1, 4).expand(6, 4),
    "offset": lambda: torch.randn(25)[1:].view(6, 4),
    "negated": _neg_view,
    "subclass": lambda: torch.randn(6, 4).as_subclass(Subclass),
    "parameter": lambda: nn.Parameter(torch.randn(6, 4)),
    "sparse": lambda: torch.randn(6, 4).to_sparse(),
}


def look(monkeypatch, compiled, table):
    """What a table's first gradient is to kernels, or the error's text, with or without the extension."""
    if not compiled:
        inside.look_in_python(monkeypatch)
    try:
        table.read_gradients(use=True)
        address = int(table.rows[0, GRAD])
        gradient = table.gradient(table.segments[0])
        same_memory = gradient is not None and address == (gradient.data_ptr() or -1)
        read_as = int(table.rows[0, GRAD_DTYPE]), table.with_gradient() == table.segments
        return (address == 0, same_memory, *read_as), None if gradient is None else gradient.clone().resolve_neg()
    except RuntimeError as error:
        return str(error)
    finally:
        monkeypatch.undo()


def both(monkeypatch, optimizer):
    table = inside.only_table(optimizer)
    return [look(monkeypatch, compiled, table) for compiled in (True, False)]


def assert_alike(seen):
    if isinstance(seen[1], str):
        assert seen[0] == seen[1]
    else:
        assert seen[0][0] == seen[1][0]
        torch.testing.assert_close(seen[0][1], seen[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients(monkeypatch, kind):
    (param,), optimizer = build((6, 4))
    param.grad = GRADIENTS[kind]()
    seen = both(monkeypatch, optimizer)
    assert_alike(seen)
    if kind in ("other strides", "with gaps", "expanded", "negated"):  # copied: the address is not the gradient's own
        torch.testing.assert_close(seen[0][1], param.grad.resolve_neg().clone(), rtol=0, atol=0)


def test_a_negated_gradient_of_one_element(monkeypatch):
    """The imaginary part of a conjugate, dense as it has one element only, where its positive twin lay before."""
    z = torch.randn(1, dtype=torch.complex64)
    (param,), optimizer = build((1,))
    for _ in range(20):  # objects come to lie where others were
        param.grad = z.imag
        seen = both(monkeypatch, optimizer)
        assert seen[0][0][1]  # the same memory
        param.grad = None
        param.grad = z.conj().imag
        assert param.grad.is_neg()
        seen = both(monkeypatch, optimizer)
        assert_alike(seen)
        assert float(seen[0][1]) == -float(z.imag)
        param.grad = None


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 5), (5, 1, 1)])
def test_shapes(monkeypatch, shape):
    """Scalars, nothing, and dimensions of size 1, whose strides mean nothing."""
    (param,), optimizer = build(shape)
    param.grad = torch.randn(shape)
    assert_alike(both(monkeypatch, optimizer))
    if shape == (1, 5):
        param.grad = torch.randn(5).as_strided((1, 5), (77, 1))
        assert_alike(both(monkeypatch, optimizer))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16])
def test_dtypes(monkeypatch, dtype):
    (param,), optimizer = build((6, 4), dtype=dtype)
    param.grad = torch.randn(6, 4, dtype=dtype)
    assert_alike(both(monkeypatch, optimizer))
    if dtype.is_complex:
        param.grad = torch.randn(6, 4, dtype=dtype).conj()
        assert_alike(both(monkeypatch, optimizer))


@pytest.mark.parametrize("of_gradient", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_another_dtype(monkeypatch, dtype, of_gradient):
    """Read where they lie, whatever their floating dtype is."""
    (param,), optimizer = build((6, 4), dtype=dtype)
    param.grad_dtype = None
    param.grad = torch.randn(6, 4, dtype=of_gradient)
    seen = both(monkeypatch, optimizer)
    assert_alike(seen)
    assert seen[0][0] == (False, True, DTYPES[of_gradient], True)
    param.grad = torch.ones(6, 4, dtype=torch.int32)
    seen = both(monkeypatch, optimizer)
    assert "torch.int32 on cpu, its parameter" in seen[0]
    assert_alike(seen)


@pytest.mark.parametrize("grown", [torch.randn(3, 4), torch.randn(4, 6), torch.randn(6, 4, 1)])
def test_gradient_replaced_inside(monkeypatch, grown):
    (param,), optimizer = build((6, 4))
    param.grad = torch.randn(6, 4)
    param.grad.data = grown
    seen = both(monkeypatch, optimizer)
    assert isinstance(seen[0], str)
    assert "has shape" in seen[0]
    assert_alike(seen)


def test_parameter_that_shrank_in_place(monkeypatch):
    """Same address, fewer elements, with a gradient as small: kernels must not read beyond it."""
    (param,), optimizer = build((6, 4))
    param.data = param.data[:3]
    param.grad = torch.randn(3, 4)
    seen = both(monkeypatch, optimizer)
    assert isinstance(seen[0], str)
    assert_alike(seen)


def test_parameter_with_gaps_and_replaced_storage(monkeypatch):
    params = [nn.Parameter(torch.randn(6, 8)[:, ::2]), nn.Parameter(torch.randn(6, 4))]
    optimizer = NexusAdamW(params)
    for p in params:
        p.grad = torch.randn(6, 4)
    params[1].data = params[1].detach().clone()
    table = inside.only_table(optimizer)
    unusual, _, complete = inside.look_at_all(table)
    assert (unusual, complete) == ([0, 1], False)
    table.read_gradients(use=True)
    weights = table.rows[:, WEIGHT].tolist()
    assert weights[0] not in (params[0].data_ptr(), 0)  # its dense twin
    assert weights[1] == params[1].data_ptr()
    assert_same([table.segments[0].weight], [params[0].detach().flatten()])


def test_whole_runs_agree(monkeypatch, backend):
    """With and without the extension's look: bit for bit."""
    results = []
    for compiled in (True, False):
        if not compiled:
            inside.look_in_python(monkeypatch)
        params, optimizer = build((6, 4), (5,), (0,), backend=backend)
        run(optimizer, params, 5)
        with torch.no_grad():
            params[0].mul_(0.5)
        run(optimizer, params, 6, first_seed=5)
        results.append(values(params))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
