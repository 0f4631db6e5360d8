"""The teacher's ODE: which points a student learns from, and trajectories that are made while training."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.teacher_ode import OnlineBatches, TeacherODE, grid_steps, pick_points
from runtime.cli import UserError
from runtime.distributed import DistributedContext
from stores import checkpoints
from stores.trajectories import TrajectoryStore


def test_grids_end_at_the_sample_and_even_ones_share_points():
    assert grid_steps(4) == [6, 12, 19, 25]
    assert grid_steps(2) == [12, 25] and grid_steps(1) == [25]
    assert grid_steps(4, "authors") == [10, 15, 20, 25]
    for steps in range(1, 26):
        grid = grid_steps(steps)
        assert len(grid) == steps and grid[-1] == 25 and grid == sorted(set(grid))
    with pytest.raises(ValueError, match="authors"):
        grid_steps(2, "authors")
    with pytest.raises(ValueError, match="no 26 student steps"):
        grid_steps(26)


def test_a_points_x0_is_predicted_from_its_state_and_the_last_is_the_sample():
    x, x0 = torch.arange(26.0).view(1, 26, 1, 1, 1), -torch.arange(25.0).view(1, 25, 1, 1, 1)
    points = pick_points(x, x0, [6, 12, 19, 25])
    assert points["xt"].flatten().tolist() == [6, 12, 19, 25]
    assert points["x0"].flatten().tolist() == [-6, -12, -19, 25]


def test_points_are_picked_without_waiting_for_the_device():
    """An index that is a list, or a tensor of the host, is copied to a GPU, which the host waits for."""

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    with Operations():
        pick_points(torch.zeros(2, 26, 1, 2, 2), torch.zeros(2, 25, 1, 2, 2), [6, 12, 19, 25])
    assert "stack" in names and not any("index" in name for name in names)


def test_impossible_steps_are_refused_and_channels_are_those_there_are(official_model):
    with pytest.raises(UserError, match="--solver-steps 2000"):
        TeacherODE(official_model, solver_steps=2000)
    with pytest.raises(UserError, match="^--cfg-channels 5: this teacher has 4, give no more$"):
        TeacherODE(official_model, cfg_channels=5)
    assert [TeacherODE(official_model, cfg_channels=n).provenance["cfg_channels"] for n in (None, 1, 4)] == [3, 1, 4]


def test_online_trajectories_are_those_of_a_dump(store, teacher_file):
    teacher, _ = checkpoints.load_teacher(teacher_file)
    opened = TrajectoryStore(store)
    order = {"global_batch_size": 8, "seed": 0, "context": DistributedContext()}
    ode = TeacherODE(teacher)
    online = OnlineBatches(teacher.latent_shape, ode.conditions, **order)
    batch = ode.complete(online[2], opened.solver_indices, "x0")
    trajectory, y = opened.read(torch.arange(16, 24).numpy(), "x0", [0, 1, 2, 3])
    assert torch.equal(batch["y"], y)
    assert ((batch["trajectory"] - trajectory).abs() / trajectory.abs().clamp(min=1)).max() < 2e-3  # fp16 on disk
