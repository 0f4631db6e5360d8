"""Presets set options that exist, to the paper's values; online trajectories are those that a dump would store."""

import importlib
import json

import pytest
import torch
from conftest import SMALL, call

from diffusion.teacher_ode import OnlineBatches, TeacherODE
from presets import TABLE_1, preset
from runtime.distributed import DistributedContext
from stores import checkpoints
from stores.trajectories import TrajectoryStore

SCRIPTS = ("sample.py", "sample_trajectory.py", "train_ARD.py", "train_ARD_gan.py", "sample_ARD.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_presets_set_options_that_exist_to_values_that_they_take(script):
    parser = importlib.import_module(script.removesuffix(".py")).build_parser()
    actions = {action.dest: action for action in parser._actions}
    for name, values in preset(script).items():
        assert name in TABLE_1 and values.keys() <= actions.keys()
        for option, value in values.items():
            assert actions[option].choices is None or value in actions[option].choices
            assert actions[option].type is None or actions[option].type(str(value)) == value


def test_every_row_can_be_reproduced():
    for name, row in TABLE_1.items():
        for script in ("sample.py",) if row.mask is None else ("sample_trajectory.py", "train_ARD.py", "sample_ARD.py"):
            assert name in preset(script), (name, script)
        assert (row.loss == "R+D") == (name in preset("train_ARD_gan.py"))


def test_a_preset_is_the_default_and_options_override_it(store, tmp_path, capsys):
    command = ("train_ARD.py", "--data-path", store, "--preset", "ard-n6-m2-s4", "--model", "DiT-Nano/2", "--stack", 2)
    call(*command, "--run-dir", tmp_path / "run", "--dry-run")
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"]["mask"] == "M2" and plan["model"]["history_layers"] == 2
    assert plan["iterations"] == plan["options"]["iterations"] == 300_000 and plan["training"]["ema_decay"] == 0.9999
    with pytest.raises(SystemExit) as stop:
        call(*command[:4], "ard-n7", "--dry-run")
    assert stop.value.code == 2 and "ard-n7" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_preset_can_be_looked_at_without_weights_and_data(script, capsys):
    for name, values in preset(script).items():
        call(script, "--preset", name, "--dry-run")
        plan = json.loads(capsys.readouterr().out)
        assert values.items() <= plan["options"].items() and plan["not_checked"]
        assert ("flops_over_regression" in plan) == (script == "train_ARD_gan.py")


def test_a_preset_that_an_override_makes_impossible_is_still_shown(capsys):
    call("train_ARD_gan.py", "--preset", "ard-n6-m4-s4-gan", "--model", "DiT-Nano/2", "--dry-run")
    assert "history layers 6" in json.loads(capsys.readouterr().out)["not_counted"]


def test_online_trajectories_are_those_of_a_dump(store, teacher_file):
    teacher, _ = checkpoints.load_teacher(teacher_file)
    opened = TrajectoryStore(store)
    order = {"global_batch_size": 8, "seed": 0, "context": DistributedContext()}
    online = OnlineBatches(TeacherODE(teacher), opened.solver_indices, "x0", **order)
    batch = online.complete(online[2])
    trajectory, y = opened.read(torch.arange(16, 24).numpy(), "x0", [0, 1, 2, 3])
    assert torch.equal(batch["y"], y)
    assert ((batch["trajectory"] - trajectory).abs() / trajectory.abs().clamp(min=1)).max() < 2e-3  # fp16 on disk


def test_training_online_needs_no_store(teacher_file, tmp_path, capsys):
    call(
        "train_ARD.py", "--online", "--teacher", teacher_file, *SMALL, "--iterations", 2, "--run-dir", tmp_path / "run"
    )
    assert checkpoints.load(tmp_path / "run/checkpoints/0000002.pt", "")["config"]["provenance"]["online"] is True
    for wrong in (("--online",), ("--online", "--data-path", tmp_path), ("--teacher", teacher_file)):
        with pytest.raises(SystemExit) as stop:
            call("train_ARD.py", *wrong, "--run-dir", tmp_path / "other")
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
