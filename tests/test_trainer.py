"""The loop that all trainers share: resume, kill -9, ranks, accumulation, non-finite steps.

train_ARD.py and its fellows on digits: resumed, killed, finished; snapshots; data workers and reading ahead;
ranks, accumulation and uneven shares; a run that diverges.
"""

import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch
from helpers import SMALL, assert_equal, call, checkpoint, losses, scalars, spawn, start

import encode_latents
import train
from diffusion.teacher_ode import OnlineBatches, TeacherODE
from runtime.distributed import DistributedContext
from stores import checkpoints
from stores.images import open_source
from stores.runs import RunFolder
from stores.trajectories import TrajectoryBatches, TrajectoryStore
from train_ARD_gan import GanBatches
from trainer import Optimisation, RunOptions, Trainer


@pytest.mark.parametrize("more", [(), ("--ema-warmup",)], ids=["plain", "warm average"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, store, capsys, more):
    options = ("--data-path", store, *SMALL, *more)
    call("train_ARD.py", *options, "--run-dir", tmp_path / "whole", "--iterations", 6)
    call("train_ARD.py", *options, "--run-dir", tmp_path / "parts", "--iterations", 3)
    call("train_ARD.py", *options, "--run-dir", tmp_path / "parts", "--iterations", 6)
    whole, parts = checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "parts", 6)
    assert_equal(whole, parts)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert set(whole) == {"config", "step", "model", "ema", "opt"}
    assert whole["config"]["training"]["ema_warmup"] is bool(more)
    assert capsys.readouterr().out.count("give --ema-warmup") == (0 if more else 3)  # once in each of the runs


def test_a_finished_run_is_left_alone(tmp_path, store, capsys):
    command = ("train_ARD.py", "--data-path", store, *SMALL, "--run-dir", tmp_path / "run", "--iterations", 2)
    call(*command)
    before = (tmp_path / "run/checkpoints/0000002.pt").read_bytes()
    call(*command)
    assert "already at step 2, nothing to do" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints/0000002.pt").read_bytes() == before and len(losses(tmp_path / "run")) == 2


def test_snapshots_previews_and_kept_checkpoints_come_when_they_are_due(tmp_path, store):
    call("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 7, "--ckpt-every", 5, "--snapshot-every", 2,
         "--sample-every", 3, "--log-every", 4, "--run-dir", tmp_path)  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0000005.pt", "0000007.pt"]
    assert sorted(path.stem for path in (tmp_path / "samples").iterdir()) == ["0000003", "0000006", "0000007"]
    assert len(scalars(tmp_path)) == 2


@pytest.mark.parametrize("minutes, every, steps", [(0, 0, set()), (1e-9, 0, {1, 2, 3}), (60, 2, {2})])
def test_snapshots_come_by_minutes_and_by_steps(tmp_path, store, monkeypatch, minutes, every, steps):
    saved, save = [], RunFolder.save

    def noted(run, step, state, *, kept, last=False) -> None:
        saved.extend([] if kept else [step])
        save(run, step, state, kept=kept, last=last)

    monkeypatch.setattr(RunFolder, "save", noted)
    monkeypatch.setattr("runtime.files.WriteBehind.busy", False)  # the last one is on disk already
    call("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 4, "--snapshot-minutes", minutes,
         "--snapshot-every", every, "--run-dir", tmp_path)  # fmt: skip
    assert set(saved) == steps and [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000004.pt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "blow, every, code",
    [
        (signal.SIGKILL, 5, -9),
        (signal.SIGTERM, 1000, 1),
        (signal.SIGINT, 1000, 130),
        (signal.SIGHUP, 1000, 1),
        (signal.SIGUSR1, 1000, 1),
        (signal.SIGXCPU, 1000, 1),
    ],
)
def test_a_killed_run_is_continued_by_the_same_command(tmp_path, store, blow, every, code):
    options = ["--data-path", store, *SMALL, "--snapshot-every", every, "--num-workers", 1]
    runs = tmp_path / "runs"
    process = start("train_ARD.py", *options, "--results-dir", runs, "--iterations", 4000)
    for line in process.stdout:
        if line.startswith("step 0000007"):
            break
    snapshot, deadline = runs / "000-DiT-Nano-2/checkpoints/latest.pt", time.monotonic() + 60
    while blow == signal.SIGKILL and not snapshot.exists() and time.monotonic() < deadline:
        time.sleep(0.01)  # it is written in the background
    os.kill(process.pid, blow)
    process.communicate()
    assert process.returncode == code
    stopped_at = checkpoints.load(snapshot, "")["step"]
    assert 5 <= stopped_at < 4000
    last = stopped_at + 5
    for folder in (("--results-dir", runs), ("--run-dir", tmp_path / "whole")):
        call("train_ARD.py", *options, *folder, "--iterations", last)
    assert_equal(checkpoint(runs / "000-DiT-Nano-2", last), checkpoint(tmp_path / "whole", last))
    assert not snapshot.exists() and len(list(runs.iterdir())) == 1


