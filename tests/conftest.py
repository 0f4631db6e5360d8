"""Small real things that several tests share: a teacher, its trajectory store, ways to run the scripts."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import DiT_models
from runtime import cli
from stores import checkpoints

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: their models are tiny
torch.set_num_threads(1)


def call(script: str, *argv) -> None:
    """Run a script's command line in this process: its parser and its ``run``, as its last lines do."""
    module = importlib.import_module(script.removesuffix(".py"))
    cli.main(module.build_parser(), module.run, [str(argument) for argument in argv])


def spawn(script: str, *argv, ranks: int = 0, **options) -> subprocess.CompletedProcess:
    """Run a script in its own process, or under torchrun with that many; output is captured as text."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *launcher, str(ROOT / script), *(str(argument) for argument in argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options)


def random_teacher(seed: int = 0):
    """A Nano teacher of 8x8 digits in which nothing is zero, as it would be at initialisation."""
    torch.manual_seed(seed)
    teacher = DiT_models["DiT-Nano/2"](input_size=8, in_channels=1, num_classes=10).eval()
    for parameter in teacher.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return teacher


def save_teacher(path: Path, teacher) -> Path:
    """Write a teacher as train.py would, without what only its training needs."""
    config = {"kind": "teacher", "model": teacher.config, "vae": None, "provenance": {"data": "random"}, "training": {}}
    checkpoints.save(path, {"config": config, "step": 0, "ema": teacher.state_dict()})
    return path


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory) -> Path:
    """A Nano teacher after 200 training steps: its trajectories stay near the data."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    call("train.py", "--model", "DiT-Nano/2", "--data-path", "digits", "--no-hflip", "--global-batch-size", 64, "--lr",
         2e-3, "--ema-decay", 0.9, "--iterations", 200, "--sample-every", 0, "--run-dir", folder)  # fmt: skip
    return folder / "checkpoints" / "0000200.pt"


@pytest.fixture(scope="session")
def store(tmp_path_factory, teacher_file) -> Path:
    """A store of 50 of its trajectories in three shards."""
    folder = tmp_path_factory.mktemp("store") / "trajectories"
    call("sample_trajectory.py", "--teacher", teacher_file, "--out", folder, "--num-trajectories", 50,
         "--rows-per-shard", 20, "--per-proc-batch-size", 16)  # fmt: skip
    return folder


SMALL = ("--stack", 2, "--global-batch-size", 8, "--log-every", 1, "--sample-every", 0, "--lr", 1e-3)


@pytest.fixture(scope="session")
def student_file(tmp_path_factory, store) -> Path:
    """A student of three training steps on that store."""
    folder = tmp_path_factory.mktemp("student") / "run"
    call("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 3, "--run-dir", folder)
    return folder / "checkpoints" / "0000003.pt"


def losses(folder: Path) -> list[float]:
    """The losses in a run's log, step by step."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [float(line.split(" loss ")[1].split()[0]) for line in lines if line.startswith("step ")]
