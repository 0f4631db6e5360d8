"""The whole pipeline on the bundled digits, on a CPU, in minutes: `make demo`.

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
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import checkpoint
import cli
from diffusion import create_diffusion
from randomness import labels, noise

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
TEACHER = "assets/digits_teacher.pt"
METHODS = {"step distillation": ["--mask", "M1", "--stack", "0"], "ARD": ["--mask", "M4", "--stack", "2"]}
COLUMNS = {
    "model": "model",
    "target": "target",
    "steps": "steps",
    "nfe": "model evaluations",
    "fid": "FID",
    "degradation": "FID - teacher's",
    "precision": "precision",
    "recall": "recall",
    "ms_per_sample": "ms per sample",
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Distil the digits teacher with and without history, and compare.")
    parser.add_argument("--seed", type=cli.not_negative, default=0, help="of trajectories, training and samples")
    parser.add_argument("--out", help="folder of the results; the default is results/demo, results/demo-seed1, ...")
    parser.add_argument("--iterations", type=cli.positive, default=600, help="training steps of each student")
    parser.add_argument("--targets", nargs="+", choices=("x0", "xt"), default=["x0"], help="one pair of students each")
    parser.add_argument("--num-trajectories", type=cli.positive, default=10_000, help="teacher trajectories")
    parser.add_argument("--num-samples", type=cli.positive, default=10_000, help="samples of each student for FID")
    return parser


def call(*commands: list, threads: int | None = None) -> None:
    """Run some of the project's scripts side by side, each shown as a user would type it; stop when one fails.

    ``threads`` is for each of them, all cores divided among them by default.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads or max(1, CORES // len(commands)))}
    # glibc gives every large block back to the system at once; keeping them saves a tenth to a fifth of the time.
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}
    running = []
    for command in commands:
        words = [str(word) for word in command]
        print("$ " + shlex.join(words), flush=True)
        launcher = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}[words[0]]
        silent = subprocess.DEVNULL if running else None  # one progress bar is enough
        real = [sys.executable, *launcher, *words[1:]]
        running.append(subprocess.Popen(real, cwd=Path(__file__).parent, env=environment, stderr=silent))
    codes = [process.wait() for process in running]
    for command, code in zip(commands, codes):
        if code:
            failed = shlex.join(str(word) for word in command)
            raise cli.RunError(f"this command failed with exit code {code}, run it by itself to see why: {failed}")


def evaluator(reference: Path, samples: Path, *options: str) -> list:
    """The command that compares samples with real digits and leaves its figures beside them."""
    command = ["python", "-m", "evaluations.evaluator", reference, samples, "--features", "digits"]
    return [*command, "--json", samples.with_suffix(".json"), *options]


def time_per_sample(models: dict, batch_size: int = 64, repeats: int = 5) -> dict[str, float]:
    """Milliseconds to draw one sample with each model, measured in turns; the median of the repeats."""
    diffusion = create_diffusion("25")
    times = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            z = noise(0, "sample", range(batch_size), model.latent_shape)
            y = labels(0, range(batch_size), model.num_classes)
            started = time.perf_counter()
            with torch.no_grad():
                diffusion.ddim_trajectory(model, z, y, 1.5) if name == "teacher" else model.sample(z, y)
            times[name].append(1000 * (time.perf_counter() - started) / batch_size)
    return {name: statistics.median(values) for name, values in times.items()}


