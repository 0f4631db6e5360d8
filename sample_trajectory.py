"""Dump the teacher's ODE trajectories, the training data of its students.

    python sample_trajectory.py --teacher assets/digits_teacher.pt --out data/digits --num-trajectories 10000
    torchrun --nproc_per_node=8 sample_trajectory.py --teacher xl.pt --out data/xl --num-trajectories 2560000

To resume, run the same command again: finished shards are kept.
"""

import argparse

import torch

from costs.commands import add_presets, check_plan, plan_command
from diffusion.teacher_ode import GRIDS, TARGETS, OdeOptions, TeacherODE, grid_steps, pick_points
from runtime import cli, distributed
from runtime.checks import writable_folder
from runtime.cli import UserError, add_options, chosen, read_options
from runtime.precision import (
    DTYPES,
    STORED,
    add_compile_option,
    add_precision_option,
    autocast,
    cast_weights,
    compile_each,
)
from runtime.randomness import LABEL_POLICIES, labels, noise
from runtime.vae import resolve_name
from stores import checkpoints
from stores.captions import add_captions_option, open_conditions, require_captions
from stores.shards import ShardWriter, add_store_options
from stores.trajectories import kept_targets


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Dump the teacher's ODE trajectories.")
    add_presets(parser, "sample_trajectory.py")
    group = parser.add_argument_group("teacher and its ODE")
    group.add_argument("--teacher", type=cli.file, required=True, help="Checkpoint, official name or hub id.")
    checkpoints.add_file_options(group)
    group.add_argument(
        "--vae", type=cli.name, help="Autoencoder of a PixArt in diffusers' layout: sdxl, ema, a folder or hub id."
    )
    add_captions_option(group)
    group.add_argument("--teacher-weights", choices=("ema", "raw"), default="ema", help="Use these of its weights.")
    add_options(group, OdeOptions)
    group = parser.add_argument_group("store")
    add_store_options(group, "Trajectories")
    group.add_argument(
        "--num-trajectories",
        type=cli.positive,
        required=True,
        help="Number of trajectories; a larger one than before adds to the store, whose last shard is made anew.",
    )
    group.add_argument("--steps", type=cli.positive, default=4, help="Student steps S whose points are stored.")
    group.add_argument("--grid", choices=GRIDS, default="even", help="Where they lie; even serves S = 1, 2 and 4.")
    group.add_argument(
        "--store", choices=("both", *TARGETS), default="both", help="Keep predicted x_0, states, or both."
    )
    group.add_argument("--dtype", choices=STORED, default="fp16", help="Number format of the stored points.")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=cli.not_negative, default=0, help="Trajectory i depends on (seed, i) alone.")
    group.add_argument("--label-policy", choices=LABEL_POLICIES, default="balanced", help="Choose labels in this way.")
    group.add_argument("--per-proc-batch-size", type=cli.positive, default=256, help="Trajectories of a rank at once.")
    add_precision_option(group, of="the teacher; the solver is fp32")
    add_compile_option(group)
    cli.add_dry_run_option(group)
    distributed.add_device_option(group)
    return parser


def run(args: argparse.Namespace) -> None:
    require_captions(args.captions)
    writable_folder("--out", args.out)
    context = distributed.choose_device(args.device)
    teacher, config = checkpoints.load_teacher(
        args.teacher, weights=args.teacher_weights, heads=args.teacher_heads, vae=args.vae, process=args.teacher_process
    )
    if args.vae and resolve_name(args.vae) != config["vae"]:
        raise UserError(f"--vae {args.vae}: this teacher works on {config['vae'] or 'pixels'}, leave the option out")
    conditions = open_conditions(args.captions, teacher, config["provenance"])
    ode = TeacherODE(teacher, conditions=conditions, **vars(read_options(OdeOptions, vars(args))))
    try:
        solver_indices = grid_steps(args.steps, args.grid, args.solver_steps)
    except ValueError as error:
        raise UserError(
            f"--steps {args.steps} --grid {args.grid} --solver-steps {args.solver_steps}: {error}"
        ) from None
    provenance = config["provenance"] | ode.provenance | {"solver_indices": solver_indices}
    provenance |= chosen(args, ("store", "dtype", "precision", "seed", "label_policy"))
    provenance |= {"count": args.num_trajectories, "rows_per_shard": args.rows_per_shard}
    distributed.join(context)
    writer = ShardWriter(args.out, provenance, context, unit="trajectory", grows=True)
    text_tokens = conditions.max_text_tokens
    plan = plan_command("sample_trajectory.py", teacher.config, vars(args), context, text_tokens=text_tokens)
    check_plan(plan, provenance, vars(args), context)
    cast_weights(teacher.to(context.device), args.precision)
    if args.compile:
        compile_each(teacher.blocks)
    kept = kept_targets(args.store)

    with writer:
        for rows in writer.missing_shards():
            parts = []
            for start in range(rows.start, rows.stop, args.per_proc_batch_size):
                indices = range(start, min(start + args.per_proc_batch_size, rows.stop))
                z = noise(args.seed, "trajectory", indices, teacher.latent_shape)
                y = labels(args.seed, indices, conditions.count, args.label_policy)
                with autocast(args.precision, context.device):
                    x, x0 = ode(z.to(context.device), conditions(y).to(context.device))
                points = pick_points(x, x0, solver_indices)
                stored = {"noise": z} | {name: points[name] for name in kept}
                stored = {name: value.to("cpu", DTYPES[args.dtype]) for name, value in stored.items()}
                parts.append(stored | {"label": y})
                writer.progress(len(indices))
            writer.write(rows, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    if context.is_main:
        print(
            f"{args.out}: " + ("already complete, " if writer.complete else "") + f"{provenance['count']} trajectories"
        )
    distributed.finish(context)


if __name__ == "__main__":
    cli.main(build_parser(), run)