def test_every_data_set_gives_a_data_worker_the_same_items(store, image_folder, teacher_file):
    """Spawned workers, and those of a fork server, get it pickled; forked ones as it is. No model goes along."""
    teacher, context = checkpoints.load_teacher(teacher_file)[0], DistributedContext(1, 2)
    order = {"global_batch_size": 6, "seed": 3, "context": context}
    trajectories = TrajectoryBatches(TrajectoryStore(store), [6, 12, 19, 25], "x0", **order)
    digits, images = open_source("digits"), open_source(str(image_folder), 8)
    options = {"label_dropout": 0.5, "hflip": True}
    for batches, item in (
        (trajectories, 2),
        (OnlineBatches(teacher.latent_shape, TeacherODE(teacher).conditions, **order), 2),
        (GanBatches(trajectories, digits, (1, 8, 8), hflip=True, seed=3, d_time=5), 2),
        (train.TeacherBatches(digits, (1, 8, 8), **order, **options), 2),
        (train.TeacherBatches(images, (3, 8, 8), **order, **options), 2),
        (encode_latents.ImageBatches(images), (1, 4)),
    ):
        pickled = pickle.dumps(batches)
        assert_equal(pickle.loads(pickled)[item], batches[item])
        assert len(pickled) < 2**20 and b"embedder" not in pickled


def test_data_are_read_ahead_for_a_gpu_unless_told_otherwise(tmp_path):
    def workers(device: str, **given) -> int:
        context, run = DistributedContext(device=torch.device(device)), RunOptions(run_dir=str(tmp_path), **given)
        trainer = Trainer(context, {"model": {}}, {}, Optimisation(), run)
        trainer.folder.release()
        return trainer.num_workers

    assert [workers("cpu"), workers("cuda"), workers("cuda", num_workers=0), workers("cpu", num_workers=2)] == [
        0,
        4,
        0,
        2,
    ]


@pytest.mark.slow
def test_two_ranks_and_accumulation_give_the_losses_of_one(tmp_path, store):
    options = ("--data-path", store, *SMALL, "--iterations", 20)
    call("train_ARD.py", *options, "--run-dir", tmp_path / "one")
    call("train_ARD.py", *options, "--run-dir", tmp_path / "three", "--accumulation", 3)  # 8 = 3 + 3 + 2
    done = spawn("train_ARD.py", *options, "--run-dir", tmp_path / "two", "--device", "cpu", ranks=2)
    assert done.returncode == 0, done.stderr
    one = losses(tmp_path / "one")
    assert len(one) == 20 and min(one) < one[0]
    np.testing.assert_allclose(losses(tmp_path / "two"), one, atol=1e-4)
    np.testing.assert_allclose(losses(tmp_path / "three"), one, atol=1e-4)


@pytest.mark.slow
def test_uneven_shares_of_a_batch_are_weighted_right(tmp_path, store):
    options = ("--data-path", store, *SMALL, "--global-batch-size", 7, "--iterations", 3)
    call("train_ARD.py", *options, "--run-dir", tmp_path / "one")
    done = spawn("train_ARD.py", *options, "--run-dir", tmp_path / "two", ranks=2)
    assert "3 or 4 on each of 2 x cpu" in done.stdout, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-4)


def test_a_run_that_no_longer_trains_stops_with_a_sentence(tmp_path, store, capsys):
    with pytest.raises(SystemExit) as stop:
        call("train_ARD.py", "--data-path", store, *SMALL[:-1], 1e38, "--iterations", 50, "--max-bad-steps", 3,
             "--run-dir", tmp_path / "run")  # fmt: skip
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "non-finite" in error and error.count("\n") == 1
