"""Fine-tune a student with the regression loss plus an adversarial loss on its last prediction: ARD (R+D).

    python train_ARD_gan.py --data-path data/digits --real-data-path digits --ckpt-path results/.../0002000.pt
    torchrun --nnodes=1 --nproc_per_node=8 train_ARD_gan.py --model DiT-XL/2 --global-batch-size=48 --stack=6 \
        --ckpt_path=.../checkpoints/0300000.pt --data-path data/xl --real-data-path data/imagenet_latents

Each step updates the student, then the discriminator's heads on the very predictions that the student was judged by.
To resume, run the same command again.
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset

import checkpoint
import cli
import distributed
from cli import UserError
from data import latent_shape, open_source, real_latents
from discriminator import Discriminator, FrozenFeatures, adaptive_weight, generator_losses, hinge_losses
from evaluations.flops import count_flops
from latents import is_store
from models import DiT, DiT_models
from models_ard import ARD
from presets import preset
from provenance import require_same
from quality import Quality, add_quality_options
from randomness import Shuffle, generator, noise
from samples import preview_images, save_grid
from train_ARD import regression_losses
from training import Network, Trainer, add_training_options, autocast, prepare_blocks, training_config
from trajectory import TrajectoryBatches, TrajectoryStore
from vae import load_vae

# What trajectories must share with those that the student was trained on; seed and number may differ.
SAME_TEACHER = ("teacher_hash", "vae", "solver", "solver_steps", "cfg_scale", "cfg_channels")


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Fine-tune a student by regression and an adversarial loss.")
    parser.add_presets(preset("train_ARD_gan.py"), count_step_of_options)
    group = parser.add_argument_group("student and teacher")
    checkpoint.add_student_options(group)
    group.add_argument("--init-weights", choices=("ema", "raw"), default="ema", help="which of its weights to start at")
    group.add_argument("--teacher", help="its checkpoint; the default is the one that the store names")
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", required=True, help="trajectory store of sample_trajectory.py")
    group.add_argument("--real-data-path", required=True, help='"digits", an image folder, or a latent store')
    group.add_argument(
        "--hflip",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="mirror real images at random; the default is what the teacher was trained with",
    )
    group = parser.add_argument_group("discriminator")
    group.add_argument("--gan-weight", type=float, default=10.0, help="times the adaptive weight of the GAN loss")
    group.add_argument("--gan-warmup", type=cli.not_negative, default=3000, help="first steps, in which it is 0")
    group.add_argument("--rollout", action="store_true", help="judge predictions from the student's own history")
    group.add_argument("--d-lr", type=float, default=1e-3, help="AdamW's learning rate of the heads")
    group.add_argument("--d-time", type=cli.not_negative, default=0, help="time 0..999 the teacher looks at, 0: clean")
    group.add_argument("--d-width", type=cli.positive, help="channels of a head; the default is the teacher's width")
    group.add_argument(
        "--bn-group", type=cli.positive, default=6, help="consecutive samples that share norm statistics"
    )
    add_training_options(parser, lr=1e-4, batch=48, iterations=40_000)
    add_quality_options(parser)
    return parser


#################################################################################
#                                     Data                                      #
#################################################################################


class GanBatches(Dataset):
    """Item n is this rank's share of step n: trajectories with labels, and real images with theirs, in orders apart."""

    def __init__(self, trajectories: TrajectoryBatches, source, shape: tuple[int, int, int], hflip: bool, args):
        self.trajectories, self.source, self.shape, self.hflip, self.args = trajectories, source, shape, hflip, args
        self.shuffle = Shuffle(source.count, args.seed, "real")

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        size, seed = self.args.global_batch_size, self.args.seed
        share = self.trajectories.ranks.share(size)
        positions = range(step * size + share.start, step * size + share.stop)
        flips = [self.hflip and generator(seed, "augmentation", i).random() < 0.5 for i in positions]
        real = self.source.read(self.shuffle.rows(positions.start, positions.stop), np.array(flips))
        real["real_y"] = real.pop("y")
        real["posterior"] = noise(seed, "posterior", positions, self.shape)
        if self.args.d_time:
            real["real_noise"] = noise(seed, "discriminator", [2 * i for i in positions], self.shape)
            real["fake_noise"] = noise(seed, "discriminator", [2 * i + 1 for i in positions], self.shape)
        return self.trajectories[step] | real


def open_real(args, teacher: DiT, vae_name: str | None, device: torch.device):
    """The source of real images and the autoencoder; ``UserError`` where they do not suit the teacher."""
    path = args.real_data_path
    encoded = is_store(path)  # then the autoencoder is needed for pictures only
    vae = load_vae(vae_name if not encoded or args.sample_every or args.eval_every else None, device)
    image_size = None if encoded or path == "digits" else teacher.input_size * vae.factor
    source = open_source(path, image_size, teacher.num_classes == 0, "--real-data-path")
    found = {"classes": source.num_classes, "latent shape": latent_shape(source, vae)}
    wanted = {"classes": teacher.num_classes, "latent shape": teacher.latent_shape}
    if encoded:
        found, wanted = found | {"vae": source.vae}, wanted | {"vae": vae_name}
    require_same(f"--real-data-path {path}: these images do not suit the teacher", found, wanted)
    return source, vae


