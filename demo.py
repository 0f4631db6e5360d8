"""The whole pipeline on the bundled digits, on a CPU, in minutes: `make demo`, or with options

    python demo.py --seed 1 --iterations 1500 --out results/demo-long

Dumps a real teacher's trajectories, distils it into 4 steps with and without history at the same budget, samples, and
evaluates, by running the same scripts that distil DiT-XL/2. Leaves a picture and a table. To resume, run it again.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from diffusion import create_diffusion
from diffusion.teacher_ode import TARGETS
from models import DiT
from models_ard import ARD
from runtime import cli
from runtime.checks import writable_folder
from runtime.distributed import die_with_parent
from runtime.files import atomic_write, write_text
from runtime.randomness import labels, noise
from stores import checkpoints

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
TEACHER = "assets/digits_teacher.pt"
METHODS = {"step distillation": ["--mask", "M1", "--stack", "0"], "ARD": ["--mask", "M4", "--stack", "2"]}
GAN = ["--gan-warmup", "150", "--gan-weight", "0.5", "--d-time", "100", "--d-lr", "2e-3"]
GAN += ["--lr", "1e-3", "--clip", "0.06", "--d-clip", "0.06", "--ema-decay", "0.99"]
COLUMNS = {
    "model": "model",
    "loss": "loss",
    "target": "target",
    "steps": "steps",
    "nfe": "model evaluations",
    "fid": "FID",
    "degradation": "FID - teacher's",
    "precision": "precision",
    "recall": "recall",
    "distance": "distance",
    "ms_per_sample": "ms per sample",
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Distil the digits teacher with and without history, and compare.")
    parser.add_argument("--seed", type=cli.not_negative, default=0, help="Seed of trajectories, training and samples.")
    parser.add_argument(
        "--out", type=cli.folder, help="Folder of the results; without it, results/demo, results/demo-seed1, ..."
    )
    parser.add_argument("--iterations", type=cli.positive, default=600, help="Training steps of each student.")
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=["x0"], help="Train a pair of students for each of these."
    )
    parser.add_argument("--gan", action="store_true", help="Fine-tune the students with a discriminator as well.")
    parser.add_argument("--gan-iterations", type=cli.positive, default=1000, help="Steps of that fine-tuning.")
    parser.add_argument("--num-trajectories", type=cli.positive, default=10_000, help="Trajectories of the teacher.")
    parser.add_argument("--num-samples", type=cli.positive, default=10_000, help="Samples of each student, for FID.")
    return parser


def call(commands: list[list], threads: int | None = None) -> None:
    """Run some of the project's scripts side by side, each shown as a user would type it; stop when one fails.

    ``threads`` is for each of them, all cores divided among them by default.
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
        real = [sys.executable, *launcher, *words[1:]]
        running.append(
            subprocess.Popen(
                real, cwd=Path(__file__).parent, env=environment, stderr=silent, preexec_fn=die_with_parent
            )
        )
    try:
        codes = [process.wait() for process in running]
    finally:  # interrupted or terminated: none is left behind
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    for command, code in zip(commands, codes, strict=True):
        if code:
            failed = shlex.join(str(word) for word in command)
            raise cli.RunError(f"this command failed with exit code {code}, run it by itself to see why: {failed}")


def own_folder(out: str) -> Path:
    """The folder of the results. ``UserError`` where it holds other things than an earlier demo's."""
    folder = writable_folder("--out", out)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "trajectories").is_dir():
        raise cli.UserError(f"--out {out}: the folder holds other files, give a new one or that of an earlier demo")
    return folder


def evaluate_command(reference: Path, samples: Path, *options: str) -> list:
    """The comparison of samples with real digits, which leaves its figures beside them."""
    command = ["python", "-m", "evaluations.evaluator", reference, samples, "--features", "digits"]
    return [*command, "--json", samples.with_suffix(".json"), *options]


def time_per_sample(models: dict[str, DiT], batch_size: int = 64, repeats: int = 5) -> dict[str, float]:
    """Milliseconds to draw one sample with each model, measured in turns; the median of the repeats."""
    diffusion = create_diffusion("25")
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            z = noise(0, "sample", range(batch_size), model.latent_shape)
            y = labels(0, range(batch_size), model.num_classes)
            started = time.perf_counter()
            with torch.no_grad():
                if isinstance(model, ARD):
                    model.sample(z, y)
                else:
                    diffusion.ddim_trajectory(model, z, y, 1.5)
            times[name].append(1000 * (time.perf_counter() - started) / batch_size)
    return {name: statistics.median(values) for name, values in times.items()}


