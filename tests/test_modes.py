"""The modes of PyTorch that a caller may be in: Dynamo's, inference mode, FakeTensorMode, torch.func's."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import assert_same, build, make_params, run, sample, set_grads, values
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from nexus_fused import NexusAdamW


@pytest.fixture
def dynamo():
    """Which compiles a frame once, or raises."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))


@pytest.mark.interpreted(backend=("triton",))
@pytest.mark.parametrize("compiler", sample(["eager", "aot_eager"], "aot_eager"))
@pytest.mark.filterwarnings("ignore")  # Dynamo has its own
@pytest.mark.usefixtures("dynamo")
class TestDynamo:
    @pytest.mark.parametrize("how", ["plain", "scheduler", "closure"])
    def test_a_compiled_training_step_compiles_once(self, backend, compiler, how):
        """And does what it does uncompiled: norms, which change with every step, are nothing that it guards."""
        weights = []
        for compiled in (False, True):
            model = small_model()
            optimizer = NexusAdamW(model.parameters(), backend=backend)
            scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer) if how == "scheduler" else None

            def train_step(x, model=model, optimizer=optimizer):
                def closure():
                    optimizer.zero_grad()
                    loss = model(x).square().mean()
                    loss.backward()
                    return loss

                if how == "closure":
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()

            step = torch.compile(train_step, backend=compiler) if compiled else train_step
            generator = torch.Generator().manual_seed(1)
            step(torch.randn(3, 6, generator=generator))
            graphs = counters["stats"]["unique_graphs"]
            for _ in range(9):
                step(torch.randn(3, 6, generator=generator))
                if scheduler:
                    scheduler.step()
            assert counters["stats"]["unique_graphs"] == graphs
            weights.append(values(model.parameters()))
        assert_same(*weights)

    def test_everything_else_that_touches_memory(self, backend, compiler):
        """Nothing of ours is traced, wherever it is called."""
        model = small_model()
        optimizer = NexusAdamW(model.parameters(), backend=backend)
        run(optimizer, list(model.parameters()), 5)
        x = torch.ones(2, 6)
        with optimizer.outer_weights():
            expected = model(x).detach()

        @torch.compile(backend=compiler)
        def evaluate(x):
            with optimizer.outer_weights():
                return model(x)

        assert_same([evaluate(x).detach(), evaluate(x).detach()], [expected, expected])

        @torch.compile(backend=compiler)
        def save_and_load():
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.outer_step()
            optimizer.materialize_displacements()
            return optimizer.metrics()

        assert save_and_load()["grad_norms"]
        run(optimizer, list(model.parameters()), 4)
        assert not [frame for frame in counters["frames"] if "nexus" in str(frame)]


class TestInferenceMode:
    """Memory that we allocate in it can be written later; the caller's tensors are as before."""

    def same_as_outside(self, work, backend, **options):
        results = []
        for inside in (False, True):
            params = make_params((5, 3), (7,))
            results.append(values(work(params, lambda inside=inside: torch.inference_mode(inside), backend)))
            assert not any(p.is_inference() for p in params)
        assert_same(*results)

    def test_built_in_it(self, backend):
        def work(params, mode, backend):
            with mode():
                optimizer = NexusAdamW(params, backend=backend, lr=torch.tensor(0.01))
            run(optimizer, params, 5)
            optimizer.param_groups[0]["lr"].fill_(0.02)  # as schedulers do
            (params[0].sum() ** 2).backward()  # saves the weights
            run(optimizer, params, 4)
            return params

        self.same_as_outside(work, backend)

    def test_unfrozen_and_looked_at_in_it(self, backend):
        def work(params, mode, backend):
            params[0].requires_grad_(False)
            optimizer = NexusAdamW(params, backend=backend, amsgrad=True)
            run(optimizer, params[1:], 5)
            params[0].requires_grad_(True)
            with mode(), optimizer.outer_weights():
                assert torch.is_inference_mode_enabled() == params[1].sum().is_inference()
            run(optimizer, params, 4)
            return params

        self.same_as_outside(work, backend)

    @pytest.mark.parametrize("steps", [4, 5])
    def test_loaded_in_it(self, backend, steps):
        params, optimizer = build(backend=backend, lr=torch.tensor(0.01))
        run(optimizer, params, steps)
        saved = optimizer.state_dict()

        def work(params, mode, backend):
            with mode():
                optimizer = NexusAdamW(params, backend=backend, lr=torch.tensor(0.01))
                optimizer.load_state_dict(copy.deepcopy(saved))
            optimizer.param_groups[0]["lr"].fill_(0.02)
            run(optimizer, params, 4)
            return params

        self.same_as_outside(work, backend)

    def test_everything_in_it(self, backend):
        """Gradients, too, that are of inference mode, and a closure that trains."""

        def work(params, mode, backend):
            optimizer = NexusAdamW(params[:1], backend=backend)
            with mode():
                optimizer.materialize_displacements()
                optimizer.add_param_group({"params": params[1:]})
                run(optimizer, params, 3)
                optimizer.outer_step()
                optimizer.param_groups[0]["amsgrad"] = True
                optimizer.state_dict()
            for _ in range(2):
                with mode():
                    optimizer.step(lambda: sum((p * p).sum() for p in params).backward())
                optimizer.zero_grad()
            set_grads(params, 0)
            optimizer.step()
            assert not any(t.is_inference() for entry in optimizer.state.values() for t in entry.values())
            return params

        self.same_as_outside(work, backend)

    def test_of_a_model_made_in_it(self):
        with torch.inference_mode():
            (p,) = make_params((3,))
        with pytest.raises(ValueError, match=r"parameter 0 of group 0 was made in inference mode.*outside of it"):
            NexusAdamW([p])


