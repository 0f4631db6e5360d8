"""Does it help to train a student on its own history? All trials on digits, beside plain training.

    python -m evaluations.study --out results/study          # trajectories, and the students with which trials begin
    python -m evaluations.rollout_trials --study results/study --out results/rollout

What a way of evaluations.rollout costs is CPU time of a training step, so it is compared with plain training twice:
after the same number of steps, and after the same time, for which the plain curve is interpolated.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np

from evaluations.experiments import CORES, Piece, run_pieces, write_table
from evaluations.study import START
from runtime import cli
from runtime.files import read_json

# A way, the student of the study and the step where it begins, and how many steps it takes.
TRIALS = [
    ("plain", "s4-m4-n2", 1200, 800),
    ("own", "s4-m4-n2", 600, 600),
    ("own", "s4-m4-n2", 1200, 400),
    ("plain", "s2-m4-n2", 1200, 600),
    ("own", "s2-m4-n2", 1200, 400),
]
SCREENED = [
    ("ramp", "s4-m4-n2", 600, 600),
    ("mixed", "s4-m4-n2", 600, 600),
    ("noise", "s4-m4-n2", 600, 600),
    ("relabel", "s4-m4-n2", 600, 600),
    ("plain", "s4-m4-n2", 2000, 800),
    ("own", "s4-m4-n2", 2000, 400),
]
STUDY_STEPS = 1200
COMPARED = ("cost", "fid", "same_steps", "same_time")
COLUMNS = {
    "target": "target",
    "steps": "S",
    "way": "history",
    "span": "in steps",
    "cost": "time of a step, plain = 1",
    "fid": "FID",
    "same_steps": "plain, same steps",
    "same_time": "plain, same time",
    "gain": "gain at the same time",
    "seeds": "seeds",
}


def pieces(study: Path, out: Path, seeds: int, screened: int, count: int) -> list[Piece]:
    """Every trial of each seed and target as a command, those of ``SCREENED`` for the first so many seeds only."""
    found = []
    trials = [(seed, *trial) for seed in range(seeds) for trial in TRIALS]
    trials += [(seed, *trial) for seed in range(min(seeds, screened)) for trial in SCREENED]
    for seed, way, student, first, iterations in trials:
        for target in ("x0", "xt") if way != "relabel" else ("xt",):
            run = f"{student}-{target}"
            begin = study / f"seed{seed}" / run / "checkpoints" / f"{first:07d}.pt"
            if first > STUDY_STEPS:
                begin = out / f"seed{seed}" / f"{run}-plain-{STUDY_STEPS}.pt"
            file = out / f"seed{seed}" / f"{run}-{way}-{first}.json"
            command = ["python", "-m", "evaluations.rollout", begin, "--way", way]
            command += ["--data-path", study / f"seed{seed}" / "trajectories", "--iterations", iterations]
            command += ["--num-samples", count, "--out", file]
            if (way, first) == ("plain", STUDY_STEPS):
                command.append("--keep")
            found.append(Piece(command, file, (begin,), START))
    return found


def rows(trials: list[dict]) -> list[dict]:
    """A row for each way, span, shape and target: means over seeds, gains with their spread (sample deviation)."""
    groups: dict[tuple, list[dict]] = {}
    for trial in trials:
        if trial["way"] != "plain":
            key = (trial["target"], trial["steps"], trial["way"], trial["first"], trial["curve"][-1][0])
            groups.setdefault(key, []).append(trial | compared(trial, trials))
    table = []
    for (target, steps, way, first, last), found in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1])):
        means = {key: statistics.fmean(each[key] for each in found) for key in COMPARED}
        gains = [each["same_time"] - each["fid"] for each in found]
        spread = f" ± {statistics.stdev(gains):.2f}" if len(gains) > 1 else ""
        about = {"target": target, "steps": steps, "way": way, "span": f"{first} to {last}", "seeds": len(found)}
        table.append(about | means | {"gain": f"{statistics.fmean(gains):+.2f}{spread}", "gains": gains})
    return table


def compared(trial: dict, trials: list[dict]) -> dict[str, float]:
    """FID of a trial and of plain training after the same steps and the same time, and what its step costs."""
    same = ("target", "steps", "seed")
    plain = [each for each in trials if each["way"] == "plain" and all(each[key] == trial[key] for key in same)]
    curve = sorted({tuple(point) for each in plain for point in each["curve"]})
    cost = trial["ms_per_step"] / statistics.fmean(each["ms_per_step"] for each in plain)
    last, value = trial["curve"][-1]
    later = trial["first"] + max(1, cost) * (last - trial["first"])  # what costs as much is not below 1 but by chance
    return {"cost": cost, "fid": value, "same_steps": at(curve, last), "same_time": at(curve, later)}


def at(curve: list[tuple], step: float) -> float:
    """A curve of (step, value) at a step between, in a straight line. ``ValueError`` outside of it."""
    if not curve[0][0] <= step <= curve[-1][0]:
        raise ValueError(f"step {step:.0f} lies outside of the plain curve, {curve[0][0]} to {curve[-1][0]}")
    steps, values = zip(*curve)
    return float(np.interp(step, steps, values))


def run(args: argparse.Namespace) -> None:
    todo = pieces(args.study, args.out, args.seeds, args.screened, args.num_samples)
    if args.dry_run:
        cli.show_plan({"trials": len(todo), "left": sum(not piece.makes.exists() for piece in todo)}, args)
        return
    failed = run_pieces(todo, args.jobs)
    if failed:
        raise cli.RunError(f"{len(failed)} trials were not made; the same command tries them again; {failed[0]}")
    note = (
        f"FID of {args.num_samples} samples; the digits teacher, M4, N=2, batch 64, fp32, a CPU thread for each trial."
    )
    print(write_table(args.out, COLUMNS, rows([read_json(piece.makes) for piece in todo]), [note]))


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, prog="evaluations.rollout_trials", description="Trials of training on own history.")
    parser.add_argument("--study", type=Path, default=Path("results/study"), help="Folder of evaluations.study.")
    parser.add_argument("--out", type=Path, default=Path("results/rollout"), help="Folder of all that is made.")
    parser.add_argument("--seeds", type=cli.positive, default=3, help="Seeds of the study to continue.")
    parser.add_argument("--screened", type=cli.not_negative, default=1, help="Seeds for the ways tried on few.")
    parser.add_argument("--num-samples", type=cli.positive, default=5000, help="Samples for an FID.")
    parser.add_argument("--jobs", type=cli.positive, default=CORES, help="Processes side by side, one thread each.")
    cli.add_dry_run_option(parser)
    return parser


if __name__ == "__main__":
    cli.main(build_parser(), run)
