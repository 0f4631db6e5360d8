"""The whole pipeline on the bundled digits, on a CPU, in minutes: `make demo`, or with options

    python demo.py --seed 1 --iterations 1500 --out results/demo-long

Dumps a real teacher's trajectories, distils it into 4 steps with and without history at the same budget, samples, and
evaluates, by running the same scripts that distil DiT-XL/2. Leaves a picture and a table. To resume, run it again.
"""

import argparse
import time
from typing import Any

from diffusion.teacher_ode import TARGETS
from lab.experiments import (
    Student,
    compared,
    draw_samples,
    dumped,
    figures_of,
    fine_tuned,
    measured,
    of_teacher,
    own_folder,
    reference,
    time_per_sample,
    trained,
    write_table,
)
from lab.worlds import DIGITS
from models import DiT
from runtime import cli
from runtime.commands import CORES, Piece, run_pieces
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


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    folder = own_folder(args.out, DIGITS.folder("demo"), args.seed)
    real = reference(DIGITS, folder / f"{DIGITS.name}.npz")
    store = dumped(DIGITS, folder / "trajectories", args.num_trajectories, args.seed, ranks=CORES)
    count = min(args.num_samples, args.num_trajectories)  # FID falls with their number
    same = min(200, args.num_samples)
    pieces = [real, store, *of_teacher(DIGITS, store, real, args.seed, count, same, threads=CORES)]
    students: dict[Student, Piece] = {}
    for target in args.targets:
        known = {"iterations": args.iterations, "target": target}
        pair = [Student(DIGITS, folder, f"{name}-{target}", **known, **how) for name, how in METHODS.items()]
        students |= {student: trained(student, store, args.seed) for student in pair}
        for student in pair if args.gan else []:
            tuned = student.tuned(args.gan_iterations)
            students[tuned] = fine_tuned(tuned, students[student], store, args.seed)
    pieces += students.values()
    for student, weights in students.items():
        pieces += measured(student, weights, real, args.num_samples, args.seed)
    run_pieces(pieces, folder, jobs=2)

    models: dict[str, DiT] = {"teacher": checkpoints.load_teacher(DIGITS.teacher)[0]}
    models |= {student.name: checkpoints.load_student(student.weights)[0] for student in students}
    speed, timed = time_per_sample(models), f"batch 64, CPU with {CORES} cores"

    teacher, same_noise = folder / "teacher.npz", folder / "teacher-same-noise.npz"
    about: dict[str, Any] = {"model": "teacher", "loss": "-", "target": "-", "steps": 25, "nfe": 50}
    rows = [{"name": "teacher"} | about | compared(teacher, teacher, same_noise) | {"distance": 0.0}]
    for s in students:
        about = {"model": s.method, "loss": s.loss, "target": s.target, "steps": s.steps, "nfe": s.steps}
        rows.append({"name": s.name} | about | compared(s.samples, teacher, same_noise))
    for row in rows:
        row |= {"ms_per_sample": speed[row["name"]], "timed": timed}
    floor = figures_of(teacher)["floor"]
    notes = [
        f"FID of {args.num_samples} samples against 1797 real digits, in features of a digit classifier (not ADM's). "
        f"Floor, real digits against a bootstrap of themselves: {floor:.3g}. Distance: mean squared "
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
