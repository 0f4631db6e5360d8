"""Flow matching equals the official codes of SiT and REPA: forward, guidance, states, x_0, loss, interval."""

import numpy as np
import pytest
import torch
from helpers import GOLDEN, arrays

from diffusion import PROCESSES, process_of
from diffusion.teacher_ode import TeacherODE
from models import DiT

SHAPE = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=4)
KINDS = {"sit": dict(num_classes=10), "repa": dict(num_classes=1000, learn_sigma=False)}


def close(ours, theirs):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def golden():
    """The official codes' inputs, weights and outputs, and our models with these weights."""
    found = {}
    for name, kind in KINDS.items():
        values = {key: torch.from_numpy(value) for key, value in arrays(GOLDEN / f"{name}_official.npz").items()}
        model = DiT(**SHAPE, **kind, process=name).eval()
        weights = {key[2:]: value for key, value in values.items() if key.startswith("w/")}
        model.load_state_dict({key: value for key, value in weights.items() if not key.startswith("projectors.")})
        found[name] = values, model
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_the_network_equals_the_official_code(golden, name):
    values, model = golden[name]
    close(model(values["x"], values["t"], values["y"])[:, :4], values["out/forward"])


@torch.no_grad()
def test_sits_guidance_equals_the_official_code(golden):
    values, model = golden["sit"]
    x, t, y = (torch.cat([values[key]] * 2) for key in ("x", "t", "y"))
    y[len(y) // 2 :] = model.num_classes
    ours = model.forward_with_cfg(x, t, y, float(values["cfg_scale"]))
    close(ours[: len(x) // 2, :4], values["out/cfg"])


def test_sits_states_equal_the_official_euler_and_converge_to_its_dopri5(golden):
    values, model = golden["sit"]
    scale = float(values["cfg_scale"])
    ode = TeacherODE(model, solver_steps=int(values["num_steps"]) - 1, cfg_scale=scale)  # 3 channels by default
    x, x0 = ode(values["z"], values["y"])
    close(x.transpose(0, 1), values["out/euler_states"])
    for k, t in enumerate(PROCESSES["sit"].grid(8)[:-1]):  # x_0 = x + (1 - t) v, where v is what the step went along
        velocity = (x[:, k + 1] - x[:, k]) * 8
        close(x0[:, k], x[:, k] + (1 - t) * velocity)
    assert torch.equal(x0[:, -1], x[:, -1])
    wanted = values["out/dopri5_states"][:4].transpose(0, 1)
    errors = []
    for steps in (40, 160):
        states, _ = TeacherODE(model, solver_steps=steps, cfg_scale=scale)(values["z"], values["y"])
        errors.append((states[:, [0, steps // 4, steps // 2, 3 * steps // 4]] - wanted).abs().max().item())
    assert errors[1] < errors[0] / 3 < 5e-3


def test_repas_samples_equal_the_official_euler_within_its_interval(golden):
    values, model = golden["repa"]
    steps, scale = int(values["num_steps"]), float(values["cfg_scale"])
    interval = float(values["guidance_low"]), float(values["guidance_high"])
    ode = TeacherODE(model, solver_steps=steps, cfg_scale=scale, guidance_interval=interval)  # all channels
    x, x0 = ode(values["z"], values["y"])
    close(x[:, -1], values["out/euler"])
    for k, t in enumerate(PROCESSES["repa"].grid(steps)[:-1]):  # x_0 = x - t v
        close(x0[:, k], x[:, k] - t * (x[:, k] - x[:, k + 1]) * steps)
    everywhere = TeacherODE(model, solver_steps=steps, cfg_scale=scale).sample(values["z"], values["y"])
    assert (everywhere - values["out/euler"]).abs().max() > 1e-2
    unguided = TeacherODE(model, solver_steps=steps, cfg_scale=1).sample(values["z"], values["y"])
    close(unguided, values["out/euler_unguided"])


@torch.no_grad()
def test_sits_loss_equals_the_official_code(golden):
    values, model = golden["sit"]
    x, t, noise = (values[key] for key in ("x", "t", "noise"))
    close(PROCESSES["sit"].training_losses(model, x, t, {"y": values["y"]}, noise)["loss"], values["out/loss"])


@torch.no_grad()
def test_repa_is_sit_backwards_in_time(golden):
    """The same velocity field, told otherwise, has the same loss and the same states."""
    values, model = golden["sit"]

    class Backwards(DiT):
        def forward(self, x, t, y):
            return -super().forward(x, 1 - t, y)

    other = Backwards(**SHAPE, **KINDS["sit"], process="repa").eval()
    other.load_state_dict(model.state_dict())
    x, t, noise, y = (values[key] for key in ("x", "t", "noise", "y"))
    sit, repa = process_of(model), process_of(other)
    close(
        repa.training_losses(other, x, 1 - t, {"y": y}, noise)["loss"],
        sit.training_losses(model, x, t, {"y": y}, noise)["loss"],
    )
    for ours, theirs in zip(repa.trajectory(other, noise, y, 8, 1.5), sit.trajectory(model, noise, y, 8, 1.5)):
        close(ours, theirs)
    close(repa.diffuse(x, repa.time(0.3), noise), sit.diffuse(x, sit.time(0.3), noise))


@pytest.mark.parametrize("name", PROCESSES)
def test_levels_and_times_run_from_noise_to_data(name):
    process = PROCESSES[name]
    levels = [process.level(t) for t in process.grid(20)[:-1]]
    assert levels == sorted(levels, reverse=True) and levels[0] >= 0.999
    assert [process.level(process.time(thousandths / 1000)) for thousandths in (100, 370, 999)] == [0.1, 0.37, 0.999]
    draw = np.random.Generator(np.random.Philox(0))
    drawn = np.array([process.level(process.draw_time(draw)) for _ in range(2000)])
    assert 0 <= drawn.min() < 0.01 and 0.99 < drawn.max() <= 1 and abs(drawn.mean() - 0.5) < 0.02
    assert process.guided_steps(20, (0.0, 1.0)) == process.guided_steps(20, None) == [True] * 20
    inside = process.guided_steps(20, (0.3, 0.7))
    assert 6 <= sum(inside) <= 9 and not inside[0] and not inside[-1]


@pytest.mark.parametrize("name", PROCESSES)
def test_outside_the_interval_the_null_half_is_not_run(name):
    torch.manual_seed(0)
    model = DiT(**SHAPE, num_classes=3, process=name).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batches = []
    model.x_embedder.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    z, y = torch.randn(2, 4, 8, 8), torch.tensor([0, 2])
    ode = TeacherODE(model, solver_steps=10, cfg_scale=2.0, guidance_interval=(0.2, 0.6))
    part = ode(z, y)[0]
    assert batches == [4 if guided else 2 for guided in ode.process.guided_steps(10, (0.2, 0.6))]
    assert 3 <= batches.count(4) <= 6 and ode.provenance["guidance_interval"] == [0.2, 0.6]
    first = batches.index(4)
    none = TeacherODE(model, solver_steps=10, cfg_scale=1)(z, y)[0]
    assert torch.equal(part[:, : first + 1], none[:, : first + 1])
    assert not torch.allclose(part[:, first + 1], none[:, first + 1])
