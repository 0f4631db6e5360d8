"""Train a DiT teacher by DiT's recipe, on digits, on a folder of images, or on their latents.

    python train.py --model DiT-Micro/2 --data-path digits
    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path imagenet/train --image-size 256 --vae ema

To resume, run the same command again.
"""

import argparse

import torch
from torch.utils.data import Dataset

import cli
import distributed
from cli import UserError
from data import choose_vae, latent_shape, open_source, real_latents, to_uint8
from diffusion import create_diffusion
from models import DiT_models
from randomness import Shuffle, generator, labels, noise
from samples import save_grid
from training import Network, Trainer, add_training_options, autocast, prepare_blocks, training_config
from vae import load_vae


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Train a DiT teacher.")
    group = parser.add_argument_group("data and model")
    group.add_argument(
        "--data-path", required=True, help='"digits", an image folder with a sub-folder per class, or a latent store'
    )
    group.add_argument("--image-size", type=cli.positive, help="pixels of a side, for image folders")
    group.add_argument(
        "--vae", help="ema, mse, a folder or hub id; none, the default for images: the model works on pixels"
    )
    group.add_argument("--unconditional", action="store_true", help="no classes; an image folder may then be flat")
    group.add_argument("--model", required=True, choices=DiT_models, metavar="NAME", help=", ".join(DiT_models))
    group.add_argument("--label-dropout", type=float, default=0.1, help="rate of the null label in training")
    group.add_argument("--hflip", action=argparse.BooleanOptionalAction, default=True, help="mirror images at random")
    add_training_options(parser, lr=1e-4, batch=256, iterations=400_000)
    return parser


class TeacherBatches(Dataset):
    """Item n is this rank's share of step n: images or latents, labels with some dropped, times and noise."""

    def __init__(self, source, shape: tuple[int, int, int], args, ranks):
        self.source, self.shape, self.args, self.ranks = source, shape, args, ranks
        self.shuffle = Shuffle(source.count, args.seed)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        first = step * self.args.global_batch_size
        share = self.ranks.share(self.args.global_batch_size)
        positions = range(first + share.start, first + share.stop)
        draws = [generator(self.args.seed, "augmentation", position) for position in positions]
        t = torch.tensor([int(draw.integers(1000)) for draw in draws])
        dropped = torch.tensor([draw.random() < self.args.label_dropout for draw in draws])
        flips = torch.tensor([draw.random() < 0.5 and self.args.hflip for draw in draws]).numpy()
        real = self.source.read(self.shuffle.rows(positions.start, positions.stop), flips)
        return real | {
            "y": torch.where(dropped, self.source.num_classes, real["y"]),
            "t": t,
            "noise": noise(self.args.seed, "training", positions, self.shape),
            "posterior": noise(self.args.seed, "posterior", positions, self.shape),  # of the VAE's encoder
        }


def run(args: argparse.Namespace) -> None:
    source = open_source(args.data_path, args.image_size, args.unconditional)
    vae_name = choose_vae(source, args.vae)
    ranks = distributed.setup(args.device)
    needs_vae = args.sample_every or source.vae is None  # latents are decoded for the previews only
    vae = load_vae(vae_name if needs_vae else None, ranks.device)
    channels, side, _ = latent_shape(source, vae)
    torch.manual_seed(args.seed)
    try:
        # Labels are dropped by the data, a function of the position: the module itself stays in eval mode throughout.
        model = DiT_models[args.model](
            input_size=side,
            in_channels=channels,
            num_classes=source.num_classes,
            class_dropout_prob=args.label_dropout,
        ).eval()
    except ValueError as error:
        raise UserError(f"--model {args.model} does not fit --data-path {args.data_path}: {error}") from None

    config = {
        "kind": "teacher",
        "model": model.config,
        "vae": vae_name,
        "provenance": source.identity,
        "training": training_config(args) | {"label_dropout": args.label_dropout, "hflip": args.hflip},
    }
    if args.dry_run:
        cli.show_plan(
            config | {"iterations": args.iterations, "parameters": sum(p.numel() for p in model.parameters())}, args
        )
        return
    prepare_blocks(model, args)
    network = Network(model, ranks, args.lr, args.clip, args.ema_decay)
    trainer = Trainer(args, ranks, config, {"": network})
    diffusion, sampler = create_diffusion(), create_diffusion("25")

    def losses(batch: dict) -> dict:
        x = real_latents(batch, vae)
        return diffusion.training_losses(network.model, x, batch["t"], {"y": batch["y"]}, batch["noise"])

    def train_step(batch: dict) -> dict:
        return trainer.backward(network, losses, batch) | {"grad_norm": network.step()}

    def preview(path) -> None:
        count = min(64, 8 * max(source.num_classes, 1))
        z = noise(0, "preview", range(count), model.latent_shape).to(ranks.device)
        y = labels(0, range(count), source.num_classes).to(ranks.device)
        scale = 1.5 if args.label_dropout and source.num_classes else 1.0
        with autocast(args.precision, ranks.device):
            states, _ = sampler.ddim_trajectory(network.ema, z, y, scale)
        save_grid(path, to_uint8(vae.decode(states[:, -1])))

    trainer.run(TeacherBatches(source, model.latent_shape, args, ranks), train_step, preview)
    distributed.finish(ranks)


if __name__ == "__main__":
    cli.main(build_parser(), run)
