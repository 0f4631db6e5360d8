"""Text to image at small scale, on a CPU, in minutes: `make demo-t2i`, or with options

    python -m lab.text_demo --seed 1
    python -m lab.text_demo --train-teacher

Real digits above or beside each other, as captions say; a shipped text teacher (PixArt) is distilled into 3 steps with
and without history at the same budget, as section 4.2 of the paper does it, by running the same scripts that distil
PixArt-Sigma. Leaves a picture and a table. A fifth of the captions was never trained on. To resume, run it again.
"""

import argparse
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lab.experiments import BATCH, distance, drawn, figures_of, judged, own_folder, reference, write_table
from lab.scenes import accuracy, write_captions, write_crops
from lab.worlds import DIGITS
from runtime import cli
from runtime.cli import UserError
from runtime.commands import CORES, Piece, run_pieces
from runtime.files import atomic_write
from stores.digits import SCENES, SEEN_SCENES, scene_caption

TEACHER = Path("assets/t2i_teacher.pt")
CPU = ["--device", "cpu"]
METHODS = {"step distillation": ["--mask", "M1", "--stack", 0], "ARD": ["--mask", "M4", "--stack", 1]}
COLUMNS = ("model", "steps", "nfe", "fid", "seen", "unseen", "distance")
TITLES = {"fid": "FID of the digits", "seen": "captions trained on", "unseen": "captions never seen"}


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, prog="lab.text_demo", description="Distil a small text teacher into 3 steps.")
    parser.add_argument("--seed", type=cli.not_negative, default=0, help="Seed of trajectories, training and samples.")
    parser.add_argument(
        "--out",
        type=cli.folder,
        help="Folder of the results; without it, results/demo-t2i, results/demo-t2i-seed1, ...",
    )
    parser.add_argument("--iterations", type=cli.positive, default=600, help="Training steps of each student.")
    parser.add_argument("--num-trajectories", type=cli.positive, default=4000, help="Trajectories of the teacher.")
    parser.add_argument("--num-samples", type=cli.positive, default=1000, help="Samples of each model.")
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="Checkpoint of the text teacher.")
    parser.add_argument(
        "--train-teacher", action="store_true", help="Make the shipped teacher anew instead, in a quarter of an hour."
    )
    return parser


def encoded(store: Path, count: int) -> Piece:
    """A store of the captions of the first so many scenes, which are written beside it."""
    text = store.with_suffix(".txt")
    write_captions(text, count)
    return Piece.of("encode_captions.py", store, "--encoder", "words", "--text", text, *CPU)


def teacher_pieces(folder: Path, seen: Piece) -> list[Piece]:
    """The commands that made the shipped teacher."""
    words = ["--model", "PixArt-Micro/4", "--data-path", "digit-scenes", "--captions", seen, "--no-hflip", *CPU]
    words += ["--global-batch-size", 64, "--lr", "1e-3", "--ema-decay", 0.999, "--sample-every", 0]
    weights = Piece.of("train.py", folder / "teacher", *words, iterations=10_000)
    return [weights, Piece(["stores.checkpoints", "slim", weights, TEACHER], TEACHER)]


def measure(folder: Path, real: Piece, drawn: dict[str, Piece]) -> dict[str, dict[str, float]]:
    """The figures of each model's samples; the first of the models is the one that the others stand for."""
    figures = {}
    for name, samples in drawn.items():
        digits = folder / "digits" / samples.makes.name
        write_crops(samples.makes, digits)
        figures[name] = judged(DIGITS, real, Piece([], digits))
    run_pieces([*figures.values()], folder, jobs=CORES)
    first = next(iter(drawn.values())).makes
    return {
        name: {"fid": figures_of(figures[name].makes)["fid"], "distance": distance(samples.makes, first)}
        | accuracy(samples.makes)
        for name, samples in drawn.items()
    }


