"""Trainers: resume, kill -9, ranks, accumulation, non-finite steps."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, call, losses, spawn
from hypothesis import given
from hypothesis import strategies as st

from runtime.distributed import DistributedContext
from runtime.randomness import Shuffle, labels, noise
from stores import checkpoints
from trainer import TrainState


def assert_equal(a, b):
    """Two checkpoints' contents are the same to the bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_resumed_run_equals_uninterrupted_run(tmp_path, store):
    options = ("--data-path", store, *SMALL)
    call("train_ARD.py", *options, "--run-dir", tmp_path / "whole", "--iterations", 6)
    call("train_ARD.py", *options, "--run-dir", tmp_path / "parts", "--iterations", 3)
    call("train_ARD.py", *options, "--run-dir", tmp_path / "parts", "--iterations", 6)
    whole, parts = (checkpoints.load(tmp_path / run / "checkpoints/0000006.pt", "") for run in ("whole", "parts"))
    assert_equal(whole, parts)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert set(whole) == {"config", "step", "model", "ema", "opt"}


def test_teacher_training_resumes_to_the_bit(tmp_path):
    options = ("--model", "DiT-Nano/2", "--data-path", "digits", *SMALL[2:])
    call("train.py", *options, "--run-dir", tmp_path / "whole", "--iterations", 4)
    call("train.py", *options, "--run-dir", tmp_path / "parts", "--iterations", 2)
    call("train.py", *options, "--run-dir", tmp_path / "parts", "--iterations", 4)
    whole, parts = (checkpoints.load(tmp_path / run / "checkpoints/0000004.pt", "") for run in ("whole", "parts"))
    assert_equal(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("blow, every", [(signal.SIGKILL, 5), (signal.SIGTERM, 1000)])
def test_killed_run_continues_by_the_same_command(tmp_path, store, blow, every):
    options = ["--data-path", store, *SMALL, "--snapshot-every", every, "--num-workers", 1]
    runs = tmp_path / "runs"
    command = [ROOT / "train_ARD.py", *options, "--results-dir", runs, "--iterations", 4000]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 0000007"):
            break
    os.kill(process.pid, blow)
    process.communicate()
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 1}[blow]
    snapshot = runs / "000-DiT-Nano-2/checkpoints/latest.pt"
    stopped_at = checkpoints.load(snapshot, "")["step"]
    assert 5 <= stopped_at < 4000
    last = stopped_at + 5
    for folder in (("--results-dir", runs), ("--run-dir", tmp_path / "whole")):
        call("train_ARD.py", *options, *folder, "--iterations", last)
    resumed = checkpoints.load(runs / f"000-DiT-Nano-2/checkpoints/{last:07d}.pt", "")
    assert_equal(resumed, checkpoints.load(tmp_path / f"whole/checkpoints/{last:07d}.pt", ""))
    assert not snapshot.exists() and len(list(runs.iterdir())) == 1


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


def test_non_finite_gradients_are_skipped_and_counted():
    module = torch.nn.Linear(3, 1)
    network = TrainState(module, DistributedContext(), lr=0.1, clip=1.0, ema_decay=0.5, global_batch_size=2)
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


def test_run_that_no_longer_trains_stops_with_a_sentence(tmp_path, store, capsys):
    with pytest.raises(SystemExit) as stop:
        call("train_ARD.py", "--data-path", store, *SMALL[:-1], 1e38, "--iterations", 50, "--max-bad-steps", 3,
             "--run-dir", tmp_path / "run")  # fmt: skip
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "non-finite" in error and error.count("\n") == 1


@given(count=st.integers(1, 50), seed=st.integers(0, 2**32), epochs=st.integers(1, 3), batch=st.integers(1, 70))
def test_every_epoch_has_every_row_once(count, seed, epochs, batch):
    shuffle, total = Shuffle(count, seed), count * epochs
    rows = np.concatenate([shuffle.rows(i, min(i + batch, total)) for i in range(0, total, batch)])
    assert (np.sort(rows.reshape(epochs, count), axis=1) == np.arange(count)).all()
    middle = total // 2  # a resumed order is the same order
    assert (Shuffle(count, seed).rows(middle, total) == rows[middle:]).all()


@given(seed=st.integers(0, 2**32), indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_noise_and_labels_depend_on_seed_and_index_alone(seed, indices):
    together = noise(seed, "sample", indices, (1, 2, 2))
    apart = torch.cat([noise(seed, "sample", [i], (1, 2, 2)) for i in indices])
    assert torch.equal(together, apart)
    assert not torch.equal(together, noise(seed + 1, "sample", indices, (1, 2, 2)))
    assert not torch.equal(together, noise(seed, "trajectory", indices, (1, 2, 2)))
    random = labels(seed, indices, 7, "random")
    assert random.tolist() == [labels(seed, [i], 7, "random").item() for i in indices]


def test_balanced_labels_are_balanced():
    assert torch.bincount(labels(0, range(70), 7)).tolist() == [10] * 7
    assert labels(3, range(4), 0).tolist() == [0, 0, 0, 0]
