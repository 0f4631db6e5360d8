"""What the demo and the study of the digits share: our own commands as processes, and a student with its files."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtime import cli

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
TEACHER = "assets/digits_teacher.pt"
OPTIMISER = ["--lr", "2e-3", "--ema-decay", "0.99"]
GAN = ["--gan-warmup", "150", "--gan-weight", "0.5", "--d-time", "100", "--d-lr", "2e-3"]
GAN += ["--lr", "1e-3", "--clip", "0.06", "--d-clip", "0.06", "--ema-decay", "0.99"]


def call(commands: list[list], threads: int | None = None, quiet: bool = False) -> None:
    """Run some of the project's scripts side by side, each shown as a user would type it; stop when one fails.

    ``threads`` is for each of them, all cores divided among them by default. ``quiet`` keeps what they print; the last
    line of it is the reason that is given where one fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads or max(1, CORES // len(commands)))}
    # glibc gives every large block back to the system at once; keeping them saves a tenth to a fifth of the time.
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}
    running: list[subprocess.Popen] = []
    for command in commands:
        words = [str(word) for word in command]
        print("$ " + shlex.join(words), flush=True)
        launcher = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}[words[0]]
        silent = subprocess.DEVNULL if running else None  # one progress bar is enough
        out, error = (subprocess.PIPE, subprocess.STDOUT) if quiet else (None, silent)
        real = [sys.executable, *launcher, *words[1:]]
        running.append(subprocess.Popen(real, cwd=ROOT, env=environment, stdout=out, stderr=error, text=True))
    try:
        printed = [process.communicate()[0] or "" for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
    for command, process, text in zip(commands, running, printed, strict=True):
        if process.returncode:
            failed = shlex.join(str(word) for word in command)
            reason = text.strip().rpartition("\n")[2] or "run it by itself to see why"
            raise cli.RunError(f"this command failed with exit code {process.returncode}, {reason}: {failed}")


@dataclass(frozen=True)
class Student:
    """A student of the digits teacher, and where its files lie: its run, and beside it its samples and figures."""

    folder: Path
    name: str
    iterations: int
    steps: int = 4
    mask: str = "M4"
    stack: int = 2
    target: str = "x0"
    loss: str = "R"

    @property
    def run_dir(self) -> Path:
        """Its training run; its samples lie beside it."""
        return self.folder / self.name

    @property
    def weights(self) -> Path:
        """Its last checkpoint."""
        return self.weights_at(self.iterations)

    def weights_at(self, step: int) -> Path:
        """Its checkpoint after so many training steps."""
        return self.run_dir / "checkpoints" / f"{step:07d}.pt"

    @property
    def samples(self) -> Path:
        """Its samples."""
        return self.run_dir.with_suffix(".npz")

    @property
    def method(self) -> str:
        """What the paper calls it."""
        if self.steps == 1:
            return "KD"
        return "ARD" if self.stack and self.mask != "M1" else "step distillation"

    def __str__(self) -> str:
        return f"{self.method} ({self.loss}), target {self.target}"

    def tuned(self, iterations: int) -> "Student":
        """The same after R+D of so many steps."""
        return replace(self, name=f"{self.name}-gan", iterations=iterations, loss="R+D")


def dump_command(store: Path, num_trajectories: int, seed: int) -> list:
    """The teacher's trajectories, by as many processes as there are cores, one thread each."""
    dump = ["torchrun", f"--nproc_per_node={CORES}", "sample_trajectory.py", "--teacher", TEACHER, "--out", store]
    return [*dump, "--num-trajectories", num_trajectories, "--rows-per-shard", 500, "--seed", seed]


def make_reference_and_teacher(folder: Path, seed: int, num_trajectories: int, num_samples: int) -> None:
    """Real digits, the store of the teacher's trajectories, its samples, and some from the students' noise."""
    store, same_noise = folder / "trajectories", min(200, num_samples)
    call([dump_command(store, num_trajectories, seed)], threads=1)
    reference = ["python", "-m", "evaluations.digits", "reference", "--out", folder / "digits.npz"]
    # The teacher's samples are the last points of its trajectories: they come free.
    export = ["python", "-m", "stores.trajectories", "export", store, "--out", folder / "teacher.npz"]
    sample = ["python", "sample.py", "--teacher", TEACHER, "--num-samples", same_noise, "--seed", seed]
    sample += ["--out", folder / "teacher-same-noise.npz"]
    call([reference, export, sample])


def train_command(student: Student, seed: int, *options: object) -> list:
    """Regression on the trajectories in the student's folder."""
    command = ["python", "train_ARD.py", "--data-path", student.folder / "trajectories", "--target", student.target]
    command += ["--steps", student.steps, "--mask", student.mask, "--stack", student.stack]
    command += ["--iterations", student.iterations, *OPTIMISER, *options]
    return [*command, "--sample-every", 0, "--seed", seed, "--run-dir", student.run_dir]


def fine_tune_command(start: Student, tuned: Student, seed: int) -> list:
    """R+D from a regression-trained student."""
    command = ["python", "train_ARD_gan.py", "--data-path", tuned.folder / "trajectories", "--ckpt-path", start.weights]
    command += ["--real-data-path", "digits", "--iterations", tuned.iterations, *GAN]
    return [*command, "--sample-every", 0, "--seed", seed, "--run-dir", tuned.run_dir]


def sample_command(weights: Path, out: Path, num_samples: int, seed: int, *options: object) -> list:
    """Samples of a student."""
    command = ["python", "sample_ARD.py", "--ckpt-path", weights, "--num-samples", num_samples, *options]
    return [*command, "--per-proc-batch-size", 256, "--seed", seed, "--out", out]


def evaluate_command(reference: Path, samples: Path, *options: str) -> list:
    """The comparison of samples with real digits, which leaves its figures beside them."""
    command = ["python", "-m", "evaluations.evaluator", reference, samples, "--features", "digits"]
    return [*command, "--json", samples.with_suffix(".json"), *options]


def figures_of(samples: Path) -> dict:
    """What the evaluator left beside samples."""
    return json.loads(samples.with_suffix(".json").read_text())


def distance(samples: Path, teacher: Path) -> float:
    """Mean squared difference, pixels in [-1, 1], to what the teacher makes of the same noise."""
    with np.load(samples) as ours, np.load(teacher) as theirs:
        theirs = theirs["arr_0"].astype(np.float64)
        return float(np.mean(((ours["arr_0"][: len(theirs)] - theirs) / 127.5) ** 2))
