"""The training state: gradients of uneven shares, clipping, the average of weights, non-finite steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cli import UserError
from runtime.distributed import DistributedContext
from trainer import Optimisation, TrainState


@settings(max_examples=30, deadline=None)
@given(accumulation=st.integers(1, 5), more=st.integers(0, 8), seed=st.integers(0, 2**16))
def test_uneven_micro_batches_add_up_to_the_mean_over_the_batch(accumulation, more, seed):
    torch.manual_seed(seed)
    size, module = accumulation + more, torch.nn.Linear(3, 2)
    batch = {"x": torch.randn(size, 3), "weight": torch.rand(size)}

    def per_sample(part):
        return part["weight"] * module(part["x"]).square().mean(1)

    wanted = torch.autograd.grad(per_sample(batch).mean(), list(module.parameters()))
    options = {"lr": 0.1, "clip": 1e9, "global_batch_size": size, "accumulation": accumulation}
    state, seen = TrainState(module, DistributedContext(), Optimisation(**options)), []
    for part in state.micro_batches(batch):
        state.backward({"loss": per_sample(part), "weight": part["weight"]})
        seen.append(part["x"])
    assert len(seen) == accumulation and torch.equal(torch.cat(seen), batch["x"])
    for parameter, gradient in zip(module.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        means = {"loss": per_sample(batch).mean(), "weight": batch["weight"].mean()}
    means["grad_norm"] = torch.cat([gradient.flatten() for gradient in wanted]).norm()
    found = state.step()
    assert found.keys() == means.keys()
    for name, value in means.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match=r"--global-batch-size 3: must be at least ranks x --accumulation = 4"):
        TrainState(
            torch.nn.Linear(1, 1), DistributedContext(), Optimisation(lr=1, clip=1, global_batch_size=3, accumulation=4)
        )


def test_the_average_follows_the_weights_and_the_gradient_is_clipped():
    module = torch.nn.Linear(3, 1)
    state = TrainState(
        module, DistributedContext(), Optimisation(lr=0.1, clip=0.5, ema_decay=0.75, global_batch_size=1)
    )
    before = module.weight.clone()
    state.backward({"loss": 100 * module(torch.ones(1, 3))[:, 0]})
    assert state.step()["grad_norm"].item() == pytest.approx(200)  # before clipping
    moments = [state.optimizer.state[parameter]["exp_avg"] for parameter in module.parameters()]
    assert torch.cat([moment.flatten() for moment in moments]).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)
    torch.testing.assert_close(state.ema.weight, 0.75 * before + 0.25 * module.weight)


def test_a_warm_average_begins_short_and_grows_until_its_decay_holds():
    module = torch.nn.Linear(1, 1)
    options = {"lr": 0.1, "clip": 1.0, "global_batch_size": 1, "ema_decay": 0.3, "ema_warmup": True}
    state = TrainState(module, DistributedContext(), Optimisation(**options))
    wanted = module.weight.clone()
    for decay in (1 / 10, 2 / 11, 3 / 12, 0.3, 0.3):  # 4/13 would be more
        state.backward({"loss": module(torch.ones(1, 1))[:, 0]})
        state.step()
        wanted = decay * wanted + (1 - decay) * module.weight.detach()
        torch.testing.assert_close(state.ema.weight.detach(), wanted)


def test_an_average_longer_than_the_run_is_remarked_on_once_with_what_helps():
    options = {"lr": 0.1, "clip": 1.0, "global_batch_size": 1, "ema_decay": 0.9999}
    state = TrainState(torch.nn.Linear(1, 1), DistributedContext(), Optimisation(**options))
    assert "--ema-warmup" in state.ema_remark(9999) and not state.ema_remark(10_000)
    assert not TrainState(
        torch.nn.Linear(1, 1), DistributedContext(), Optimisation(**options, ema_warmup=True)
    ).ema_remark(1)


def test_non_finite_gradients_are_skipped_and_counted():
    module = torch.nn.Linear(3, 1)
    network = TrainState(
        module, DistributedContext(), Optimisation(lr=0.1, clip=1.0, ema_decay=0.5, global_batch_size=2)
    )
    module(torch.ones(2, 3)).sum().backward()
    network.step()
    before = [parameter.clone() for parameter in module.parameters()]
    for count in (1, 2):
        module(torch.full((2, 3), float("nan"))).sum().backward()
        network.step()
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
        assert network.skipped == count and network.skipped_in_a_row == count
    module(torch.ones(2, 3)).sum().backward()
    network.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    assert network.skipped == 2 and network.skipped_in_a_row == 0
    assert all(parameter.isfinite().all() for parameter in network.ema.parameters())
