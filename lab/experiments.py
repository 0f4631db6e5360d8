"""What the demos and the studies share: a student with its files, the pieces of a small world, tables."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from diffusion.teacher_ode import TeacherODE
from lab.worlds import World
from models import DiT
from models_ard import ARD, method_name
from runtime import cli
from runtime.checks import writable_folder
from runtime.commands import NOTE, START, Piece, checkpoint
from runtime.files import atomic_write, write_text
from runtime.randomness import labels, noise

# Seconds of digits on one of two busy cores of an AMD EPYC with AVX512, where the study took 114 minutes: a training
# step of batch 64 of a point without history, what a layer with history adds for each pair of points; a step of R+D; a
# sample's step, a teacher's trajectory.
POINT, PAIR, GAN_STEP, SAMPLED_POINT, TRAJECTORY = 0.037, 0.0003, 0.22, 0.00012, 0.011
BATCH = ("--per-proc-batch-size", 256)  # of samplers


def own_folder(out: str | None, default: str, seed: int) -> Path:
    """The folder of a demo's results, made: ``out``, or the default one of its seed.

    ``UserError`` where there are other things than an earlier demo's.
    """
    folder = writable_folder("--out", out or (default if seed == 0 else f"{default}-seed{seed}"))
    known = (folder / NOTE).exists() or (folder / "table.json").exists()
    if folder.is_dir() and any(folder.iterdir()) and not known:
        raise cli.UserError(f"--out {folder}: the folder holds other files, give a new one or that of an earlier demo")
    if not (folder / NOTE).exists():
        write_text(folder / NOTE, "{}\n")
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
        return checkpoint(self.run_dir, self.iterations)

    @property
    def samples(self) -> Path:
        """Its samples."""
        return self.run_dir.with_suffix(".npz")

    @property
    def method(self) -> str:
        """What the paper calls it."""
        return method_name(self.steps, self.mask, self.stack)

    @property
    def seconds(self) -> float:
        """An estimate of its training's time: each point costs, and each pair of points in a layer with history."""
        pairs = self.steps * (self.steps - 1) / 2 if self.mask == "M4" else self.steps - 1
        step = POINT * self.steps + PAIR * self.stack * pairs if self.loss == "R" else GAN_STEP
        return START + self.world.step_load * self.iterations * step

    def __str__(self) -> str:
        return f"{self.method} ({self.loss}), target {self.target}"

    def tuned(self, iterations: int) -> "Student":
        """The same after R+D of so many steps."""
        return replace(self, name=f"{self.name}-gan", iterations=iterations, loss="R+D")


def reference(world: World, out: Path) -> Piece:
    """The world's real images, as the evaluator reads them."""
    return Piece([*world.reference.split(), "--out", out], out)


def dumped(world: World, store: Path, count: int, seed: int, ranks: int = 1, teacher: Piece | None = None) -> Piece:
    """Trajectories of the world's teacher or of another, by so many processes."""
    words = ["--teacher", teacher or world.teacher, "--num-trajectories", count, "--seed", seed]
    words += ["--rows-per-shard", 500]
    seconds = START + world.sample_load * count * TRAJECTORY
    return Piece.of("sample_trajectory.py", store, *words, ranks=ranks, seconds=seconds)


def drawn_by_teacher(
    world: World, out: Path, count: int, seed: int, *options: object, teacher: Piece | None = None
) -> Piece:
    """Samples of the world's teacher or of another, from the noise that the students start from."""
    words = ["--teacher", teacher or world.teacher, "--num-samples", count, "--seed", seed, *options]
    return Piece.of("sample.py", out, *words, seconds=START + world.sample_load * count * TRAJECTORY)


def drawn(weights: Piece | Path, out: Path, count: int, seed: int, *options: object, seconds: float = START) -> Piece:
    """Samples of a student; ``options`` of ``sample_ARD.py``."""
    words = ["--ckpt-path", weights, "--num-samples", count, "--seed", seed, *BATCH, *options]
    return Piece.of("sample_ARD.py", out, *words, seconds=seconds)


def judged(world: World, real: Piece, samples: Piece, *options: str, threads: int = 0) -> Piece:
    """The comparison of samples with real images, which leaves its figures beside them."""
    words = [real, samples, "--features", world.features, *options]
    return replace(Piece.of("evaluations.evaluator", samples.makes.with_suffix(".json"), *words), threads=threads)


def figures_of(samples: Path) -> dict:
    """What the evaluator left beside samples."""
    return json.loads(samples.with_suffix(".json").read_text())


def of_teacher(
    world: World, store: Piece, real: Piece, seed: int, num_samples: int, same: int, threads: int = 0
) -> list[Piece]:
    """As samples the last points of trajectories, which come free; their figures; ``same`` from the students' noise."""
    folder, out = store.product.parent, store.product.with_name("teacher.npz")
    samples = Piece(["stores.trajectories", "export", store, "--num-samples", num_samples, "--out", out], out)
    same_noise = drawn_by_teacher(world, folder / "teacher-same-noise.npz", same, seed)
    return [samples, judged(world, real, samples, "--floor", threads=threads), same_noise]


def trained(student: Student, store: Piece, seed: int, *options: object) -> Piece:
    """Regression on trajectories."""
    words = ["--data-path", store, "--target", student.target, "--steps", student.steps, "--mask", student.mask]
    words += ["--stack", student.stack, *student.world.optimiser.split(), "--sample-every", 0, "--seed", seed, *options]
    return Piece.of("train_ARD.py", student.run_dir, *words, iterations=student.iterations, seconds=student.seconds)


def fine_tuned(tuned: Student, start: Piece, store: Piece, seed: int) -> Piece:
    """R+D from a regression-trained student."""
    world, warmup = tuned.world, min(tuned.world.gan_warmup, tuned.iterations)
    words = ["--data-path", store, "--ckpt-path", start, "--real-data-path", world.data, *world.gan.split()]
    words += ["--gan-warmup", warmup, "--sample-every", 0, "--seed", seed]
    return Piece.of("train_ARD_gan.py", tuned.run_dir, *words, iterations=tuned.iterations, seconds=tuned.seconds)


def measured(
    student: Student, weights: Piece, real: Piece, count: int, seed: int, *options: object, out: Path | None = None
) -> list[Piece]:
    """Samples of a student, at ``out`` or beside its run, and their figures."""
    given = TRAJECTORY if "--teacher-steps" in options else 0
    seconds = START + student.world.sample_load * count * (student.steps * SAMPLED_POINT + given)
    samples = drawn(weights, out or student.samples, count, seed, *options, seconds=seconds)
    return [samples, judged(student.world, real, samples)]


def distance(samples: Path, teacher: Path) -> float:
    """Mean squared difference, pixels in [-1, 1], to what the teacher makes of the same noise."""
    with np.load(samples) as ours, np.load(teacher) as theirs:
        theirs = theirs["arr_0"].astype(np.float64)
        return float(np.mean(((ours["arr_0"][: len(theirs)] - theirs) / 127.5) ** 2))


def compared(samples: Path, teacher: Path, same_noise: Path) -> dict[str, float]:
    """A model's figures, and how far it is from its teacher: in FID, and from the same noise."""
    found = figures_of(samples)
    figures = {name: found[name] for name in ("fid", "precision", "recall")}
    return figures | {
        "degradation": found["fid"] - figures_of(teacher)["fid"],
        "distance": distance(samples, same_noise),
    }


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
