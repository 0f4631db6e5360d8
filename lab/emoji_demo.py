"""What a teacher's students make of its noise, on emoji, in minutes: `make demo-emoji`, or with options

    python -m lab.emoji_demo --seed 1 --num-samples 2000

Trains nothing: teacher and students are shipped (assets/README.md says how they were made). Draws samples of the
teacher in 25 and in 4 steps, and of its students in 4, from the same noise. Leaves a picture and a table. To resume,
run it again.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion.teacher_ode import TeacherODE
from lab.experiments import (
    BATCH,
    compared,
    draw_samples,
    drawn,
    drawn_by_teacher,
    figures_of,
    judged,
    own_folder,
    reference,
    time_per_sample,
    write_table,
)
from lab.worlds import EMOJI
from models import DiT
from runtime import cli
from runtime.commands import CORES, Piece, run_pieces
from stores import checkpoints

TEACHER_STEPS = (25, 4)
STUDENTS = {"step distillation": "step", "ARD": "ard", "ARD, R+D": "ard_gan"}  # shipped as emoji_NAME.pt
COLUMNS = ("model", "steps", "nfe", "fid", "degradation", "precision", "recall", "distance", "ms_per_sample")


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, prog="lab.emoji_demo", description="Compare the shipped students with their teacher.")
    parser.add_argument("--seed", type=cli.not_negative, default=0, help="Seed of the samples.")
    parser.add_argument("--out", type=cli.folder, help="Folder of the results; without it, results/demo-emoji, ...")
    parser.add_argument("--num-samples", type=cli.positive, default=1000, help="Samples of each model.")
    parser.add_argument(
        "--assets", type=Path, default=EMOJI.teacher.parent, help="Folder of emoji_teacher.pt, emoji_ard.pt, ..."
    )
    return parser


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    world = replace(EMOJI, teacher=args.assets / "emoji_teacher.pt")
    weights = {name: args.assets / f"emoji_{short}.pt" for name, short in STUDENTS.items()}
    for path in (world.teacher, *weights.values()):
        cli.existing_file("--assets", path)
    folder = own_folder(args.out, world.folder("demo"), args.seed)
    real, count, seed = reference(world, folder / "emoji.npz"), args.num_samples, args.seed
    teacher = checkpoints.load_teacher(world.teacher)[0]
    models: list[tuple[str, int, Piece, DiT | TeacherODE]] = []  # name, steps, samples, model
    for steps in TEACHER_STEPS:
        solver = ["--solver-steps", steps, *BATCH]
        samples = drawn_by_teacher(world, folder / f"teacher-{steps}.npz", count, seed, *solver)
        models.append(("teacher", steps, samples, TeacherODE(teacher, solver_steps=steps)))
    for name, path in weights.items():
        student = checkpoints.load_student(path)[0]
        models.append((name, student.steps, drawn(path, folder / f"{STUDENTS[name]}.npz", count, seed), student))
    pieces = [samples for _, _, samples, _ in models]
    figures = [judged(world, real, pieces[0], "--floor")]
    figures += [judged(world, real, samples, threads=max(1, CORES // 4)) for samples in pieces[1:]]
    run_pieces([real, *pieces, *figures], folder)

    titles = [f"{name}, {steps} steps" for name, steps, _, _ in models]
    speed = time_per_sample({title: model for title, (*_, model) in zip(titles, models, strict=True)})
    rows: list[dict[str, Any]] = []
    first = pieces[0].makes
    for title, (name, steps, samples, model) in zip(titles, models, strict=True):
        nfe = 2 * steps if isinstance(model, TeacherODE) else steps
        row = {"model": name, "steps": steps, "nfe": nfe} | compared(samples.makes, first, first)
        rows.append(row | {"ms_per_sample": speed[title]})
    floor = figures_of(first)["floor"]
    notes = [
        f"FID of {args.num_samples} samples against all real emoji, in features of an emoji classifier (not ADM's). "
        f"Floor, real emoji against a bootstrap of themselves: {floor:.3g}. Distance: mean squared difference "
        f"to the teacher's {TEACHER_STEPS[0]} steps from the same noise. Seed {args.seed}, fp32, CPU with {CORES} "
        "cores, timed at batch 64."
    ]
    files = {title: samples.makes for title, samples in zip(titles, pieces, strict=True)}
    draw_samples(folder / "samples.png", files, columns=16, border=235)
    print("\n" + write_table(folder, COLUMNS, rows, notes))
    print(f"{folder}/samples.png, table.md, table.json; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    cli.main(build_parser(), run)
