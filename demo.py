"""The whole pipeline on the bundled digits, on a CPU, in minutes: `make demo`, or with options

    python demo.py --seed 1 --iterations 1500 --out results/demo-long

Dumps a real teacher's trajectories, distils it into 4 steps with and without history at the same budget, samples, and
evaluates, by running the same scripts that distil DiT-XL/2. Leaves a picture and a table. To resume, run it again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from diffusion.teacher_ode import TARGETS
from lab.experiments import (
    Student,
    distance,
    draw_samples,
    evaluate_command,
    figures_of,
    fine_tune_command,
    make_reference_and_teacher,
    own_folder,
    sample_command,
    time_per_sample,
    train_command,
    write_table,
)
from lab.worlds import DIGITS
from models import DiT
from runtime import cli
from runtime.commands import CORES, call
from stores import checkpoints

METHODS: dict[str, dict] = {"step": {"mask": "M1", "stack": 0}, "ard": {"mask": "M4", "stack": 2}}
COLUMNS = ["model", "loss", "target", "steps", "nfe", "fid", "degradation", "precision", "recall", "distance"]
COLUMNS += ["ms_per_sample"]


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


def make_students(
    folder: Path, target: str, *, seed: int, iterations: int, gan_iterations: int, num_samples: int
) -> list[Student]:
    """Both methods with one target, at the same budget: regression, and fine-tuning after it if that has steps."""
    students = [
        Student(DIGITS, folder, f"{name}-{target}", iterations, target=target, **METHODS[name]) for name in METHODS
    ]
    call([train_command(student, seed) for student in students])
    if gan_iterations:
        tuned = [student.tuned(gan_iterations) for student in students]
        call([fine_tune_command(a, b, seed) for a, b in zip(students, tuned, strict=True)])
        students += tuned
    call([sample_command(student.weights, student.samples, num_samples, seed) for student in students])
    return students


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    folder = own_folder(args.out, DIGITS.folder("demo"), args.seed, "trajectories")
    reference, teacher_samples, same_noise = make_reference_and_teacher(
        DIGITS, folder, args.seed, args.num_trajectories, args.num_samples
    )
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

    call([evaluate_command(DIGITS, reference, teacher_samples, "--floor")])
    call([evaluate_command(DIGITS, reference, student.samples) for student in students])
    models: dict[str, DiT] = {"teacher": checkpoints.load_teacher(DIGITS.teacher)[0]}
    models |= {student.name: checkpoints.load_student(student.weights)[0] for student in students}
    speed, timed = time_per_sample(models), f"batch 64, CPU with {CORES} cores"

    teacher = figures_of(teacher_samples)
    about: dict[str, Any] = {"model": "teacher", "loss": "-", "target": "-", "steps": 25, "nfe": 50}
    rows = [{"name": "teacher"} | about | {"distance": 0.0}]
    for s in students:
        about = {"model": s.method, "loss": s.loss, "target": s.target, "steps": s.steps, "nfe": s.steps}
        rows.append({"name": s.name} | about | {"distance": distance(s.samples, same_noise)})
    for row, samples in zip(rows, [teacher_samples, *(s.samples for s in students)], strict=True):
        found = figures_of(samples)
        row |= {name: found[name] for name in ("fid", "precision", "recall")}
        row |= {"degradation": found["fid"] - teacher["fid"], "ms_per_sample": speed[row["name"]], "timed": timed}
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
    draw_samples(folder / "samples.png", pictures | {f"{s}, 4 steps": s.samples for s in students})
    print("\n" + write_table(folder, COLUMNS, rows, notes))
    print(f"{folder}/samples.png, table.md, table.json; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    cli.main(build_parser(), run)
