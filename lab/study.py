"""The structure of the paper's Table 1 and of its ablations, in a small world, with several seeds: `make study`.

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
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from diffusion.teacher_ode import TARGETS
from lab.experiments import (
    Student,
    drawn,
    dumped,
    fine_tuned,
    measured,
    of_teacher,
    reference,
    time_per_sample,
    trained,
)
from lab.report.page import write_report
from lab.worlds import WORLDS, World
from models import DiT
from runtime import cli
from runtime.cli import UserError
from runtime.commands import CORES, Piece, checkpoint, run_pieces, unmade
from runtime.files import write_text
from stores import checkpoints

ALL = -1  # layers: "N = L"
BOTH = [(2, "M1", 0), (2, "M4", 2), (2, "M4", ALL), (4, "M1", 0), (4, "M2", 2), (4, "M3", 2), (4, "M4", 2)]
BOTH += [(4, "M4", ALL)]  # (S, mask, N) with both targets
ONCE = [(1, "M1", 0), (4, "M4", 1), (4, "M4", 3), (4, "M4", 4)]  # with x0 alone: KD, and the others of Fig. 6c
CURVES = [(4, "M1", 0), (4, "M4", 2)]  # with both targets, evaluated while they are trained and from teacher's points
CURVES_X0 = [(4, "M2", 2), (4, "M3", 2)]
GAN = [(4, "M1", 0), (4, "M4", 2)]  # R+D, with x0
CHECKPOINTS = 6  # points of a curve
UNSEEN = 1000  # seed of the trajectories on which errors are measured, and their number
PLAN = ("iterations", "gan_iterations", "num_trajectories", "curve_samples")  # sizes that a world has


def students(world: World, folder: Path, iterations: int) -> list[Student]:
    """All regression-trained students of one seed."""
    shapes = [(shape, target) for shape in BOTH for target in TARGETS] + [(shape, "x0") for shape in ONCE]
    full = [(s, mask, world.layers if n == ALL else n, target) for (s, mask, n), target in shapes]
    return [
        Student(world, folder, f"s{s}-{mask}-n{n}-{target}".lower(), iterations, s, mask, n, target)
        for s, mask, n, target in sorted(full)
    ]


def is_one_of(student: Student, patterns: Sequence[str]) -> bool:
    """Whether its name fits one of the patterns, in which * stands for anything."""
    return any(fnmatch(student.name, pattern) for pattern in patterns)


def plan(
    world: World,
    out: Path,
    seeds: int,
    only: list[str],
    *,
    iterations: int,
    gan_iterations: int,
    num_samples: int,
    curve_samples: int,
    num_trajectories: int,
) -> list[Piece]:
    """All pieces, in an order in which each finds what it needs: of a seed first trajectories and the teacher, then
    students, then samples and figures of each.
    """
    real = reference(world, out / f"{world.name}.npz")
    pieces = [real, dumped(world, out / "unseen", min(UNSEEN, num_trajectories), UNSEEN)]
    every = max(1, iterations // CHECKPOINTS)
    for seed in range(seeds):
        folder, first, tuned, figures = out / f"seed{seed}", list[Piece](), list[Piece](), list[Piece]()
        store = dumped(world, folder / "trajectories", num_trajectories, seed)
        pieces += [store, *of_teacher(world, store, real, seed, num_samples, same=100)]
        for student in students(world, folder, iterations):
            if not is_one_of(student, only or ["*"]) or (seed and not is_one_of(student, world.repeated)):
                continue
            shape, x0 = (student.steps, student.mask, student.stack), student.target == "x0"
            curve = shape in CURVES or (shape in CURVES_X0 and x0)
            weights = trained(student, store, seed, *(["--ckpt-every", every] if curve else []))
            first.append(weights)
            figures += measured(student, weights, real, num_samples, seed)
            for step in sorted({*range(every, iterations + 1, every), iterations}) if curve else []:
                early = replace(weights, makes=checkpoint(student.run_dir, step))  # made on the way
                samples = folder / "curves" / f"{student.name}-{step:07d}.npz"
                figures += measured(student, early, real, curve_samples, seed, out=samples)
            for k in range(1, student.steps) if shape in CURVES else []:
                samples = folder / "teacher-steps" / f"{student.name}-{k}.npz"
                figures += measured(student, weights, real, curve_samples, seed, "--teacher-steps", k, out=samples)
            if shape in GAN and x0:
                best = student.tuned(gan_iterations)
                tuned.append(fine_tuned(best, weights, store, seed))
                figures += measured(best, tuned[-1], real, num_samples, seed)
                if seed == 0 and best.stack:  # Fig. 10: on digits, 0 .. 7 become eights
                    sources = ["--source-images", real, "--source-step", 1, "--class-labels", world.label]
                    samples = folder / "manipulation" / f"to-class-{world.label}.npz"
                    figures.append(drawn(tuned[-1], samples, 8, seed, *sources))
        pieces += first + tuned + figures
    return pieces


def measure_speed(world: World, path: Path, found: list[Student]) -> None:
    """table.json: milliseconds for a sample of each student, alone on the machine; once for the same shapes."""
    made = [student for student in found if student.weights.exists()]
    if path.exists() and len(json.loads(path.read_text())) == 1 + len(made):
        return
    shapes = {str((s.steps, s.mask, s.stack)): s for s in made}
    models: dict[str, DiT] = {"teacher": checkpoints.load_teacher(world.teacher)[0]}
    models |= {shape: checkpoints.load_student(student.weights)[0] for shape, student in shapes.items()}
    speed, timed = time_per_sample(models), f"batch 64, CPU with {CORES} cores"
    keys = {"teacher": "teacher"} | {s.name: str((s.steps, s.mask, s.stack)) for s in made}
    rows = [{"name": name, "ms_per_sample": speed[key], "timed": timed} for name, key in keys.items()]
    write_text(path, json.dumps(rows, indent=1) + "\n")


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="lab.study", description="The paper's Table 1 and ablations, in a small world.")
    parser.add_argument("--world", choices=WORLDS, default="digits", help="The data, its teacher and who judges.")
    parser.add_argument("--out", type=Path, help="Folder of all that is made; without it, results/study.")
    parser.add_argument("--seeds", type=cli.positive, default=3, help="So many runs of everything, seeds 0, 1, ...")
    parser.add_argument("--jobs", type=cli.positive, default=CORES, help="Processes side by side, one thread each.")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="Students to make, by name; * stands for anything."
    )
    group = parser.add_argument_group("sizes")
    group.add_argument("--iterations", type=cli.positive, help="Training steps by R; without it, the world's.")
    group.add_argument("--gan-iterations", type=cli.positive, help="Steps of R+D after them; without it, the world's.")
    group.add_argument("--num-samples", type=cli.positive, help="Samples of a row; without it, the trajectories.")
    group.add_argument("--curve-samples", type=cli.positive, help="Of a point of a curve; without it, the world's.")
    group.add_argument("--num-trajectories", type=cli.positive, help="Of a seed; without it, the world's.")
    cli.add_dry_run_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    world = WORLDS[args.world]
    out = args.out or Path(world.folder("study"))
    sizes = {name: getattr(args, name) or getattr(world, name) for name in PLAN}
    sizes["num_samples"] = args.num_samples or sizes["num_trajectories"]
    if min(sizes["curve_samples"], sizes["num_samples"]) < 64:
        raise UserError(f"--curve-samples {sizes['curve_samples']}: FID needs 64 samples at least")
    if sizes["num_samples"] > sizes["num_trajectories"]:
        raise UserError(f"--num-samples {args.num_samples}: the teacher's are its --num-trajectories, as many at least")
    pieces = plan(world, out, args.seeds, args.only, **sizes)
    left = unmade(pieces, out)
    minutes = round(sum(piece.seconds for piece in left) / args.jobs / 60)
    found = students(world, out / "seed0", sizes["iterations"])
    if args.dry_run:
        counted = {"pieces": len(pieces), "left": len(left), "minutes_estimated": minutes}
        cli.show_plan(counted | {"students": [student.name for student in found]}, args)
        return
    print(f"{len(left)} of {len(pieces)} pieces to make, about {minutes} minutes with {args.jobs} cores for themselves")
    failure = None
    try:
        run_pieces(pieces, out, args.jobs)
    except cli.RunError as error:  # what is made is worth a report
        failure = error
    measure_speed(world, out / "seed0/table.json", found + [s.tuned(sizes["gan_iterations"]) for s in found])
    pictures = write_report(out, out / "report")
    print(f"{out}/report/report.html: {', '.join(pictures)}")
    if failure:
        raise failure


if __name__ == "__main__":
    cli.main(build_parser(), run)
