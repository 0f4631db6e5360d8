"""Plans say what a run then writes, are the same in every script, and need neither network nor ranks.

First bytes: a plan's disk against what is then written; then what is not fetched, ranks that are not there, and room.
Last the short cuts: few blocks counted for many, the outline of an autoencoder, the size of a checkpoint.
"""

import json
import re
import socket
import types
from pathlib import Path

import pytest
import torch
from helpers import SMALL, call, random_teacher, save_teacher

from costs.commands import plan_command
from costs.flops import count_by_blocks, meta_model, sampling_gflops, training_flops
from costs.memory import Execution, training_memory
from models_ard import ARD
from models_pixart import named_shape
from runtime.cli import ShortageError
from runtime.distributed import DistributedContext
from runtime.vae import VAE, outline_vae
from stores import checkpoints
from stores.runs import run_bytes

SHAPE = {"disk_bytes", "memory_bytes_per_rank", "steps", "epochs", "flops", "fetch", "options"}


@pytest.fixture
def no_network(monkeypatch):
    """Whoever opens a connection fails."""

    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def plan_of(capsys, script: str, *options) -> dict:
    """What a dry run prints."""
    capsys.readouterr()
    call(script, *options, "--dry-run")
    return json.loads(capsys.readouterr().out)


def written(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def test_a_dump_and_samples_take_the_bytes_that_were_planned(teacher_file, tmp_path, capsys):
    dump = ("sample_trajectory.py", "--teacher", teacher_file, "--out", tmp_path / "s", "--num-trajectories", 500)
    plan = plan_of(capsys, *dump)
    assert plan.keys() >= SHAPE and plan["steps"] == 2 and plan["fetch"] == [] and not list(tmp_path.iterdir())
    call(*dump)
    assert plan["disk_bytes"] == pytest.approx(written(tmp_path / "s", "*.safetensors"), rel=0.01)
    sample = ("sample.py", "--teacher", teacher_file, "--out", tmp_path / "s.npz", "--num-samples", 300,
              "--solver-steps", 3, "--save-latents", "--class-labels", "3")  # fmt: skip
    plan = plan_of(capsys, *sample)
    call(*sample)
    assert plan.keys() >= SHAPE and plan["steps"] == 5
    assert plan["disk_bytes"] == pytest.approx(2 * (tmp_path / "s.npz").stat().st_size, rel=0.02)


def test_a_training_run_is_planned_by_its_checkpoints(store, tmp_path, capsys):
    train = ("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 5, "--ckpt-every", 2)
    plan = plan_of(capsys, *train, "--results-dir", tmp_path)
    assert plan.keys() >= SHAPE and plan["steps"] == 5 and plan["epochs"] == 5 * 8 / 50
    assert plan["run_dir"] == f"{tmp_path}/000-DiT-Nano-2" and not list(tmp_path.iterdir())
    call(*train, "--results-dir", tmp_path)
    kept = written(tmp_path / "000-DiT-Nano-2/checkpoints")
    assert plan["disk_bytes"] == pytest.approx(kept * 4 / 3, rel=0.15)  # three, and room for one more; headers
    assert sum(plan["memory_bytes_per_rank"].values()) == 2 * plan["memory_bytes_per_rank"]["total"]
    assert [run_bytes(10, *case) for case in ((100, 10, 0), (101, 10, 0), (100, 10, 3), (5, 10, 3))] == [
        110,
        120,
        40,
        20,
    ]


@pytest.mark.parametrize("name, side", [("DiT-XL-2-512x512.pt", 64), ("facebook/DiT-XL-2-256", 32)])
def test_nothing_is_fetched_for_a_plan(name, side, no_network, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    plan = plan_of(
        capsys, "sample_trajectory.py", "--teacher", name, "--out", tmp_path / "s", "--num-trajectories", 1e4
    )
    assert plan["not_checked"].startswith(f"--teacher {name}: ") and "would be fetched from" in plan["not_checked"]
    assert plan["disk_bytes"] == 10_000 * (4 * side * side * (1 + 2 * 4) * 2 + 8) and not list(tmp_path.iterdir())
    plan = plan_of(capsys, "train.py", "--model", "DiT-Nano/2", "--data-path", "digits", "--run-dir", tmp_path / "run")
    assert plan["fetch"] == [] and not list(tmp_path.iterdir())


def test_a_public_autoencoder_is_planned_with_and_not_fetched(no_network, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = ("--data-path", image_folder, "--image-size", 64, "--out", tmp_path / "out")
    plan = plan_of(capsys, "encode_latents.py", *options)
    assert plan["fetch"] == ["stabilityai/sd-vae-ft-ema"] and plan["latent_shape"] == [4, 8, 8]
    plan = plan_of(capsys, "encode_latents.py", *options, "--vae", "someone/else")
    assert plan["not_checked"] == "--vae someone/else: would be fetched from the Hugging Face hub"
    assert not list(tmp_path.iterdir())


def test_a_plan_is_that_of_a_rank_among_many_without_them(store, teacher_file, tmp_path, monkeypatch, capsys):
    commands = [
        ("train_ARD.py", "--data-path", store, *SMALL, "--run-dir", tmp_path / "run", "--iterations", 9),
        ("sample_trajectory.py", "--teacher", teacher_file, "--out", tmp_path / "s", "--num-trajectories", 1000,
         "--per-proc-batch-size", 10),
    ]  # fmt: skip
    alone = [plan_of(capsys, *command) for command in commands]
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = [plan_of(capsys, *command) for command in commands]
    assert [plan["steps"] for plan in alone] == [9, 100] and [plan["steps"] for plan in shared] == [9, 25]
    batches = [plan[0]["memory_bytes_per_rank"]["batch"] for plan in (alone, shared)]
    assert batches[0] == 4 * batches[1] and alone[0]["flops"] == shared[0]["flops"]
    assert "2 on each of 4" in shared[0]["ranks"]


def test_a_preset_without_weights_is_planned_for_a_rank_among_many(monkeypatch, capsys):
    commands = [("train_ARD.py", "--preset", "ard-n6-m4-s4"), ("sample_trajectory.py", "--preset", "ard-n6-m4-s4")]
    alone = [plan_of(capsys, *command) for command in commands]
    monkeypatch.setenv("WORLD_SIZE", "8")
    shared = [plan_of(capsys, *command) for command in commands]
    batches = [plan[0]["memory_bytes_per_rank"]["batch"] for plan in (alone, shared)]
    assert batches[0] == 8 * batches[1] and alone[1]["steps"] == 8 * shared[1]["steps"] == 10_000


def test_what_does_not_fit_is_counted_by_a_dry_run_all_the_same(teacher_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        call("sample_trajectory.py", "--teacher", teacher_file, "--out", tmp_path / "s", "--num-trajectories", "1e12",
             "--dry-run")  # fmt: skip
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and json.loads(out)["disk_bytes"] == 1160 * 10**12
    assert "--num-trajectories 1000000000000: 1.16 PB are to be written" in error


def test_what_is_there_already_needs_no_room(store, tmp_path):
    from costs.plans import Plan

    there = written(store)
    Plan("--out x", "--batch 1", there + 1000, {}, 1).check(store, torch.device("cpu"))
    with pytest.raises(Exception, match="--out x: 1 PB are to be written"):
        Plan("--out x", "--batch 1", there + 10**15, {}, 1).check(store, torch.device("cpu"))


@pytest.mark.parametrize("mask, layers", [("M4", 2), ("M2", 3), ("M1", 0)])
def test_few_blocks_count_for_many(mask, layers):
    student = ARD.from_teacher(random_teacher(), 4, mask, layers)
    for config, count in (
        (student.config, training_flops),
        (student.config, lambda model: sampling_gflops(model, 4)),
        (random_teacher().config, lambda model: sampling_gflops(model, 3)),
    ):
        assert count_by_blocks(config, count) == pytest.approx(count(meta_model(config)), rel=1e-12)


def test_the_outline_of_an_autoencoder_is_the_autoencoders(autoencoder):
    found, real = outline_vae(str(autoencoder)), VAE(str(autoencoder), torch.device("cpu"))
    for name in ("name", "scale", "factor", "channels", "image_channels"):
        assert getattr(found, name) == getattr(real, name), name
    assert found.weights_bytes == pytest.approx(checkpoints.weights_bytes(real.model), rel=0.3)
    assert outline_vae(None).weights_bytes == 0 and outline_vae("none").factor == 1


def test_a_teacher_in_a_checkpoint_is_weighed(tmp_path):
    teacher = random_teacher()
    size = save_teacher(tmp_path / "t.pt", teacher).stat().st_size
    assert checkpoints.weights_bytes(teacher) == pytest.approx(size, rel=0.2)
    trained = sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    assert checkpoints.moments_bytes(teacher) == 8 * trained


def test_memory_that_lacks_is_refused_with_the_options_that_make_it_fit(monkeypatch, capsys):
    """On a card that is known, before anything is loaded. Where it may just do, that is said and the run goes on."""
    teacher = named_shape("DiT-XL/2")
    options = {"global_batch_size": 64, "accumulation": 1, "iterations": 10, "ckpt_every": 10, "keep": 0}
    options |= {"precision": "bf16", "compile": False, "checkpoint_activations": False, "online": False}
    options |= {"bn_group": 6, "d_time": 0, "d_width": None, "rollout": False}

    def said(script: str, card: float, **changes) -> str:
        about = types.SimpleNamespace(total_memory=int(card * 1e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
        student = teacher | {"steps": 4, "mask": "M4", "history_layers": 6}
        plan = plan_command(script, student, options | changes, DistributedContext(), teacher=teacher)
        try:
            plan.check("results", torch.device("cuda"))
        except ShortageError as error:
            return str(error)
        return capsys.readouterr().err

    sentence = said("train_ARD.py", 80)
    assert sentence.startswith(
        "--global-batch-size 64, with this model: at least 102 GB of memory are needed, the GPU has"
    )
    assert re.search(r"; --accumulation 2 needs \d\d\.\d GB, --checkpoint-activations needs \d\d\.\d GB$", sentence)
    assert "--accumulation" not in said("train_ARD.py", 24, checkpoint_activations=True, global_batch_size=1)
    assert said("train_ARD.py", 20).endswith(", --checkpoint-activations --accumulation 4 needs 17 GB")
    assert re.search(r"about \d+ GB of memory, the GPU has 120 GB; --accumulation 2 needs", said("train_ARD.py", 120))
    assert said("train_ARD.py", 200) == ""
    parts = said("train_ARD_gan.py", 60, global_batch_size=36)  # groups of 6 samples stay whole: 2 parts and no 4
    assert re.search(r"--accumulation 2 needs", parts) is None and "--checkpoint-activations" in parts


@pytest.mark.parametrize("way", [{}, {"compile": True}, {"precision": "fp32"}], ids=str)
def test_memory_shrinks_by_what_is_given_to_shrink_it(way):
    teacher = named_shape("DiT-XL/2")
    student = meta_model(teacher | {"steps": 4, "mask": "M4", "history_layers": 6})

    def needed(samples: int, alone: bool = True, accumulation: int = 1, **changes) -> int:
        how = Execution(**{"precision": "bf16"} | way | changes)
        return sum(training_memory(student, how, samples, alone=alone, accumulation=accumulation).values())

    whole = needed(64)
    assert needed(8) < needed(64, accumulation=8) < whole and needed(8) < needed(8, alone=False)
    assert needed(64, checkpoint_activations=True) < needed(64, accumulation=4) < whole
    assert needed(64, compile=True) <= whole and needed(64, precision="bf16") <= whole