def draw_picture(path: Path, files: dict[str, Path], columns: int = 5) -> None:
    """Samples of captions that were trained on, and behind a gap of others: a row a model, a column a noise."""
    shown = [*range(columns), *range(SEEN_SCENES, SEEN_SCENES + columns)]
    figure = Figure(figsize=(0.8 * len(shown) + 0.4, 1.2 * len(files) + 0.2))
    figure.set_layout_engine("constrained", hspace=0.25, rect=(0, 0, 1, 0.95))
    grid = figure.subplots(
        len(files), len(shown) + 1, width_ratios=[1] * columns + [0.3] + [1] * columns, squeeze=False
    )
    for row, (name, file) in zip(grid, files.items(), strict=True):
        with np.load(file) as samples:
            images, scenes = samples["arr_0"], samples["arr_1"]
        for axis in row:
            axis.set_axis_off()
        for axis, sample in zip([*row[:columns], *row[columns + 1 :]], shown, strict=True):
            axis.imshow(images[sample], interpolation="nearest")
            axis.set_title(re.sub(" (?=an? )", "\n", scene_caption(int(scenes[sample]))), fontsize=6)
        row[0].text(0, 1.45, name, transform=row[0].transAxes, fontsize=8, weight="bold", in_layout=False)
    for axis, text in ((grid[0, columns - 1], "captions trained on"), (grid[0, -1], "captions never trained on")):
        axis.text(1, 1.45, text, transform=axis.transAxes, fontsize=8, style="italic", ha="right", in_layout=False)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    if not args.teacher.is_file() and not args.train_teacher:
        raise UserError(f"--teacher {args.teacher}: no such file; --train-teacher makes it")
    if args.train_teacher and TEACHER.exists():
        raise UserError(f"--train-teacher: {TEACHER} is there; remove it to make it anew")
    if args.num_samples < len(SCENES):
        raise UserError(f"--num-samples {args.num_samples}: give {len(SCENES)} at least, one for each caption")
    folder = own_folder(args.out, "results/demo-t2i", args.seed)
    seen, everything = encoded(folder / "seen", SEEN_SCENES), encoded(folder / "all", len(SCENES))
    if args.train_teacher:
        run_pieces([seen, everything, *teacher_pieces(folder, seen)], folder, jobs=CORES)
        return
    seed, real = ["--seed", args.seed, *CPU], reference(DIGITS, folder / "digits.npz")
    words = ["--teacher", args.teacher, "--captions", seen, "--num-trajectories", args.num_trajectories, "--steps", 3]
    words += ["--solver-steps", 48, "--cfg-scale", 1.5, "--store", "xt", "--rows-per-shard", 500, *seed]
    store = Piece.of("sample_trajectory.py", folder / "trajectories", *words, ranks=CORES)
    words = ["--data-path", store, "--captions", seen, "--steps", 3, "--target", "xt", "--lr", "2e-3", *seed]
    words += ["--ema-decay", 0.99, "--sample-every", 0]
    short = {name: name.split()[0].lower() for name in METHODS}
    weights = {
        name: Piece.of("train_ARD.py", folder / short[name], *words, *options, iterations=args.iterations)
        for name, options in METHODS.items()
    }
    words = ["--teacher", args.teacher, "--num-samples", args.num_samples, "--captions", everything, *BATCH, *seed]
    words += ["--cfg-scale", 1.5, "--solver-steps"]
    models = {f"teacher-{n}": Piece.of("sample.py", folder / f"teacher-{n}.npz", *words, n) for n in (48, 3)}
    for name in METHODS:
        out, options = folder / f"{short[name]}.npz", ["--captions", everything, *CPU]
        models[name] = drawn(weights[name], out, args.num_samples, args.seed, *options)
    run_pieces([seen, everything, real, store, *weights.values(), *models.values()], folder, jobs=2)
    figures = measure(folder, real, models)

    rows: list[dict[str, Any]] = [
        {"model": "teacher", "steps": n, "nfe": 2 * n} | figures[f"teacher-{n}"] for n in (48, 3)
    ]
    rows += [{"model": name, "steps": 3, "nfe": 3} | figures[name] for name in METHODS]
    notes = [
        f"FID of the {2 * args.num_samples} digits in {args.num_samples} samples against 1797 real ones, in features "
        "of a digit classifier (not ADM's). Captions: share of samples that show both digits in their places. "
        "Distance: mean squared difference to the teacher's 48 steps from the same noise and caption. "
        f"{args.iterations} training steps of batch 64 on {args.num_trajectories} trajectories, target xt, seed "
        f"{args.seed}, fp32, CPU with {CORES} cores. {len(SCENES) - SEEN_SCENES} of {len(SCENES)} captions were "
        "never trained on, by no model.",
        f"The FID of the teacher in 3 steps is {rows[1]['fid'] / rows[3]['fid']:.2f} times that of ARD.",
    ]
    titles = ["teacher, 48 steps with guidance", "teacher, 3 steps", *(f"{name}, 3 steps" for name in METHODS)]
    files = (samples.makes for samples in models.values())
    draw_picture(folder / "samples.png", dict(zip(titles, files, strict=True)))
    print("\n" + write_table(folder, COLUMNS, rows, notes, **TITLES))
    print(f"{folder}/samples.png, table.md, table.json; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    cli.main(build_parser(), run)
