"""Noise prediction or flow matching, on digits: a teacher of each at equal steps, and what students make of them.

    python -m lab.flow --out results/flow            # the same command continues where it broke off
    python -m lab.flow --out results/flow --dry-run  # what it would run

The teachers differ in --process alone. Both are sampled in few solver steps, and distilled by step distillation
(M1) and by ARD (M4), with equal steps and each seed; the flow's by both targets and parametrizations. At the end a
table is printed, and written to OUT.
"""

import argparse
import statistics
from pathlib import Path

from lab.experiments import (
    BATCH,
    Student,
    drawn_by_teacher,
    dumped,
    figures_of,
    judged,
    measured,
    reference,
    trained,
    write_table,
)
from lab.worlds import DIGITS
from runtime import cli
from runtime.cli import UserError, chosen
from runtime.commands import CORES, Piece, run_pieces, unmade

PROCESSES = ("ddpm", "sit")
SOLVER_STEPS = (4, 8, 25)
METHODS = {  # of the teacher of each process: mask, N, target, parametrization
    "ddpm": (("M1", 0, "x0", "raw"), ("M4", 2, "x0", "raw")),
    "sit": (
        ("M1", 0, "x0", "raw"),
        ("M4", 2, "x0", "raw"),
        ("M4", 2, "x0", "residual"),
        ("M4", 2, "xt", "raw"),
        ("M4", 2, "xt", "residual"),
    ),
}
SIZES = ("teacher_iterations", "iterations", "num_trajectories", "num_samples")
COLUMNS = ("process", "model", "target", "parametrization", "steps", "fid")


def teacher_samples(out: Path, process: str, solver_steps: int) -> Path:
    """The samples of a teacher in so many steps."""
    return out / process / f"teacher-{solver_steps}.npz"


def students(out: Path, process: str, seed: int, iterations: int) -> dict[Student, str]:
    """All students of one teacher and seed, with the parametrization of each."""
    folder = out / process / f"seed{seed}"
    return {
        Student(DIGITS, folder, f"{mask}-{target}-{says}".lower(), iterations, 4, mask, layers, target): says
        for mask, layers, target, says in METHODS[process]
    }


def plan(
    out: Path, seeds: int, *, teacher_iterations: int, iterations: int, num_trajectories: int, num_samples: int
) -> list[Piece]:
    """All pieces, in an order in which each finds what it needs."""
    real = reference(DIGITS, out / "digits.npz")
    words = "--model DiT-Micro/2 --data-path digits --no-hflip --global-batch-size 128 --lr 1e-3 --ema-decay 0.999 "
    words += "--ema-warmup --sample-every 0 --process"
    teachers = {
        process: Piece.of("train.py", out / process / "teacher", *words.split(), process, iterations=teacher_iterations)
        for process in PROCESSES
    }
    pieces = [real, *teachers.values()]
    for process, teacher in teachers.items():
        for n in SOLVER_STEPS:
            file, solver = teacher_samples(out, process, n), ["--solver-steps", n, *BATCH]
            samples = drawn_by_teacher(DIGITS, file, num_samples, 0, *solver, teacher=teacher)
            pieces += [samples, judged(DIGITS, real, samples)]
    for seed in range(seeds):
        for process, teacher in teachers.items():
            folder = out / process / f"seed{seed}"
            store = dumped(DIGITS, folder / "trajectories", num_trajectories, seed, teacher=teacher)
            pieces.append(store)
            for student, parametrization in students(out, process, seed, iterations).items():
                weights = trained(student, store, seed, "--parametrization", parametrization)
                pieces += [weights, *measured(student, weights, real, num_samples, seed)]
    return pieces


def rows_of(out: Path, seeds: int, iterations: int) -> list[dict]:
    """The table: a row for each teacher and number of steps, and for each method its mean and deviation over seeds."""
    rows: list[dict] = []
    for process in PROCESSES:
        for n in SOLVER_STEPS:
            figure = figures_of(teacher_samples(out, process, n))["fid"]
            row = {"process": process, "model": "teacher", "target": "-", "parametrization": "-"}
            rows.append(row | {"steps": n, "fid": figure})
        by_seed = [students(out, process, seed, iterations).items() for seed in range(seeds)]
        for same in zip(*by_seed, strict=True):
            found = [figures_of(student.samples)["fid"] for student, _ in same]
            spread = f" ± {statistics.stdev(found):.2f}" if seeds > 1 else ""
            one, parametrization = same[0]
            row = {"process": process, "model": one.method, "target": one.target, "parametrization": parametrization}
            rows.append(row | {"steps": one.steps, "seeds": found, "fid": f"{statistics.mean(found):.2f}{spread}"})
    return rows


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, prog="lab.flow", description="Compare flow matching with noise prediction on digits.")
    parser.add_argument("--out", type=Path, default=Path("results/flow"), help="Folder of all that is made.")
    parser.add_argument("--seeds", type=cli.not_negative, default=3, help="So many students of each kind; 0 is none.")
    parser.add_argument("--jobs", type=cli.positive, default=CORES, help="Processes side by side, one thread each.")
    group = parser.add_argument_group("sizes")
    group.add_argument("--teacher-iterations", type=cli.positive, default=3000, help="Training steps of a teacher.")
    group.add_argument("--iterations", type=cli.positive, default=600, help="Training steps of a student.")
    group.add_argument("--num-trajectories", type=cli.positive, default=5000, help="Trajectories of a seed.")
    group.add_argument("--num-samples", type=cli.positive, default=5000, help="Samples of a row.")
    cli.add_dry_run_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    if args.num_samples < 64:
        raise UserError(f"--num-samples {args.num_samples}: FID needs 64 samples at least")
    sizes = chosen(args, SIZES)
    pieces = plan(args.out, args.seeds, **sizes)
    left = unmade(pieces, args.out)
    if args.dry_run:
        cli.show_plan(sizes | {"pieces": len(pieces), "left": len(left)}, args)
        return
    run_pieces(pieces, args.out, args.jobs)
    about = (
        f"FID of {args.num_samples} samples against 1797 real digits, in features of a digit classifier. Teachers: "
        f"DiT-Micro/2, {args.teacher_iterations} steps of batch 128, seed 0; guidance 1.5. fp32, CPU."
    )
    if args.seeds:
        about += (
            f" Students: {args.iterations} steps of batch 64 on {args.num_trajectories} trajectories of 25 steps; "
            f"mean ± standard deviation over {args.seeds} seeds."
        )
    rows = rows_of(args.out, args.seeds, args.iterations)
    print("\n" + write_table(args.out, COLUMNS, rows, [about]))


if __name__ == "__main__":
    cli.main(build_parser(), run)
