"""Distil a DiT teacher into an S-step student by regression on its stored trajectories (ARD, Eq. 6).

    python train_ARD.py --data-path data/digits --stack 2
    torchrun --nproc_per_node=8 train_ARD.py --model DiT-XL/2 --global-batch-size=64 --stack=6 --data-path data/xl

--mask M1 or --stack 0 is step distillation, --steps 1 is knowledge distillation. To resume, run the same command again.
"""

import argparse

import torch
from torch.utils.data import Dataset

import checkpoint
import cli
import distributed
from cli import UserError
from data import to_uint8
from models import DiT_models
from models_ard import ARD, MASKS
from provenance import require_same
from randomness import Shuffle, labels, noise
from samples import save_grid
from training import Network, Trainer, add_training_options, autocast, training_config
from trajectory import GRIDS, TARGETS, TrajectoryStore, grid_steps
from vae import load_vae


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Distil a teacher into a few-step student by regression.")
    group = parser.add_argument_group("teacher and student")
    group.add_argument("--data-path", required=True, help="trajectory store of sample_trajectory.py")
    group.add_argument("--teacher", help="its checkpoint; the default is the one that the store names")
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


class TrajectoryBatches(Dataset):
    """Item n is this rank's share of step n: trajectories (b, S+1, C, H, W), noisiest first, and labels (b,)."""

    def __init__(self, store: TrajectoryStore, points: list[int], args, ranks):
        self.store, self.args, self.ranks = store, args, ranks
        self.columns = store.point_columns(points, args.target)
        self.shuffle = Shuffle(len(store), args.seed)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        first = step * self.args.global_batch_size
        share = self.ranks.share(self.args.global_batch_size)
        rows = self.shuffle.rows(first + share.start, first + share.stop)
        trajectory, y = self.store.read(rows, self.args.target, self.columns)
        return {"trajectory": trajectory, "y": y}


def run(args: argparse.Namespace) -> None:
    store = TrajectoryStore(args.data_path)
    teacher, teacher_config = checkpoint.load_teacher(args.teacher or store.provenance["teacher"])
    require_same(
        f"--data-path {args.data_path}: these trajectories are another teacher's",
        store.provenance,
        {name: teacher_config["provenance"][name] for name in ("teacher_hash", "vae")},
    )
    if args.model:
        size = DiT_models[args.model].keywords
        require_same(f"--model {args.model}: the teacher is another model", teacher.config, size)
    try:
        points = grid_steps(args.steps, args.grid, store.provenance["solver_steps"])
        student = ARD.from_teacher(teacher, args.steps, args.mask, args.stack, args.level_embedding)
    except ValueError as error:
        raise UserError(f"--steps {args.steps} --stack {args.stack} --grid {args.grid}: {error}") from None
    ranks = distributed.setup(args.device)
    batches = TrajectoryBatches(store, points, args, ranks)
    vae = load_vae(teacher_config["vae"] if args.sample_every else None, ranks.device)

    config = {
        "kind": "student",
        "model": student.config,
        "vae": teacher_config["vae"],
        "provenance": store.provenance | {"grid": args.grid, "points": points, "target": args.target},
        "training": training_config(args) | {"loss": "R"},
    }
    if args.dry_run:
        cli.show_plan(
            config | {"iterations": args.iterations, "epochs": args.iterations * args.global_batch_size / len(store)}
        )
        return
    network = Network(student, ranks, args.lr, args.clip, args.ema_decay)
    trainer = Trainer(args, ranks, config, {"": network})

    def losses(batch: dict) -> torch.Tensor:
        trajectory = batch["trajectory"]
        predictions = network.model(trajectory[:, :-1], batch["y"])
        return (predictions.float() - trajectory[:, 1:]).square().flatten(1).mean(1)

    def train_step(batch: dict) -> dict:
        loss = trainer.backward(network, losses, batch)
        return {"loss": loss, "grad_norm": network.step()}

    @torch.no_grad()
    def preview(path) -> None:
        z = noise(0, "preview", range(64), student.latent_shape).to(ranks.device)
        y = labels(0, range(64), student.num_classes).to(ranks.device)
        with autocast(args.precision, ranks.device):
            predictions = network.ema.sample(z, y)
        save_grid(path, to_uint8(vae.decode(predictions[:, -1].float())))

    trainer.run(batches, train_step, preview)
    distributed.finish(ranks)


if __name__ == "__main__":
    cli.main(build_parser(), run)