def draw_picture(path: Path, files: dict[str, Path], columns: int = 20) -> None:
    """The first samples of each file, one row a model: the same column is the same noise and label."""
    figure, axes = plt.subplots(len(files), 1, figsize=(columns * 0.5, len(files) * 0.78), constrained_layout=True)
    for axis, (name, file) in zip(axes, files.items()):
        with np.load(file) as samples:
            images = samples["arr_0"][:columns, :, :, 0]
        padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=96)
        axis.imshow(np.concatenate(padded, axis=1), cmap="gray", vmin=0, vmax=255)
        axis.set_title(name, fontsize=9, loc="left", pad=3)
        axis.set_axis_off()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_table(folder: Path, rows: list[dict], notes: list[str]) -> str:
    """table.json (a list of rows) and table.md; returns the latter's text."""
    (folder / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join([*lines, "", *notes]) + "\n"
    (folder / "table.md").write_text(text)
    return text


def make_reference_and_teacher(folder: Path, args) -> None:
    """Real digits, the store of the teacher's trajectories, its samples, and 100 from the students' noise."""
    store, seed = folder / "trajectories", ["--seed", args.seed]
    call(["python", "-m", "evaluations.digits", "reference", "--out", folder / "digits.npz"])
    dump = ["sample_trajectory.py", "--teacher", TEACHER, "--out", store, "--num-trajectories", args.num_trajectories]
    call(["torchrun", f"--nproc_per_node={CORES}", *dump, "--rows-per-shard", 500, *seed], threads=1)
    same_noise = ["--num-samples", 100, *seed, "--out", folder / "teacher-100.npz"]
    call(
        ["python", "trajectory.py", "export", store, "--out", folder / "teacher.npz"],  # the teacher's come free
        ["python", "sample.py", "--teacher", TEACHER, *same_noise],
    )


def make_students(folder: Path, target: str, args) -> dict[str, Path]:
    """Both methods with one target, trained at the same budget and sampled: the checkpoint of each."""
    seed, names = ["--seed", args.seed], {method: f"{method.split()[0].lower()}-{target}" for method in METHODS}
    budget = ["--iterations", args.iterations, "--lr", "2e-3", "--ema-decay", 0.99, "--sample-every", 0, *seed]
    data = ["--data-path", folder / "trajectories", "--target", target]
    call(
        *(
            ["python", "train_ARD.py", *data, *options, *budget, "--run-dir", folder / names[method]]
            for method, options in METHODS.items()
        )
    )
    weights = {method: folder / name / "checkpoints" / f"{args.iterations:07d}.pt" for method, name in names.items()}
    draw = ["--num-samples", args.num_samples, "--per-proc-batch-size", 256, *seed]
    call(
        *(
            ["python", "sample_ARD.py", "--ckpt-path", weights[method], *draw, "--out", folder / f"{name}.npz"]
            for method, name in names.items()
        )
    )
    return {f"{method}, target {target}": path for method, path in weights.items()}


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    folder = Path(args.out or ("results/demo" if args.seed == 0 else f"results/demo-seed{args.seed}"))
    folder.mkdir(parents=True, exist_ok=True)
    make_reference_and_teacher(folder, args)
    students = {}
    for target in args.targets:
        students |= make_students(folder, target, args)

    files = {"teacher": folder / "teacher.npz"}
    files |= {name: folder / f"{weights.parent.parent.name}.npz" for name, weights in students.items()}
    for file in files.values():
        call(evaluator(folder / "digits.npz", file, *(["--floor"] if file.name == "teacher.npz" else [])))
    metrics = {name: json.loads(file.with_suffix(".json").read_text()) for name, file in files.items()}
    models = {"teacher": checkpoint.load_teacher(TEACHER)[0]}
    models |= {name: checkpoint.load_student(weights)[0] for name, weights in students.items()}
    speed = time_per_sample(models)

    rows = []
    for name, result in metrics.items():
        method, _, target = name.partition(", target ")
        row = {"model": method, "target": target or "-", "steps": 4 if target else 25, "nfe": 4 if target else 50}
        row |= {"fid": result["fid"], "degradation": result["fid"] - metrics["teacher"]["fid"]}
        row |= {"precision": result["precision"], "recall": result["recall"], "ms_per_sample": speed[name]}
        rows.append(row)
    notes = [
        f"FID of {args.num_samples} samples against 1797 real digits, in features of a digit classifier (not ADM's). "
        f"Floor, real digits against a bootstrap of themselves: {metrics['teacher']['floor']:.3g}. "
        f"{args.iterations} training steps of batch 64 on {args.num_trajectories} trajectories, seed {args.seed}, "
        f"fp32, CPU with {CORES} cores, timed at batch 64."
    ]
    for target in args.targets:
        step, ard = (row["degradation"] for row in rows if row["target"] == target)
        notes.append(f"Target {target}: step distillation loses {step / ard:.2f} times the FID that ARD loses.")
    pictures = {"teacher, 25 steps with guidance": folder / "teacher-100.npz"}
    draw_picture(folder / "samples.png", pictures | {f"{k}, 4 steps": v for k, v in files.items() if k != "teacher"})
    print("\n" + write_table(folder, rows, notes))
    print(f"{folder}/samples.png, table.md, table.json; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    cli.main(build_parser(), run)