def draw_picture(path: Path, files: dict[str, Path], columns: int = 20) -> None:
    """The first samples of each file, one row a model: the same column is the same noise and label."""
    figure, axes = plt.subplots(len(files), 1, figsize=(columns * 0.5, len(files) * 0.78), constrained_layout=True)
    for axis, (name, file) in zip(axes, files.items(), strict=True):
        with np.load(file) as samples:
            images = samples["arr_0"][:columns, :, :, 0]
        padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=96)
        axis.imshow(np.concatenate(padded, axis=1), cmap="gray", vmin=0, vmax=255)
        axis.set_title(name, fontsize=9, loc="left", pad=3)
        axis.set_axis_off()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)


def write_table(folder: Path, rows: list[dict], notes: list[str]) -> str:
    """table.json (a list of rows) and table.md; returns the latter's text."""
    write_text(folder / "table.json", json.dumps(rows, indent=2) + "\n")
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join([*lines, "", *notes]) + "\n"
    write_text(folder / "table.md", text)
    return text


@dataclass(frozen=True)
class Student:
    """One of the demo's students and where its files lie."""

    folder: Path
    method: str
    target: str
    loss: str
    iterations: int

    @property
    def run_dir(self) -> Path:
        """Its training run; its samples lie beside it."""
        name = f"{self.method.split()[0].lower()}-{self.target}"
        return self.folder / (f"{name}-gan" if self.loss == "R+D" else name)

    @property
    def weights(self) -> Path:
        """Its last checkpoint."""
        return self.run_dir / "checkpoints" / f"{self.iterations:07d}.pt"

    @property
    def samples(self) -> Path:
        """Its samples."""
        return self.run_dir.with_suffix(".npz")

    def __str__(self) -> str:
        return f"{self.method} ({self.loss}), target {self.target}"


def make_reference_and_teacher(folder: Path, seed: int, num_trajectories: int, num_samples: int) -> None:
    """Real digits, the store of the teacher's trajectories, its samples, and some from the students' noise."""
    store, same_noise = folder / "trajectories", min(200, num_samples)
    dump = ["torchrun", f"--nproc_per_node={CORES}", "sample_trajectory.py", "--teacher", TEACHER, "--out", store]
    dump += ["--num-trajectories", num_trajectories, "--rows-per-shard", 500, "--seed", seed]
    call([dump], threads=1)
    reference = ["python", "-m", "evaluations.digits", "reference", "--out", folder / "digits.npz"]
    # The teacher's samples are the last points of its trajectories: they come free.
    export = ["python", "-m", "stores.trajectories", "export", store, "--out", folder / "teacher.npz"]
    sample = ["python", "sample.py", "--teacher", TEACHER, "--num-samples", same_noise, "--seed", seed]
    sample += ["--out", folder / "teacher-same-noise.npz"]
    call([reference, export, sample])


def train_command(student: Student, seed: int) -> list:
    """Regression on the demo's trajectories."""
    command = ["python", "train_ARD.py", "--data-path", student.folder / "trajectories", "--target", student.target]
    command += [*METHODS[student.method], "--iterations", student.iterations, "--lr", "2e-3", "--ema-decay", "0.99"]
    return [*command, "--sample-every", 0, "--seed", seed, "--run-dir", student.run_dir]


def fine_tune_command(start: Student, tuned: Student, seed: int) -> list:
    """R+D from a regression-trained student."""
    command = ["python", "train_ARD_gan.py", "--data-path", tuned.folder / "trajectories", "--ckpt-path", start.weights]
    command += ["--real-data-path", "digits", "--iterations", tuned.iterations, *GAN]
    return [*command, "--sample-every", 0, "--seed", seed, "--run-dir", tuned.run_dir]


def sample_command(student: Student, seed: int, num_samples: int) -> list:
    """Samples of a student."""
    command = ["python", "sample_ARD.py", "--ckpt-path", student.weights, "--num-samples", num_samples]
    return [*command, "--per-proc-batch-size", 256, "--seed", seed, "--out", student.samples]


