"""The trajectory store: its rows are the teacher's trajectories, in order, whoever wrote it and when."""

import json
import shutil

import numpy as np
import torch
from helpers import SMALL, arrays, call, flip, random_teacher, refused, save_teacher

from diffusion import PROCESSES
from diffusion.teacher_ode import grid_steps, pick_points
from runtime.distributed import DistributedContext
from runtime.randomness import Shuffle, labels, noise
from stores import checkpoints
from stores.trajectories import TrajectoryBatches, TrajectoryStore


def test_rows_are_the_teachers_trajectories(store, teacher_file):
    opened = TrajectoryStore(store)
    assert len(opened) == 50 and len(opened.shards) == 3 and opened.latent_shape == (1, 8, 8)
    rows = np.array([49, 0, 19, 20, 0, 33])  # any order, across shards, repeated
    z, y = noise(0, "trajectory", rows, (1, 8, 8)), labels(0, rows, 10)
    x, x0 = PROCESSES["ddpm"].trajectory(checkpoints.load_teacher(teacher_file)[0], z, y, 25, 1.5)
    points = pick_points(x, x0, [6, 12, 19, 25])
    for target in ("x0", "xt"):
        trajectory, stored_labels = opened.read(rows, target, opened.point_columns([6, 12, 19, 25], target))
        assert torch.equal(stored_labels, y)
        wanted = torch.cat([z[:, None], points[target]], dim=1)
        assert ((trajectory - wanted).abs() / wanted.abs().clamp(min=1)).max() < 2e-3  # fp16 on disk
    # A point's predicted x_0 is made from the state after that number of steps; the last is the sample.
    assert torch.equal(points["x0"][:, 0], x0[:, 6]) and torch.equal(points["x0"][:, 3], x[:, 25])


def test_a_teachers_relative_path_is_found_from_another_folder(teacher_file, tmp_path, monkeypatch, capsys):
    """Of a project that has moved as a whole, or is used from elsewhere; another teacher at that path is refused."""
    (tmp_path / "project/models").mkdir(parents=True)
    shutil.copy(teacher_file, tmp_path / "project/models/teacher.pt")
    monkeypatch.chdir(tmp_path / "project")
    call("sample_trajectory.py", "--teacher", "models/teacher.pt", "--out", "data/dump", "--num-trajectories", 8)
    assert TrajectoryStore("data/dump").provenance["teacher"] == "models/teacher.pt"
    monkeypatch.chdir(tmp_path)
    train = ("train_ARD.py", *SMALL, "--iterations", 2, "--run-dir", "project/runs/student")
    call(*train, "--data-path", "project/data/dump")
    student = "project/runs/student/checkpoints/0000002.pt"
    call("sample_ARD.py", "--ckpt-path", student, "--teacher-steps", 1, "--num-samples", 2, "--out", "out.npz")
    (tmp_path / "project/models/teacher.pt").unlink()
    said = refused(capsys, *train[:-1], "project/runs/other", "--data-path", "project/data/dump")
    assert "project/data/dump: records the teacher models/teacher.pt, which lies neither below" in said
    said = refused(capsys, "sample_ARD.py", "--ckpt-path", student, "--teacher-steps", 1, "--num-samples", 3)
    assert f"{student}: records the teacher models/teacher.pt" in said and "by --teacher" in said
    save_teacher(tmp_path / "project/models/teacher.pt", random_teacher())
    assert "another teacher's" in refused(capsys, *train[:-1], "project/runs/other", "--data-path", "project/data/dump")


def test_one_dump_serves_fewer_steps(store):
    opened = TrajectoryStore(store)
    assert opened.point_columns(grid_steps(2), "xt") == [1, 3] and opened.point_columns(grid_steps(1), "x0") == [3]
    rows = np.array([7, 41])
    few, _ = opened.read(rows, "xt", [1, 3])
    every, _ = opened.read(rows, "xt", [0, 1, 2, 3])
    assert torch.equal(few, every[:, [0, 2, 4]])


def test_the_batches_of_all_ranks_together_are_the_order_of_the_seed(store):
    opened = TrajectoryStore(store)

    def batch(step: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        order = {"global_batch_size": 7, "seed": 3, "context": DistributedContext(rank, world_size)}
        return TrajectoryBatches(opened, opened.solver_indices, "x0", **order)[step]

    for step in (0, 9):  # the tenth step goes over the end of the first epoch
        trajectory, y = opened.read(Shuffle(50, 3).rows(7 * step, 7 * step + 7), "x0", [0, 1, 2, 3])
        shares = [batch(step, rank, 3) for rank in range(3)]
        assert torch.equal(torch.cat([share["trajectory"] for share in shares]), trajectory)
        assert torch.equal(torch.cat([share["y"] for share in shares]), y)


def test_verify_accepts_a_whole_store_and_finds_a_flipped_bit(store, tmp_path, capsys):
    call("stores.trajectories", "verify", store)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "ok, 50 trajectories" in out
    damaged = shutil.copytree(store, tmp_path / "damaged")
    flip(damaged / "shard-00001.safetensors", -1)
    assert "checksum" in refused(capsys, "stores.trajectories", "verify", damaged)


def test_the_manifest_says_where_the_store_comes_from(store):
    provenance = json.loads((store / "manifest.json").read_text())["provenance"]
    wanted = {"teacher_hash", "teacher_weights", "vae", "solver", "solver_steps", "solver_indices", "cfg_scale"}
    assert wanted | {"cfg_channels", "dtype", "seed", "label_policy", "count"} <= provenance.keys()


def test_export_writes_the_final_samples(store, tmp_path, capsys):
    call("stores.trajectories", "export", store, "--out", tmp_path / "teacher.npz", "--num-samples", 30)
    found = arrays(tmp_path / "teacher.npz")
    assert found["arr_0"].shape == (30, 8, 8, 3) and found["arr_0"].dtype == np.uint8
    assert found["arr_1"].tolist() == [i % 10 for i in range(30)]
    last = TrajectoryStore(store).read(np.arange(30), "xt", [3])[0][:, 1, 0].numpy()
    assert np.abs(found["arr_0"] - (last * 127.5 + 127.5).clip(0, 255)[..., None]).max() <= 0.51
    error = refused(capsys, "stores.trajectories", "export", store, "--out", tmp_path / "x.npz", "--num-samples", 51)
    assert "--num-samples 51" in error and "has only 50 trajectories" in error
