"""The trajectory store and its dump."""

import json

import numpy as np
import pytest
import torch
from conftest import call, spawn

from diffusion import create_diffusion
from diffusion.teacher_ode import grid_steps, pick_points
from runtime.randomness import labels, noise
from stores import checkpoints
from stores.trajectories import TrajectoryStore


def test_grids():
    assert grid_steps(4) == [6, 12, 19, 25]
    assert grid_steps(2) == [12, 25] and grid_steps(1) == [25]
    assert grid_steps(4, "authors") == [10, 15, 20, 25]
    for steps in range(1, 26):
        grid = grid_steps(steps)
        assert len(grid) == steps and grid[-1] == 25 and grid == sorted(set(grid))
    with pytest.raises(ValueError, match="authors"):
        grid_steps(2, "authors")
    with pytest.raises(ValueError):
        grid_steps(26)


def test_rows_are_the_teachers_trajectories(store, teacher_file):
    opened = TrajectoryStore(store)
    assert len(opened) == 50 and len(opened.shards) == 3 and opened.latent_shape == (1, 8, 8)
    rows = np.array([49, 0, 19, 20, 0, 33])  # any order, across shards, repeated
    z, y = noise(0, "trajectory", rows, (1, 8, 8)), labels(0, rows, 10)
    x, x0 = create_diffusion("25").ddim_trajectory(checkpoints.load_teacher(teacher_file)[0], z, y, 1.5)
    points = pick_points(x, x0, [6, 12, 19, 25])
    for target in ("x0", "xt"):
        trajectory, stored_labels = opened.read(rows, target, opened.point_columns([6, 12, 19, 25], target))
        assert torch.equal(stored_labels, y)
        wanted = torch.cat([z[:, None], points[target]], dim=1)
        assert ((trajectory - wanted).abs() / wanted.abs().clamp(min=1)).max() < 2e-3  # fp16 on disk
    # What a point's predicted x_0 is: made from the state after that many steps; the last is the sample.
    assert torch.equal(points["x0"][:, 0], x0[:, 6]) and torch.equal(points["x0"][:, 3], x[:, 25])


def test_one_dump_serves_fewer_steps(store):
    opened = TrajectoryStore(store)
    assert opened.point_columns(grid_steps(2), "xt") == [1, 3] and opened.point_columns(grid_steps(1), "x0") == [3]


def test_interrupted_dump_continues_with_the_same_bytes(tmp_path, teacher_file, store):
    folder = tmp_path / "again"
    command = ("sample_trajectory.py", "--teacher", teacher_file, "--out", folder, "--num-trajectories", 50,
               "--rows-per-shard", 20, "--per-proc-batch-size", 16)  # fmt: skip
    call(*command)
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "shard-00001.safetensors").unlink()
    (folder / "manifest.json").unlink()
    (folder / "shard-00001.safetensors.partial").write_bytes(b"half a shard")
    call(*command)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted


@pytest.mark.slow
def test_ranks_do_not_change_the_store(tmp_path, teacher_file, store):
    done = spawn("sample_trajectory.py", "--teacher", teacher_file, "--out", tmp_path / "two", "--num-trajectories", 50,
                 "--rows-per-shard", 20, "--per-proc-batch-size", 16, ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = TrajectoryStore(store), TrajectoryStore(tmp_path / "two")
    for a, b in zip(one.tensors, two.tensors):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stored", ["x0", "xt"])
def test_one_of_the_two_quantities_can_be_left_out(tmp_path, teacher_file, stored, capsys):
    folder = tmp_path / "store"
    call("sample_trajectory.py", "--teacher", teacher_file, "--out", folder, "--num-trajectories", 5, "--store", stored)
    other = {"x0": "xt", "xt": "x0"}[stored]
    with pytest.raises(SystemExit) as stop:
        call("train_ARD.py", "--data-path", folder, "--stack", 2, "--target", other, "--run-dir", tmp_path / "run")
    assert stop.value.code == 2 and f"--target {other}" in capsys.readouterr().err


def test_verify(store, tmp_path, capsys):
    call("stores.trajectories", "verify", store)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "ok, 50 trajectories" in out
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in store.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    shard = damaged / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        call("stores.trajectories", "verify", damaged)
    assert stop.value.code == 2 and "checksum" in capsys.readouterr().err


def test_manifest_says_where_it_comes_from(store):
    provenance = json.loads((store / "manifest.json").read_text())["provenance"]
    wanted = {"teacher_hash", "teacher_weights", "vae", "solver", "solver_steps", "solver_indices", "cfg_scale"}
    assert wanted | {"cfg_channels", "dtype", "seed", "label_policy", "count"} <= provenance.keys()


def test_export_writes_the_final_samples(store, tmp_path):
    call("stores.trajectories", "export", store, "--out", tmp_path / "teacher.npz", "--num-samples", 30)
    with np.load(tmp_path / "teacher.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (30, 8, 8, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [i % 10 for i in range(30)]