class TestNoMemory:
    """What has none is refused before anything asks for its address."""

    def fake(self):
        with FakeTensorMode():
            return nn.Parameter(torch.zeros(3))

    def functional(self):
        return nn.Parameter(torch._to_functional_tensor(torch.zeros(3)))

    def freed(self):
        p = nn.Parameter(torch.zeros(3))
        p.untyped_storage().resize_(0)
        return p

    @pytest.mark.parametrize("kind", ["fake", "functional", "freed"])
    @pytest.mark.parametrize("flatten", [True, False])
    def test_parameters(self, backend, kind, flatten):
        params, bad = make_params((3,), (4,)), getattr(self, kind)()
        before = values(params)
        groups = [{"params": params[:1]}, {"params": [params[1], bad]}]
        with pytest.raises(TypeError, match=r"parameter 1 of group 1 has no memory.*FakeTensorMode"):
            NexusAdamW(groups, backend=backend, flatten=flatten)
        assert_same(values(params), before)
        optimizer = NexusAdamW(params, backend=backend, flatten=False)
        with pytest.raises(TypeError, match=r"parameter 0 of group 1 has no memory"):
            optimizer.add_param_group({"params": bad})
        assert len(optimizer.param_groups) == 1
        run(optimizer, params, 5)

    def test_all_of_a_script(self):
        with FakeTensorMode():
            model = nn.Linear(8, 8)
            with pytest.raises(TypeError, match=r"parameter 0 of group 0 has no memory"):
                NexusAdamW(model.parameters())

    def test_inside_torch_func(self):
        def build(x):
            with pytest.raises(TypeError, match=r"parameter 0 of group 0 has no memory"):
                NexusAdamW([nn.Parameter(x)])
            return x.sum()

        torch.func.grad(build)(torch.ones(3))
        torch.func.vmap(build)(torch.ones(2, 3))

    def test_without_elements_there_is_nothing_to_reach(self, backend):
        params, optimizer = build((0, 3), (4,), backend=backend)
        run(optimizer, params, 5)

    def test_real_ones_in_the_mode(self, backend):
        """Are updated as outside of it: their memory is real, and what we add to it."""
        results = []
        for inside in (False, True):
            params = make_params((5, 3), (7,))
            for seed in range(9):
                set_grads(params, seed)
                with FakeTensorMode() if inside else torch.enable_grad():
                    if seed == 0:
                        optimizer = NexusAdamW(params, backend=backend)
                    optimizer.step()
                    if seed == 5:
                        optimizer.load_state_dict(optimizer.state_dict())
                        optimizer.outer_step()
            results.append(values(params))
        assert_same(*results)

    def test_gradients(self, backend):
        params, optimizer = build((3,), (4,), backend=backend)
        set_grads(params, 0)
        with FakeTensorMode():
            params[1].grad = torch.ones(4)
        before = values(params)
        with pytest.raises(RuntimeError, match=r"gradient of parameter 1 of group 0 .* has no memory"):
            optimizer.step()
        assert_same(values(params), before)
        assert optimizer.at_boundary
