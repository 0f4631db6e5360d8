"""The structure of the paper's Table 1 and of its ablations, on digits, with several seeds: `make study`.

    python -m lab.study --out results/study            # the same command continues where it broke off
    python -m lab.study --out results/study --dry-run  # what it would run, and how long that takes

Every piece is one of our commands, run as a process with one thread, two side by side on two cores. What is there is
not made again. At the end lab.report writes table and figures to OUT/report.

How much of ARD's gain is history, and how much is the noise that the target x0 takes away from step distillation? The
paper leaves it open. Its default target, the predicted x_0, does not hold the noise of the trajectory any more, so step
distillation (M1) has lost it after the first step, while ARD finds it in its history. Four comparisons tell them apart,
all at S=4 and N=2, each a difference of FID degradations:

  1. M1 - M3, target x0: what the noise is worth. M3 sees its own point and the noise, nothing else of the history.
  2. M3 - M4, target x0: what the rest of the history adds to it. (At S=2 it is nothing: history is the noise alone.)
  3. M1 - M4, target xt, the control: the next point itself still holds the noise, nothing is thrown away, so what
     history gains here is no return of something lost: it is less exposure bias, or more to go by.
  4. M1 - M3, target xt: what a second look at the noise, free of error, gains without any loss to make up for.
     1 minus 4 is the part of the gain under x0 that only gives back what the target took.

M2 does not serve here: its second step sees the noise too, and its keys carry what they saw on to later steps.

The errors of steps (``lab.report.exposure``) say the same without FID: fed the teacher's points, there is no exposure
bias, so by how much M1 is worse than M4 then is what its input does not tell; by how much more each gets worse when fed
its own points is exposure bias.
"""

import argparse
import json
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from diffusion.teacher_ode import TARGETS
from lab.experiments import (
    CORES,
    TEACHER,
    Piece,
    Student,
    dump_command,
    evaluate_command,
    fine_tune_command,
    run_pieces,
    sample_command,
    time_per_sample,
    train_command,
)
from lab.report.page import write_report
from models import DiT
from runtime import cli
from runtime.cli import UserError, chosen
from runtime.files import write_text
from runtime.provenance import require_same
from stores import checkpoints

LAYERS = 6  # of the digits teacher: "N = L"
BOTH = [(2, "M1", 0), (2, "M4", 2), (2, "M4", LAYERS), (4, "M1", 0), (4, "M2", 2), (4, "M3", 2), (4, "M4", 2)]
BOTH += [(4, "M4", LAYERS)]  # (S, mask, N) with both targets
ONCE = [
    (1, "M1", 0),
    (4, "M4", 1),
    (4, "M4", 3),
    (4, "M4", 4),
]  # with x0 alone; the first is KD, the others are Fig. 6c
CURVES = [(4, "M1", 0), (4, "M4", 2)]  # with both targets, evaluated while they are trained and from teacher's points
CURVES_X0 = [(4, "M2", 2), (4, "M3", 2)]
GAN = [(4, "M1", 0), (4, "M4", 2)]  # R+D, with x0
CHECKPOINTS = 6  # points of a curve
UNSEEN = 1000  # seed of the trajectories on which errors are measured, and their number
PLAN = ("iterations", "gan_iterations", "num_samples", "curve_samples", "num_trajectories")

# Seconds of one of two busy cores of an AMD EPYC with AVX512, where all of it took 114 minutes. START is that of a
# process; the others are a training step of batch 64 of a point without history, what a layer with history adds for
# each pair of points; a step of R+D; a sample's step, a teacher's trajectory.
START, POINT, PAIR, GAN_STEP, SAMPLED_POINT, TRAJECTORY = 6.0, 0.037, 0.0003, 0.22, 0.00012, 0.011


def students(folder: Path, iterations: int) -> list[Student]:
    """All regression-trained students of one seed."""
    shapes = [(shape, target) for shape in BOTH for target in TARGETS] + [(shape, "x0") for shape in ONCE]
    return [
        Student(folder, f"s{s}-{mask}-n{n}-{target}".lower(), iterations, s, mask, n, target)
        for (s, mask, n), target in sorted(shapes)
    ]


