"""Distil a DiT teacher into an S-step student by regression on its stored trajectories (ARD, Eq. 6).

    python train_ARD.py --data-path data/digits --stack 2
    torchrun --nproc_per_node=8 train_ARD.py --model DiT-XL/2 --global-batch-size=64 --stack=6 --data-path data/xl

--mask M1 or --stack 0 is step distillation, --steps 1 is knowledge distillation. To resume, run the same command again.
"""

import argparse
from functools import partial

import torch

import checkpoint
import cli
import distributed
from cli import UserError
from models import DiT, DiT_models
from models_ard import ARD, MASKS
from presets import preset
from provenance import require_same
from samples import preview_images, save_grid
from teacher_ode import TeacherODE, add_ode_options
from training import Network, Trainer, add_training_options, prepare_blocks, rank_sizes, training_config
from trajectory import GRIDS, TARGETS, OnlineBatches, TrajectoryBatches, TrajectoryStore, grid_steps
from vae import load_vae


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Distil a teacher into a few-step student by regression.")
    parser.add_presets(preset("train_ARD.py"))
    group = parser.add_argument_group("teacher")
    group.add_argument("--data-path", help="trajectory store of sample_trajectory.py")
    group.add_argument("--teacher", help="its checkpoint; the default is the one that the store names")
    group.add_argument("--online", action="store_true", help="make trajectories in each step instead of reading them")
    add_ode_options(parser.add_argument_group("the teacher's ODE, with --online"))
    group = parser.add_argument_group("student")
    group.add_argument("--model", choices=DiT_models, metavar="NAME", help="the teacher's size, checked if given")
    group.add_argument("--steps", type=cli.positive, default=4, help="S, the student's steps")
    group.add_argument("--mask", choices=MASKS, default="M4", help="what a step may see: M1 itself .. M4 all before")
    group.add_argument("--stack", type=cli.not_negative, default=6, help="N, lower blocks that see history")
    group.add_argument("--target", choices=TARGETS, default="x0", help="predict x_0 from the next point, or that point")
    group.add_argument("--grid", choices=GRIDS, default="even", help="where the points lie on the teacher's trajectory")
    group.add_argument(
        "--level-embedding",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="add a learned vector per step to the tokens",
    )
    add_training_options(parser, lr=1e-4, batch=64, iterations=300_000)
    return parser


def open_teacher(args) -> tuple[DiT, dict, dict, TrajectoryStore | TeacherODE]:
    """The teacher, its config, the provenance of its trajectories, and where they come from: a store or the ODE."""
    if args.online == bool(args.data_path):
        raise UserError("--data-path: give the folder of a trajectory store, or else --online and --teacher")
    if not args.online:
        store = TrajectoryStore(args.data_path)
        return *store.load_teacher(args.teacher), store.provenance, store
    if not args.teacher:
        raise UserError("--online: needs --teacher, the checkpoint whose trajectories to make")
    teacher, config = checkpoint.load_teacher(args.teacher)
    ode = TeacherODE(teacher, args)
    made = {"seed": args.seed, "label_policy": "balanced", "online": True}
    return teacher, config, config["provenance"] | ode.provenance | made, ode


def regression_losses(predictions: torch.Tensor, trajectory: torch.Tensor) -> torch.Tensor:
    """Eq. 6, mean over steps: predictions (B, S, C, H, W) of all points but the first of (B, S+1, C, H, W) -> (B,)."""
    return (predictions.float() - trajectory[:, 1:]).square().flatten(1).mean(1)


def student_losses(student, batch: dict) -> dict[str, torch.Tensor]:
    """The losses of a student, perhaps in DDP, on a batch, as ``Trainer.backward`` wants them."""
    return {"loss": regression_losses(student(batch["trajectory"][:, :-1], batch["y"]), batch["trajectory"])}


def run(args: argparse.Namespace) -> None:
    teacher, teacher_config, provenance, trajectories = open_teacher(args)
    if args.model:
        size = DiT_models[args.model].keywords
        require_same(f"--model {args.model}: the teacher is another model", teacher.config, size)
    try:
        points = grid_steps(args.steps, args.grid, provenance["solver_steps"])
        student = ARD.from_teacher(teacher, args.steps, args.mask, args.stack, args.level_embedding)
    except ValueError as error:
        raise UserError(f"--steps {args.steps} --stack {args.stack} --grid {args.grid}: {error}") from None
    ranks = distributed.setup(args.device)
    make_batches = OnlineBatches if args.online else TrajectoryBatches
    batches = make_batches(trajectories, points, args.target, args, ranks)
    vae = load_vae(teacher_config["vae"] if args.sample_every else None, ranks.device)

    config = {
        "kind": "student",
        "model": student.config,
        "vae": teacher_config["vae"],
        "provenance": provenance | {"grid": args.grid, "points": points, "target": args.target},
        "training": training_config(args) | {"loss": "R"},
    }
    if args.dry_run:
        cli.show_plan(config | {"iterations": args.iterations, "ranks": rank_sizes(args, ranks)}, args)
        return
    prepare_blocks(student, args)
    if args.online:
        teacher.to(ranks.device)
        prepare_blocks(teacher, args)
    network = Network(student, ranks, args.lr, args.clip, args.ema_decay)
    trainer = Trainer(args, ranks, config, {"": network})

    losses = partial(student_losses, network.model)

    def train_step(batch: dict) -> dict:
        return trainer.backward(network, losses, batches.complete(batch)) | {"grad_norm": network.step()}

    def preview(path) -> None:
        save_grid(path, preview_images(network.ema, vae, range(64), args.precision))

    trainer.run(batches, train_step, preview)
    distributed.finish(ranks)


if __name__ == "__main__":
    cli.main(build_parser(), run)
