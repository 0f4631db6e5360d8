"""Work that breaks off on some ranks and goes on with others: 2, then 1, then 2 again, killed in between."""

import numpy as np
import pytest
import torch
from helpers import SMALL, arrays, call, call_on_ranks, checkpoint, contents, gan_options, losses
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.distributed import DistributedContext
from stores.trajectories import TrajectoryBatches, TrajectoryStore


@settings(max_examples=20, deadline=None)
@given(ranks=st.lists(st.integers(1, 4), min_size=21, max_size=21))
def test_each_trajectory_is_used_once_in_an_epoch_whatever_the_ranks(store, ranks):
    """Step n has ``ranks[n]`` ranks; two epochs of 50 trajectories and a part of a third, in batches of 5."""
    opened, used = TrajectoryStore(store), []
    row_of = {noise.tobytes(): row for row, noise in enumerate(np.concatenate([a["noise"] for a in opened.arrays]))}
    for step, count in enumerate(ranks):
        for rank in range(count):
            order = {"global_batch_size": 5, "seed": 1, "context": DistributedContext(rank, count)}
            batch = TrajectoryBatches(opened, [6, 12, 19, 25], "x0", **order)[step]
            used += [row_of[noise.half().numpy().tobytes()] for noise in batch["trajectory"][:, 0]]
    assert sorted(used[:50]) == sorted(used[50:100]) == list(range(50)) and len(used) == 105
    assert used[:50] != used[50:100]


@pytest.mark.slow
def test_a_dump_by_2_then_1_then_2_ranks_is_that_of_one_to_the_bit(teacher_file, tmp_path):
    command = ("sample_trajectory.py", "--teacher", teacher_file, "--num-trajectories", 50, "--rows-per-shard", 5,
               "--per-proc-batch-size", 3, "--solver-steps", 5, "--out")  # fmt: skip
    call(*command, tmp_path / "one")
    parts = (*command, tmp_path / "parts")
    codes = call_on_ranks(2, *parts, kill="shard-00002.safetensors.partial")
    assert -9 in codes and 0 not in codes and not (tmp_path / "parts/shard-00002.safetensors").exists()
    assert call_on_ranks(1, *parts, kill="shard-00006.safetensors.partial") == [-9]
    assert (tmp_path / "parts/shard-00002.safetensors").exists() and not (tmp_path / "parts/manifest.json").exists()
    assert call_on_ranks(2, *parts) == [0, 0]
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")


@pytest.mark.slow
def test_samples_by_2_then_1_then_2_ranks_are_those_of_one(student_file, tmp_path):
    """Their batches are others, and so is the rounding; nothing is left out, and nothing is left over."""
    command = ("sample_ARD.py", "--ckpt-path", student_file, "--num-samples", 60, "--per-proc-batch-size", 5,
               "--save-latents", "--out")  # fmt: skip
    call(*command, tmp_path / "one.npz")
    parts = (*command, tmp_path / "parts.npz")
    codes = call_on_ranks(2, *parts, kill="00000040-00000045.npz.partial")  # the second rank's third
    assert codes[1] == -9 and codes[0] != 0
    assert call_on_ranks(1, *parts, kill="00000045-00000050.npz.partial") == [-9]
    assert call_on_ranks(2, *parts) == [0, 0]
    one, found = arrays(tmp_path / "one.npz"), arrays(tmp_path / "parts.npz")
    assert (one["arr_1"] == found["arr_1"]).all() and str(one["provenance"]) == str(found["provenance"])
    np.testing.assert_allclose(found["latents"], one["latents"], rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "one.png", "parts.npz", "parts.png"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["R", "R+D"])
def test_a_training_by_2_then_1_then_2_ranks_is_that_of_one_up_to_rounding(loss, store, student_file, tmp_path):
    regression = ("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 12)
    adversarial = ("train_ARD_gan.py", *gan_options(store, student_file, iterations=12))
    command = {"R": regression, "R+D": adversarial}[loss]
    parts = (*command, "--ckpt-every", 4, "--run-dir", tmp_path / "parts")
    call(*command, "--run-dir", tmp_path / "one")
    codes = call_on_ranks(2, *parts, kill="0000008.pt.partial")
    assert codes[0] == -9 and codes[1] != 0
    assert call_on_ranks(1, *parts, kill="0000012.pt.partial") == [-9]
    assert call_on_ranks(2, *parts) == [0, 0]
    wanted, found = checkpoint(tmp_path / "one", 12), checkpoint(tmp_path / "parts", 12)
    for name, value in wanted["model"].items():
        torch.testing.assert_close(found["model"][name], value, rtol=1e-2, atol=1e-3)
    last = {line[1]: line for line in map(str.split, (tmp_path / "parts/log.txt").read_text().splitlines())}
    mine = [float(last[f"{step:07d}"][3]) for step in range(1, 13)]  # of each step the line that was logged last
    np.testing.assert_allclose(mine, losses(tmp_path / "one"), rtol=1e-3, atol=1e-4)
    assert not (tmp_path / "parts/checkpoints/latest.pt").exists() and not (tmp_path / "parts/.lock").exists()