#################################################################################
#                                   The step                                    #
#################################################################################


class Game:
    """The losses of both players, as ``Trainer.backward`` wants them.

    B batch   S steps   C, H, W the latent
    """

    def __init__(self, student, heads, features: FrozenFeatures, total: Callable, samples: float):
        """``student`` and ``heads``: the modules that are trained, perhaps in DDP. ``total``: a tensor's sum over all
        ranks; ``samples``: how many samples one call has on all ranks together.
        """
        self.student, self.heads, self.features, self.total, self.samples = student, heads, features, total, samples
        self.last_layer = getattr(student, "module", student).heads[-1].linear.weight
        self.own_heads = getattr(heads, "module", heads)
        self.fakes = []  # the student's last predictions, for the discriminator's turn

    def student_losses(self, batch: dict, gan_weight: float) -> dict[str, torch.Tensor]:
        """Regression (Eq. 6, mean over steps) plus the adversarial loss times ``gan_weight`` and the adaptive weight.

        The adversarial loss is differentiated down to the last prediction only and enters the student as a linear term
        with that slope: value and gradient are those of the whole loss, and the student is walked back once.
        """
        trajectory, y = batch["trajectory"], batch["y"]
        histories, labels = trajectory[:, :-1], y
        if "rollout" in batch:  # true and own histories in one forward
            histories, labels = torch.cat([histories, batch["rollout"]]), torch.cat([y, y])
        predictions = self.student(histories, labels).float()
        regression = regression_losses(predictions[: len(y)], trajectory)  # (B,)
        last = predictions[-len(y) :, -1]  # (B, C, H, W)
        self.fakes.append(last.detach())
        if not gan_weight:
            return {"loss": regression, "regression": regression}
        adversarial, slope = self.adversarial(last, batch)
        norms = self.slopes_at_last_layer(regression, last, slope)
        weight = gan_weight * adaptive_weight(*norms)
        linear = (slope * (last - last.detach())).flatten(1).sum(1)  # zero
        scalars = {"gan_weight": weight, "regression_grad": norms[0], "adversarial_grad": norms[1]}
        return {
            "loss": regression + weight * (adversarial + linear),
            "regression": regression,
            "g_loss": adversarial,
            **{name: value.expand(len(y)) for name, value in scalars.items()},
        }

    def adversarial(self, x: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (B, C, H, W) predictions -> the adversarial losses (B,) and the slope of their sum in x (B, C, H, W)."""
        self.own_heads.eval()  # the student's turn leaves the spectral norms' power iteration alone
        losses = generator_losses(*self.own_heads(self.features(x, batch["y"], batch.get("fake_noise"))))
        self.own_heads.train()
        return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]

    def slopes_at_last_layer(self, regression, last, slope) -> torch.Tensor:
        """Norms of the gradients of both mean losses at the student's last weight, over all ranks: (2,)."""
        gradients = [
            torch.autograd.grad(regression.sum(), self.last_layer, retain_graph=True)[0],
            torch.autograd.grad(last, self.last_layer, slope, retain_graph=True)[0],
        ]
        return self.total(torch.stack(gradients)).flatten(1).norm(dim=1) / self.samples

    def heads_losses(self, batch: dict) -> dict[str, torch.Tensor]:
        """The hinge losses of pairs of a prediction "fake" and a real latent "real", (B, C, H, W) each."""
        with torch.no_grad():  # only the heads learn: the features need no graph
            fake = self.features(batch["fake"], batch["y"], batch.get("fake_noise"))
            real = self.features(batch["real"], batch["real_y"], batch.get("real_noise"))
        fake, real = self.heads(fake, real)
        right = ((fake < 0).float() + (real > 0).float()) / 2
        shown = {"logit_fake": fake, "logit_real": real, "d_accuracy": right}
        means = {name: value.detach().flatten(1).mean(1) for name, value in shown.items()}
        return {"loss": hinge_losses(fake, real)} | means


def build_heads(teacher: DiT, args) -> Discriminator:
    """The discriminator's heads for this teacher."""
    return Discriminator(len(teacher.blocks), teacher.config["hidden_size"], args.d_width, args.bn_group)


@torch.no_grad()
def own_history(student: ARD, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What the student would see of itself: z (B, C, H, W) noise, y (B,) labels -> (B, S, C, H, W), the noise first."""
    return torch.cat([z[:, None], student.sample(z, y)[:, :-1]], dim=1)


def count_step(student: dict, teacher: dict, args) -> dict:
    """Operations of one sample's step (two per multiply-add) by the models' configs; makes no weights."""
    with torch.device("meta"):
        student, teacher = ARD(**student).to("meta"), DiT(**teacher).to("meta")
        heads = build_heads(teacher, args)
        trajectory, y = torch.empty(1, student.steps + 1, *student.latent_shape), torch.zeros(1, dtype=torch.int64)
    game = Game(student, heads, FrozenFeatures(teacher, args.d_time), total=lambda tensor: tensor, samples=1)
    latents = dict.fromkeys(("fake", "real", "fake_noise", "real_noise"), trajectory[:, 0])
    batch = {"trajectory": trajectory, "y": y, "real_y": y, **latents}

    def regression() -> None:
        game.student_losses(batch, 0.0)["loss"].sum().backward()

    def both() -> None:
        if args.rollout:
            batch["rollout"] = own_history(student, trajectory[:, 0], y)
        game.student_losses(batch, 1.0)["loss"].sum().backward()
        game.heads_losses(batch)["loss"].sum().backward()

    counts = {"R": count_flops(regression), "R+D": count_flops(both)}
    return {
        "discriminator_parameters": sum(p.numel() for p in heads.parameters()),
        "tflops_per_sample": {name: count / 1e12 for name, count in counts.items()},
        "flops_over_regression": counts["R+D"] / counts["R"],
    }


def count_step_of_options(args) -> dict:
    """The same for the sizes that a preset names, before there is a checkpoint."""
    teacher = DiT_models[args.model].keywords
    student = teacher | {"steps": args.steps, "mask": args.mask, "history_layers": args.stack}
    try:
        return count_step(student, teacher, args)
    except ValueError as error:  # a model that cannot be, e.g. history deeper than it
        return {"not_counted": str(error)}


def run(args: argparse.Namespace) -> None:
    if args.d_time > 999:
        raise UserError(f"--d-time {args.d_time}: must be between 0 (clean) and 999")
    student, start = checkpoint.load_named_student(args, args.init_weights)
    store = TrajectoryStore(args.data_path)
    teacher, teacher_config = store.load_teacher(args.teacher)
    origin = start["provenance"]
    require_same(
        f"--data-path {args.data_path}: not the trajectories that the student was trained on",
        store.provenance,
        {name: origin[name] for name in SAME_TEACHER},
    )
    ranks = distributed.setup(args.device)
    source, vae = open_real(args, teacher, teacher_config["vae"], ranks.device)
    trajectories = TrajectoryBatches(store, origin["points"], origin["target"], args, ranks)
    hflip = teacher_config["training"].get("hflip", True) if args.hflip is None else args.hflip
    quality = Quality(args, ranks, vae, teacher.input_size * vae.factor) if args.eval_every else None

    options = ("init_weights", "gan_weight", "gan_warmup", "rollout", "d_lr", "d_time", "d_width", "bn_group")
    config = {
        "kind": "student",
        "model": student.config,
        "vae": teacher_config["vae"],
        "provenance": store.provenance
        | {name: origin[name] for name in ("grid", "points", "target")}
        | {"start_hash": origin["weights_hash"], "start_step": origin["step"], "real": source.identity},
        "training": training_config(args)
        | {"loss": "R+D", "hflip": hflip, "accumulation": args.accumulation}
        | {name: getattr(args, name) for name in options},
    }
    if args.dry_run:
        cli.show_plan(config | {"iterations": args.iterations} | count_step(student.config, teacher.config, args), args)
        return
    torch.manual_seed(args.seed)
    prepare_blocks(student, args)
    network = Network(student, ranks, args.lr, args.clip, args.ema_decay)
    critic = Network(build_heads(teacher, args), ranks, args.d_lr, args.clip)
    trainer = Trainer(args, ranks, config, {"": network, "_d": critic})
    features = FrozenFeatures(teacher.to(ranks.device), args.d_time)
    game = Game(network.model, critic.model, features, ranks.all_reduce, args.global_batch_size / args.accumulation)

    def train_step(batch: dict) -> dict:
        batch["real"] = real_latents(batch, vae)
        if args.rollout:
            with autocast(args.precision, ranks.device):
                batch["rollout"] = own_history(network.module, batch["trajectory"][:, 0], batch["y"]).float()
        gan_weight = args.gan_weight if trainer.step >= args.gan_warmup else 0.0
        losses = partial(game.student_losses, gan_weight=gan_weight)
        scalars = trainer.backward(network, losses, batch) | {"grad_norm": network.step()}
        batch["fake"] = torch.cat(game.fakes)
        game.fakes.clear()
        own = trainer.backward(critic, game.heads_losses, batch)
        return scalars | {"d_loss": own.pop("loss"), **own, "d_grad_norm": critic.step()}

    def preview(path) -> None:
        save_grid(path, preview_images(network.ema, vae, range(64), args.precision))

    batches = GanBatches(trajectories, source, teacher.latent_shape, hflip, args)
    trainer.run(batches, train_step, preview, quality and partial(quality, network.ema))
    distributed.finish(ranks)


if __name__ == "__main__":
    cli.main(build_parser(), run)