def training_seconds(student: Student) -> float:
    """An estimate from the constants above: each point costs, and each pair of points in a layer with history."""
    pairs = student.steps * (student.steps - 1) / 2 if student.mask == "M4" else student.steps - 1
    step = POINT * student.steps + PAIR * student.stack * pairs
    return START + student.iterations * (step if student.loss == "R" else GAN_STEP)


def sampled(
    weights: Path, out: Path, count: int, seed: int, reference: Path, steps: int, *options: object
) -> list[Piece]:
    """Samples and their figures; ``options`` of sample_ARD.py."""
    draw = Piece(
        sample_command(weights, out, count, seed, *options), out, (weights,), START + count * steps * SAMPLED_POINT
    )
    return [
        draw,
        Piece(evaluate_command(reference, out), out.with_suffix(".json"), (out, reference), START + count / 5e3),
    ]


def pieces_of_seed(
    out: Path,
    seed: int,
    only: list[str],
    *,
    iterations: int,
    gan_iterations: int,
    num_samples: int,
    curve_samples: int,
    num_trajectories: int,
) -> list[Piece]:
    """Everything with one seed: trajectories, teacher, students, samples and figures of each."""
    folder, reference = out / f"seed{seed}", out / "digits.npz"
    store, teacher, same = (folder / name for name in ("trajectories", "teacher.npz", "teacher-same-noise.npz"))
    manifest = store / "manifest.json"
    export = ["python", "-m", "stores.trajectories", "export", store, "--num-samples", num_samples, "--out", teacher]
    alike = ["python", "sample.py", "--teacher", TEACHER, "--num-samples", 100, "--seed", seed, "--out", same]
    pieces = [
        Piece(dump_command(store, num_trajectories, seed, 1), manifest, (), START + num_trajectories * TRAJECTORY),
        Piece(export, teacher, (manifest,), START),
        Piece(
            evaluate_command(reference, teacher, "--floor"), teacher.with_suffix(".json"), (teacher, reference), START
        ),
        Piece(alike, same, (), START + 100 * TRAJECTORY),
    ]
    every = max(1, iterations // CHECKPOINTS)
    trained, tuned, measured = [], [], []
    for student in students(folder, iterations):
        if only and not any(fnmatch(student.name, pattern) for pattern in only):
            continue
        shape = student.steps, student.mask, student.stack
        x0, draw = student.target == "x0", (seed, reference, student.steps)
        curve = shape in CURVES or (shape in CURVES_X0 and x0)
        options = ["--ckpt-every", every] if curve else []
        command = train_command(student, seed, *options)
        trained.append(Piece(command, student.weights, (manifest,), training_seconds(student)))
        measured += sampled(student.weights, student.samples, num_samples, *draw)
        if curve:
            for step in sorted({*range(every, iterations + 1, every), iterations}):
                samples = folder / "curves" / f"{student.name}-{step:07d}.npz"
                measured += sampled(student.weights_at(step), samples, curve_samples, *draw)
        if shape in CURVES:
            for k in range(1, student.steps):
                samples = folder / "teacher-steps" / f"{student.name}-{k}.npz"
                first, figures = sampled(student.weights, samples, curve_samples, *draw, "--teacher-steps", k)
                measured += [replace(first, seconds=first.seconds + curve_samples * TRAJECTORY), figures]
        if shape in GAN and x0:
            best = student.tuned(gan_iterations)
            fine_tuning = fine_tune_command(student, best, seed)
            tuned.append(Piece(fine_tuning, best.weights, (student.weights,), training_seconds(best)))
            measured += sampled(best.weights, best.samples, num_samples, *draw)
            if seed == 0 and best.stack:  # Fig. 10: digits 0 .. 7 become eights
                sources = ["--source-images", reference, "--source-step", 1, "--class-labels", 8]
                measured.append(sampled(best.weights, folder / "manipulation" / "to-eights.npz", 8, *draw, *sources)[0])
    return pieces + trained + tuned + measured


def plan(out: Path, seeds: int, only: list[str], **sizes: int) -> list[Piece]:
    """All pieces, in an order in which each finds what it needs."""
    reference, unseen = out / "digits.npz", out / "unseen"
    count = min(UNSEEN, sizes["num_trajectories"])
    pieces = [
        Piece(["python", "-m", "evaluations.digits", "reference", "--out", reference], reference, (), START),
        Piece(dump_command(unseen, count, UNSEEN, 1), unseen / "manifest.json", (), START + count * TRAJECTORY),
    ]
    return pieces + [piece for seed in range(seeds) for piece in pieces_of_seed(out, seed, only, **sizes)]


def measure_speed(folder: Path, found: list[Student]) -> None:
    """table.json: milliseconds for a sample of each shape, alone on the machine; once for the same shapes."""
    path = folder / "table.json"
    by_shape = {(s.steps, s.mask, s.stack): s for s in found if s.weights.exists()}
    if path.exists() and len(json.loads(path.read_text())) == 1 + len(by_shape):
        return
    models: dict[str, DiT] = {"teacher": checkpoints.load_teacher(TEACHER)[0]}
    models |= {str(shape): checkpoints.load_student(s.weights)[0] for shape, s in by_shape.items()}
    speed = time_per_sample(models)
    rows = [{"model": "teacher", "ms_per_sample": speed["teacher"]}]
    for shape, student in by_shape.items():
        about = {"model": student.method, "steps": student.steps, "mask": student.mask, "history_layers": student.stack}
        rows.append(about | {"ms_per_sample": speed[str(shape)], "timed": f"batch 64, CPU with {CORES} cores"})
    write_text(path, json.dumps(rows, indent=1) + "\n")


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="lab.study", description="The paper's Table 1 and ablations, on digits.")
    parser.add_argument("--out", type=Path, default=Path("results/study"), help="Folder of all that is made.")
    parser.add_argument("--seeds", type=cli.positive, default=3, help="So many runs of everything, seeds 0, 1, ...")
    parser.add_argument("--jobs", type=cli.positive, default=CORES, help="Processes side by side, one thread each.")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="Students to make, by name; * stands for anything."
    )
    group = parser.add_argument_group("sizes")
    group.add_argument("--iterations", type=cli.positive, default=1200, help="Training steps of batch 64 by R.")
    group.add_argument("--gan-iterations", type=cli.positive, default=1000, help="Steps of R+D after them.")
    group.add_argument("--num-samples", type=cli.positive, default=10_000, help="Samples of a row of the table.")
    group.add_argument("--curve-samples", type=cli.positive, default=2000, help="Samples of a point of a curve.")
    group.add_argument("--num-trajectories", type=cli.positive, default=10_000, help="Trajectories of a seed.")
    cli.add_dry_run_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    sizes = chosen(args, PLAN)
    if min(args.curve_samples, args.num_samples) < 64:
        raise UserError(f"--curve-samples {args.curve_samples}: FID on digits needs 64 samples at least")
    if args.num_samples > args.num_trajectories:
        raise UserError(f"--num-samples {args.num_samples}: the teacher's are its --num-trajectories, as many at least")
    note = args.out / "study.json"
    if note.exists():
        require_same(f"--out {args.out}: holds a study of other sizes", json.loads(note.read_text()), sizes)
    pieces = plan(args.out, args.seeds, args.only, **sizes)
    left = [piece for piece in pieces if not piece.makes.exists()]
    minutes = round(sum(piece.seconds for piece in left) / args.jobs / 60)
    if args.dry_run:
        names = [student.name for student in students(args.out, args.iterations)]
        about = {"pieces": len(pieces), "left": len(left), "minutes_estimated": minutes, "students": names}
        cli.show_plan(about, args)
        return
    write_text(note, json.dumps(sizes) + "\n")
    print(f"{len(left)} of {len(pieces)} pieces to make, about {minutes} minutes with {args.jobs} cores for themselves")
    failed = run_pieces(pieces, args.jobs)
    measure_speed(args.out / "seed0", students(args.out / "seed0", args.iterations))
    pictures = write_report([str(args.out)], args.out / "report", stores=[str(args.out / "unseen")])
    print(f"{args.out}/report/report.html: {', '.join(pictures)}")
    if failed:
        raise cli.RunError(f"{len(failed)} pieces were not made; the same command tries them again; {failed[0]}")


if __name__ == "__main__":
    cli.main(build_parser(), run)