def make_students(
    folder: Path, target: str, *, seed: int, iterations: int, gan_iterations: int, num_samples: int
) -> list[Student]:
    """Both methods with one target, at the same budget: regression, and fine-tuning after it if that has steps."""
    students = [Student(folder, method, target, "R", iterations) for method in METHODS]
    call([train_command(student, seed) for student in students])
    if gan_iterations:
        tuned = [replace(student, loss="R+D", iterations=gan_iterations) for student in students]
        call([fine_tune_command(a, b, seed) for a, b in zip(students, tuned, strict=True)])
        students += tuned
    call([sample_command(student, seed, num_samples) for student in students])
    return students


def distance(samples: Path, teacher: Path) -> float:
    """Mean squared difference, pixels in [-1, 1], to what the teacher makes of the same noise."""
    with np.load(samples) as ours, np.load(teacher) as theirs:
        theirs = theirs["arr_0"].astype(np.float64)
        return float(np.mean(((ours["arr_0"][: len(theirs)] - theirs) / 127.5) ** 2))


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    folder = own_folder(args.out or ("results/demo" if args.seed == 0 else f"results/demo-seed{args.seed}"))
    folder.mkdir(parents=True, exist_ok=True)
    make_reference_and_teacher(folder, args.seed, args.num_trajectories, args.num_samples)
    students: list[Student] = []
    for target in args.targets:
        students += make_students(
            folder,
            target,
            seed=args.seed,
            iterations=args.iterations,
            gan_iterations=args.gan_iterations if args.gan else 0,
            num_samples=args.num_samples,
        )

    reference, same_noise = folder / "digits.npz", folder / "teacher-same-noise.npz"
    call([evaluate_command(reference, folder / "teacher.npz", "--floor")])
    call([evaluate_command(reference, student.samples) for student in students])
    teacher = json.loads((folder / "teacher.json").read_text())
    models: dict[str, DiT] = {"teacher": checkpoints.load_teacher(TEACHER)[0]}
    models |= {str(student): checkpoints.load_student(student.weights)[0] for student in students}
    speed = time_per_sample(models)

    figures = ("fid", "precision", "recall")
    rows: list[dict[str, Any]] = [
        {"model": "teacher", "loss": "-", "target": "-", "steps": 25, "nfe": 50, "degradation": 0.0, "distance": 0.0}
    ]
    rows[0] |= {name: teacher[name] for name in figures} | {"ms_per_sample": speed["teacher"]}
    for student in students:
        found = json.loads(student.samples.with_suffix(".json").read_text())
        row: dict[str, Any] = {
            "model": student.method,
            "loss": student.loss,
            "target": student.target,
            "steps": 4,
            "nfe": 4,
        }
        row |= {name: found[name] for name in figures} | {"degradation": found["fid"] - teacher["fid"]}
        row |= {"distance": distance(student.samples, same_noise), "ms_per_sample": speed[str(student)]}
        rows.append(row)
    notes = [
        f"FID of {args.num_samples} samples against 1797 real digits, in features of a digit classifier (not ADM's). "
        f"Floor, real digits against a bootstrap of themselves: {teacher['floor']:.3g}. Distance: mean squared "
        f"difference to the teacher's samples of the same noise. {args.iterations} training steps of batch 64 on "
        f"{args.num_trajectories} trajectories, seed {args.seed}, fp32, CPU with {CORES} cores, timed at batch 64."
    ]
    for target in args.targets:
        step, ard = (row["degradation"] for row in rows if (row["target"], row["loss"]) == (target, "R"))
        notes.append(f"Target {target}: the FID degradation of ARD is {step / ard:.2f} times smaller.")
    if args.gan:
        notes.append(f"R+D: {args.gan_iterations} more steps of batch 48 with the discriminator.")
    pictures = {"teacher, 25 steps with guidance": same_noise}
    draw_picture(folder / "samples.png", pictures | {f"{s}, 4 steps": s.samples for s in students})
    print("\n" + write_table(folder, rows, notes))
    print(f"{folder}/samples.png, table.md, table.json; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    cli.main(build_parser(), run)
