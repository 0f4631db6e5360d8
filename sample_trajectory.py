"""Dump the teacher's ODE trajectories, the training data of its students.

    python sample_trajectory.py --teacher assets/digits_teacher.pt --out data/digits --num-trajectories 10000
    torchrun --nproc_per_node=8 sample_trajectory.py --teacher xl.pt --out data/xl --num-trajectories 2560000

To resume, run the same command again: finished shards are kept.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import cli
import distributed
from cli import UserError
from distributed import Ranks
from presets import preset
from randomness import LABEL_POLICIES, labels, noise
from shards import fill_store
from teacher_ode import TeacherODE, add_ode_options
from training import PRECISIONS, add_compile_option, autocast, compile_blocks
from trajectory import GRIDS, grid_steps, pick_points

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Dump the teacher's ODE trajectories.")
    parser.add_presets(preset("sample_trajectory.py"))
    group = parser.add_argument_group("teacher and its ODE")
    group.add_argument("--teacher", required=True, help="checkpoint of the teacher")
    group.add_argument("--teacher-weights", choices=("ema", "raw"), default="ema", help="which of its weights")
    add_ode_options(group)
    group = parser.add_argument_group("store")
    group.add_argument("--out", required=True, help="folder of the store")
    group.add_argument("--num-trajectories", type=cli.positive, required=True, help="how many, exactly")
    group.add_argument("--steps", type=cli.positive, default=4, help="student steps S whose points are stored")
    group.add_argument("--grid", choices=GRIDS, default="even", help="where they lie; even serves S = 1, 2 and 4")
    group.add_argument("--store", choices=("both", "x0", "xt"), default="both", help="predicted x_0, states, or both")
    group.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the stored points")
    group.add_argument("--rows-per-shard", type=cli.positive, default=8192, help="trajectories of one file")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=cli.not_negative, default=0, help="trajectory i depends on (seed, i) alone")
    group.add_argument("--label-policy", choices=LABEL_POLICIES, default="balanced", help="how labels are chosen")
    group.add_argument("--per-proc-batch-size", type=cli.positive, default=256, help="trajectories of a rank at once")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the teacher; the solver is fp32")
    add_compile_option(group)
    group.add_argument("--dry-run", action="store_true", help="check everything, print the plan as JSON, do nothing")
    distributed.add_device_option(group)
    return parser


def dump_shard(ode: TeacherODE, args, rows: range, points: list[int], ranks: Ranks, bar: tqdm) -> dict:
    """The trajectories ``rows`` as the tensors of one shard, on the CPU in the stored dtype."""
    shape, classes = ode.teacher.latent_shape, ode.teacher.num_classes
    parts = []
    for start in range(rows.start, rows.stop, args.per_proc_batch_size):
        indices = range(start, min(start + args.per_proc_batch_size, rows.stop))
        z = noise(args.seed, "trajectory", indices, shape)
        y = labels(args.seed, indices, classes, args.label_policy)
        with autocast(args.precision, ranks.device):
            x, x0 = ode(z.to(ranks.device), y.to(ranks.device))
        stored = {"noise": z} | pick_points(x, x0, points)
        if args.store != "both":
            del stored["x0" if args.store == "xt" else "xt"]
        parts.append({name: value.to("cpu", DTYPES[args.dtype]) for name, value in stored.items()} | {"label": y})
        bar.update(len(indices))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def run(args: argparse.Namespace) -> None:
    teacher, config = checkpoint.load_teacher(args.teacher, weights=args.teacher_weights)
    ode = TeacherODE(teacher, args)
    try:
        points = grid_steps(args.steps, args.grid, args.solver_steps)
    except ValueError as error:
        raise UserError(
            f"--steps {args.steps} --grid {args.grid} --solver-steps {args.solver_steps}: {error}"
        ) from None
    provenance = (
        config["provenance"]
        | ode.provenance
        | {
            "points": points,
            "store": args.store,
            "dtype": args.dtype,
            "precision": args.precision,
            "seed": args.seed,
            "label_policy": args.label_policy,
            "count": args.num_trajectories,
            "rows_per_shard": args.rows_per_shard,
        }
    )
    if args.dry_run:
        cli.show_plan(provenance, args)
        return
    ranks = distributed.setup(args.device)
    folder, count = Path(args.out), args.num_trajectories
    teacher.to(ranks.device)
    if args.compile:
        compile_blocks(teacher)

    def make(rows: range, bar: tqdm) -> dict[str, torch.Tensor]:
        return dump_shard(ode, args, rows, points, ranks, bar)

    written = fill_store(folder, provenance, ranks, make, unit="trajectory")
    if ranks.main:
        print(f"{folder}: {count} trajectories" if written else f"{folder}: already complete, {count} trajectories")
    distributed.finish(ranks)


if __name__ == "__main__":
    cli.main(build_parser(), run)
