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
    parser.add_argument("--iterations", type=cli.positive, default=1000, help="training steps of each student")
    parser.add_argument("--targets", nargs="+", choices=("x0", "xt"), default=["x0"], help="one pair of students each")
    parser.add_argument("--num-trajectories", type=cli.positive, default=10_000, help="teacher trajectories")
    parser.add_argument("--num-samples", type=cli.positive, default=10_000, help="samples of each student for FID")
    return parser


def call(*command: str) -> None:
    """Run one of the project's scripts, shown as a user would type it; stop where it fails."""
    print("$ python " + shlex.join(command), flush=True)
    done = subprocess.run([sys.executable, *command], cwd=Path(__file__).parent, check=False)
    if done.returncode:
        raise cli.RunError(f"this command failed with exit code {done.returncode}: python {shlex.join(command)}")


def evaluate(reference: Path, samples: Path, *options: str) -> dict:
    """Metrics of a sample file against the real digits, from the evaluator's JSON."""
    out = samples.with_suffix(".json")
    evaluator = ("-m", "evaluations.evaluator", str(reference), str(samples))
    call(*evaluator, "--features", "digits", "--json", str(out), *options)
    return json.loads(out.read_text())


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


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    folder = Path(args.out or ("results/demo" if args.seed == 0 else f"results/demo-seed{args.seed}"))
    seed, count = ("--seed", str(args.seed)), ("--num-samples", str(args.num_samples))
    reference, store = folder / "digits.npz", folder / "trajectories"
    folder.mkdir(parents=True, exist_ok=True)

    call("-m", "evaluations.digits", "reference", "--out", str(reference))
    dump = ("--teacher", TEACHER, "--out", str(store), "--num-trajectories", str(args.num_trajectories))
    call("sample_trajectory.py", *dump, *seed)
    call("trajectory.py", "export", str(store), "--out", str(folder / "teacher.npz"))  # the teacher's samples come free
    call("sample.py", "--teacher", TEACHER, "--num-samples", "100", *seed, "--out", str(folder / "teacher-100.npz"))

    teacher, _ = checkpoint.load_teacher(TEACHER)
    models, files = {"teacher": teacher}, {"teacher, 25 steps with guidance": folder / "teacher-100.npz"}
    metrics = {"teacher": evaluate(reference, folder / "teacher.npz", "--floor")}
    for target in args.targets:
        for method, options in METHODS.items():
            name = f"{method}, target {target}"
            run_dir = folder / f"{method.split()[0].lower()}-{target}"
            training = ["--iterations", str(args.iterations), "--lr", "1e-3", "--ema-decay", "0.99"]
            training += ["--sample-every", "0", "--log-every", "100", "--run-dir", str(run_dir)]
            call("train_ARD.py", "--data-path", str(store), "--target", target, *options, *training, *seed)
            weights = run_dir / "checkpoints" / f"{args.iterations:07d}.pt"
            files[f"{name}, 4 steps"] = run_dir / "samples.npz"
            call("sample_ARD.py", "--ckpt-path", str(weights), *count, *seed, "--out", str(files[f"{name}, 4 steps"]),
                 "--per-proc-batch-size", "256")  # fmt: skip
            metrics[name] = evaluate(reference, files[f"{name}, 4 steps"])
            models[name], _ = checkpoint.load_student(weights)

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
        f"fp32, CPU with {os.cpu_count()} cores, timed at batch 64."
    ]
    for target in args.targets:
        step, ard = (row["degradation"] for row in rows if row["target"] == target)
        notes.append(f"Target {target}: step distillation loses {step / ard:.2f} times the FID that ARD loses.")
    draw_picture(folder / "samples.png", files)
    print("\n" + write_table(folder, rows, notes))
    print(f"{folder}/samples.png, table.md, table.json; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    cli.main(build_parser(), run)
