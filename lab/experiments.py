"""What the demos and the studies share: our own commands as processes, and a student with its files."""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from diffusion.teacher_ode import TeacherODE
from lab.worlds import World
from models import DiT
from models_ard import ARD, method_name
from runtime import cli
from runtime.checks import writable_folder
from runtime.commands import CORES, as_typed, call, start
from runtime.files import atomic_write, write_text
from runtime.randomness import labels, noise


def own_folder(out: str | None, default: str, seed: int, holds: str) -> Path:
    """The folder of a demo's results, made: ``out``, or the default one of its seed.

    ``UserError`` where there are other things than an earlier demo's, which ``holds`` a file or folder of that name.
    """
    folder = writable_folder("--out", out or (default if seed == 0 else f"{default}-seed{seed}"))
    if folder.is_dir() and any(folder.iterdir()) and not (folder / holds).exists():
        raise cli.UserError(f"--out {folder}: the folder holds other files, give a new one or that of an earlier demo")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Titles of columns that are not called as their key.
TITLES = {"nfe": "model evaluations", "fid": "FID", "degradation": "FID - teacher's", "ms_per_sample": "ms per sample"}


def write_table(folder: Path, columns: Sequence[str], rows: list[dict], notes: list[str], **titles: str) -> str:
    """table.json (a list of rows) and table.md with these ``columns``, whose titles are ``TITLES`` or given.

    Returns the text of table.md.
    """
    write_text(folder / "table.json", json.dumps(rows, indent=2) + "\n")
    titles = TITLES | titles
    lines = ["| " + " | ".join(titles.get(key, key) for key in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join([*lines, "", *notes]) + "\n"
    write_text(folder / "table.md", text)
    return text


@dataclass(frozen=True)
class Piece:
    """A command, the file that it makes when it is whole, and the files that it needs."""

    command: list
    makes: Path
    needs: tuple[Path, ...] = ()
    seconds: float = 0  # estimate of its time alone on a core


def run_pieces(pieces: list[Piece], jobs: int = CORES) -> list[str]:
    """Run what has not been made yet, ``jobs`` at a time with one thread each, in order as far as needs allow.

    A piece that fails costs only those that need it. Returns a sentence for each piece that was not made. Where this is
    interrupted, what is running is told to end; made are whole files only, so the same call continues.
    """
    waiting = [piece for piece in pieces if not piece.makes.exists()]
    count, failed = len(pieces) - len(waiting), []
    running: list[tuple[Piece, subprocess.Popen, Any]] = []
    try:
        while waiting or running:
            for piece in [p for p in waiting if all(need.exists() for need in p.needs)][: jobs - len(running)]:
                waiting.remove(piece)
                count += 1
                print(f"[{count}/{len(pieces)}] $ {as_typed(piece.command)}", flush=True)
                printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process is running
                running.append((piece, start(piece.command, 1, printed, subprocess.STDOUT), printed))
            if not running:
                break
            ended = [entry for entry in running if entry[1].poll() is not None]
            running = [entry for entry in running if entry not in ended]
            for piece, process, printed in ended:
                printed.seek(0)
                text = printed.read().strip().rpartition("\n")[2]
                printed.close()
                if process.returncode or not piece.makes.exists():
                    failed.append(f"exit code {process.returncode}, {text!r}: {as_typed(piece.command)}")
            if not ended:
                time.sleep(0.05)
    finally:
        for _, process, _ in running:
            process.terminate()
        for _, process, _ in running:
            process.wait()
    return failed + [f"not begun, for want of what it needs: {as_typed(piece.command)}" for piece in waiting]


@dataclass(frozen=True)
class Student:
    """A student of a world's teacher, and where its files lie: its run, and beside it its samples and figures."""

    world: World
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
        return method_name(self.steps, self.mask, self.stack)

    def __str__(self) -> str:
        return f"{self.method} ({self.loss}), target {self.target}"

    def tuned(self, iterations: int) -> "Student":
        """The same after R+D of so many steps."""
        return replace(self, name=f"{self.name}-gan", iterations=iterations, loss="R+D")


def reference_command(world: World, out: Path) -> list:
    """The world's real images, as the evaluator reads them."""
    return [*world.reference.split(), "--out", out]


def dump_command(world: World, store: Path, num_trajectories: int, seed: int, ranks: int) -> list:
    """The teacher's trajectories, by so many processes."""
    launcher = ["torchrun", f"--nproc_per_node={ranks}"] if ranks > 1 else ["python"]
    dump = [*launcher, "sample_trajectory.py", "--teacher", world.teacher, "--out", store]
    return [*dump, "--num-trajectories", num_trajectories, "--rows-per-shard", 500, "--seed", seed]


def export_command(store: Path, out: Path, num_samples: int) -> list:
    """The teacher's samples: the last points of its trajectories, which come free."""
    return ["python", "-m", "stores.trajectories", "export", store, "--out", out, "--num-samples", num_samples]


def teacher_command(world: World, out: Path, num_samples: int, seed: int) -> list:
    """Samples of the teacher from the noise that the students start from."""
    command = ["python", "sample.py", "--teacher", world.teacher, "--num-samples", num_samples]
    return [*command, "--seed", seed, "--out", out]


def make_reference_and_teacher(
    world: World, folder: Path, seed: int, num_trajectories: int, num_samples: int
) -> tuple[Path, Path, Path]:
    """The files of real images, of the teacher's samples, and of some from the students' noise; its trajectories."""
    store, reference = folder / "trajectories", folder / f"{world.name}.npz"
    teacher, same_noise = folder / "teacher.npz", folder / "teacher-same-noise.npz"
    call([dump_command(world, store, num_trajectories, seed, CORES)], threads=1)
    export = export_command(store, teacher, min(num_samples, num_trajectories))  # FID falls with their number
    sample = teacher_command(world, same_noise, min(200, num_samples), seed)
    call([reference_command(world, reference), export, sample])
    return reference, teacher, same_noise


def train_command(student: Student, seed: int, *options: object) -> list:
    """Regression on the trajectories in the student's folder."""
    command = ["python", "train_ARD.py", "--data-path", student.folder / "trajectories", "--target", student.target]
    command += ["--steps", student.steps, "--mask", student.mask, "--stack", student.stack]
    command += ["--iterations", student.iterations, *student.world.optimiser.split(), *options]
    return [*command, "--sample-every", 0, "--seed", seed, "--run-dir", student.run_dir]


def fine_tune_command(start: Student, tuned: Student, seed: int) -> list:
    """R+D from a regression-trained student."""
    command = ["python", "train_ARD_gan.py", "--data-path", tuned.folder / "trajectories", "--ckpt-path", start.weights]
    world = tuned.world
    command += ["--real-data-path", world.data, "--iterations", tuned.iterations, *world.gan.split()]
    command += ["--gan-warmup", min(world.gan_warmup, tuned.iterations)]
    return [*command, "--sample-every", 0, "--seed", seed, "--run-dir", tuned.run_dir]


def sample_command(weights: Path, out: Path, num_samples: int, seed: int, *options: object) -> list:
    """Samples of a student."""
    command = ["python", "sample_ARD.py", "--ckpt-path", weights, "--num-samples", num_samples, *options]
    return [*command, "--per-proc-batch-size", 256, "--seed", seed, "--out", out]


def evaluate_command(world: World, reference: Path, samples: Path, *options: str) -> list:
    """The comparison of samples with real images, which leaves its figures beside them."""
    command = ["python", "-m", "evaluations.evaluator", reference, samples, "--features", world.features]
    return [*command, "--json", samples.with_suffix(".json"), *options]


def figures_of(samples: Path) -> dict:
    """What the evaluator left beside samples."""
    return json.loads(samples.with_suffix(".json").read_text())


def distance(samples: Path, teacher: Path) -> float:
    """Mean squared difference, pixels in [-1, 1], to what the teacher makes of the same noise."""
    with np.load(samples) as ours, np.load(teacher) as theirs:
        theirs = theirs["arr_0"].astype(np.float64)
        return float(np.mean(((ours["arr_0"][: len(theirs)] - theirs) / 127.5) ** 2))


def draw_samples(path: Path, files: dict[str, Path], columns: int = 20, border: int = 96) -> None:
    """The first samples of each file, one row a model: the same column is the same noise and label.

    ``border`` is the grey of the line around an image, 0..255.
    """
    figure = Figure(figsize=(columns * 0.5, len(files) * 0.78))
    figure.set_layout_engine("constrained")
    for axis, (name, file) in zip(figure.subplots(len(files), 1, squeeze=False)[:, 0], files.items(), strict=True):
        with np.load(file) as samples:
            images = samples["arr_0"][:columns]
        padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=border)
        axis.imshow(np.concatenate(padded, axis=1), interpolation="nearest")
        axis.set_title(name, fontsize=9, loc="left", pad=3)
        axis.set_axis_off()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def time_per_sample(models: Mapping[str, DiT | TeacherODE], batch_size: int = 64, repeats: int = 5) -> dict[str, float]:
    """Milliseconds to draw one sample with each model, measured in turns; the median of the repeats.

    A teacher takes 25 guided steps unless it comes with its ODE.
    """
    drawing = {name: m if isinstance(m, ARD | TeacherODE) else TeacherODE(m) for name, m in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in drawing.items():
            shaped = model.teacher if isinstance(model, TeacherODE) else model
            z = noise(0, "sample", range(batch_size), shaped.latent_shape)
            y = labels(0, range(batch_size), shaped.num_classes)
            started = time.perf_counter()
            with torch.no_grad():
                model.sample(z, y)
            times[name].append(1000 * (time.perf_counter() - started) / batch_size)
    return {name: statistics.median(values) for name, values in times.items()}
