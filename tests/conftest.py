"""What several test files share: the table of backends and dtypes, models, gradients."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():  # read when nexus_fused imports the kernels: they then run on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"

import cuda_on_cpu

from nexus_fused import NexusAdamW, backends
from nexus_fused.reference import read_weight

if not torch.cuda.is_available() and backends.why_not("cpu", torch.device("cpu")) is None:
    cuda_on_cpu.install()

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COMPLEX = [torch.complex64, torch.complex128]
BACKENDS = [name for name in backends.NAMES if backends.why_not(name, torch.device("cpu")) is None]


def pytest_collection_modifyitems(items):
    """Marks what `make test` leaves out because Triton's interpreter is slow.

    An optimizer does with it what it does with other backends. So it runs where kernels are tested: `interpreted`.
    """
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if torch.cuda.is_available() or not any(isinstance(v, str) and v == "triton" for v in params.values()):
            continue
        marker = item.get_closest_marker("interpreted")
        if marker is None or any(params[name] not in values for name, values in marker.kwargs.items()):
            item.add_marker(pytest.mark.exhaustive)


def sample(values, *kept):
    """Values of a parameter, of which `make test` takes those that are kept."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.exhaustive) for value in values]


def selected(request, name):
    """The values of a parameter in the tests of this module that were selected."""
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    return list(dict.fromkeys(item.callspec.params[name] for item in items if name in item.callspec.params))


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def one_thread():
    """The models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_params(*shapes, dtype=torch.float32, seed=0):
    """Parameters of the given shapes, values around 1."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=wide).to(dtype)) for shape in shapes]


def set_grads(params, seed):
    """Gives each parameter a new random gradient, the same for the same seed whatever the parameters' dtype."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        wide = torch.complex128 if p.is_complex() else torch.float64
        p.grad = torch.randn(p.shape, generator=generator, dtype=wide).to(p.dtype)


def run(optimizer, params, steps, first_seed=0):
    """`steps` micro-batches of random gradients; the seeds go on from `first_seed`."""
    for seed in range(first_seed, first_seed + steps):
        set_grads(params, seed)
        optimizer.step()
        optimizer.zero_grad()


def build(*shapes, dtype=torch.float32, **kwargs):
    """Parameters and their optimizer."""
    params = make_params(*shapes or ((5, 3), (7,)), dtype=dtype)
    return params, NexusAdamW(params, **{"lr": 1e-2, "inner_lr": 0.05, **kwargs})


def values(params):
    return [p.detach().clone() for p in params]


def exact(optimizer, param):
    """A parameter's weight with its remainder, float32 below float32."""
    return read_weight(param.detach(), optimizer.state[param].get("remainder"))


def assert_same(left, right):
    """Equality bit for bit (NaN equals NaN)."""
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_theta(shown, theta, *, longest):
    """θ as it is shown in mid-cycle: within two units in the last place of the larger of θ and the largest D of a walk.

    longest: no element of D is larger. Weights are float32 (or float64).
    """
    for now, before in zip(shown, theta, strict=True):
        unit = torch.finfo(before.dtype).eps * 2.0 ** torch.frexp(before.abs().clamp(min=longest)).exponent / 2
        assert ((now - before).abs() <= 2 * unit).all(), (now - before).abs().max()


def by_bits(state):
    """A state dict whose remainders, which may look like NaN, are integers."""
    entries = {
        key: {name: value.view(torch.int16) if name == "remainder" else value for name, value in entry.items()}
        for key, entry in state["state"].items()
    }
    return {**state, "state": entries}


def snapshot(optimizer):
    """Everything that an error must leave as it was."""
    return copy.deepcopy((by_bits(optimizer.state_dict()), [values(g["params"]) for g in optimizer.param_groups]))


def assert_snapshot(optimizer, before):
    state, weights = snapshot(optimizer)
    torch.testing.assert_close(state["state"], before[0]["state"], rtol=0, atol=0, equal_nan=True)
    assert str(state["param_groups"]) == str(before[0]["param_groups"])
    for left, right in zip(weights, before[1], strict=True):
        assert_same(left, right)


# Of tests of other libraries: what these warn of is theirs to mend; what we warn of is an error, as everywhere.
OF_LIBRARIES = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:(?s).*(nexus|inner_|inner step|one_micro_batch|backward pass|pile up)"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def accelerate_reset():
    """Accelerate keeps its state in the process: each test begins and leaves without."""
    state = pytest.importorskip("accelerate.state", reason="accelerate is not installed")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
