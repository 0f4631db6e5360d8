"""Fine-tune a student with the regression loss plus an adversarial loss on its last prediction: ARD (R+D).

    python train_ARD_gan.py --data-path data/digits --real-data-path digits --ckpt-path results/.../0002000.pt
    torchrun --nnodes=1 --nproc_per_node=8 train_ARD_gan.py --model DiT-XL/2 --global-batch-size=48 --stack=6 \
        --ckpt_path=.../checkpoints/0300000.pt --data-path data/xl --real-data-path data/imagenet_latents

Each step updates the student, then the discriminator's heads on the very predictions that the student was judged by.
To resume, run the same command again.
"""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from costs.commands import add_presets, check_plan, plan_command
from discriminator import AdversarialLosses, Discriminator, FrozenFeatures, own_history
from evaluations.quality import PeriodicEvaluator, QualityOptions, add_quality_options
from models import DiT
from models_ard import ARD
from runtime import cli, distributed
from runtime.cli import UserError, add_options, option, read_options
from runtime.distributed import DistributedContext
from runtime.precision import autocast, cast_weights, compile_each, prepare_blocks
from runtime.provenance import require_same
from runtime.randomness import Shuffle, generator, noise
from sampler import student_previews
from stores import checkpoints
from stores.checkpoints import StudentOptions
from stores.image_folder import add_skip_bad_option
from stores.images import BUNDLED, Source, open_suitable, real_latents, require_outside_source, summary
from stores.trajectories import TrajectoryBatches, TrajectoryStore
from trainer import Optimisation, RunOptions, Trainer, TrainState, add_training_options

# Keys of trajectories that must equal those of the student's training; seed and number may differ.
SAME_TEACHER = ("teacher_hash", "vae", "solver", "solver_steps", "cfg_scale", "cfg_channels")
SAME_IF_SAID = ("vae_hash", "teacher_heads", "process", "guidance_interval")


@dataclass(frozen=True)
class GanOptions:
    """The adversarial loss and its discriminator; part of a run's config."""

    gan_weight: float = option(10.0, "GAN loss: this times the adaptive weight.", cli.not_negative_number)
    gan_warmup: int = option(3000, "First steps, without the GAN loss.", cli.not_negative)
    rollout: bool = option(False, "Judge predictions from the student's own history.", action="store_true")
    d_lr: float = option(1e-3, "Learning rate of the heads (AdamW).", cli.positive_number)
    d_clip: float | None = option(None, "Clip their gradient to this norm if given.", cli.positive_number)
    d_time: int = option(0, "Diffuse images first, to 0..999 thousandths of noise.", cli.not_negative)
    d_width: int | None = option(None, "Channels of a head; without it, the teacher's width.", cli.positive)
    bn_group: int = option(6, "Samples of a group of the heads' batch norm.", cli.positive)


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Fine-tune a student by regression and an adversarial loss.")
    add_presets(parser, "train_ARD_gan.py")
    group = parser.add_argument_group("student and teacher")
    add_options(group, StudentOptions)
    group.add_argument("--init-weights", choices=("ema", "raw"), default="ema", help="Start at these of its weights.")
    group.add_argument("--teacher", type=cli.file, help="Teacher's checkpoint; without it, the one the store names.")
    checkpoints.add_file_options(group)
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", type=cli.folder, required=True, help="Train on a store of sample_trajectory.py.")
    group.add_argument(
        "--real-data-path",
        type=cli.folder,
        required=True,
        help='Real images: an image folder, a latent store, or the word "digits" or "emoji".',
    )
    group.add_argument(
        "--vae", type=cli.name, help="Load the teacher's autoencoder from this folder or hub id instead of by name."
    )
    add_skip_bad_option(group)
    group.add_argument(
        "--hflip",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Mirror real images at random; without it, do as in the teacher's training.",
    )
    add_options(parser.add_argument_group("discriminator"), GanOptions)
    add_training_options(parser, global_batch_size=48, iterations=40_000)
    add_quality_options(parser)
    return parser


def check_options(gan: GanOptions, optimisation: Optimisation, real_data_path: str) -> None:
    """``UserError`` for options that do not go together."""
    if gan.d_time > 999:
        raise UserError(f"--d-time {gan.d_time}: must be between 0 (clean) and 999")
    if gan.gan_weight and gan.gan_warmup > optimisation.iterations:
        raise UserError(
            f"--gan-warmup {gan.gan_warmup}: --iterations {optimisation.iterations} end before the GAN loss begins; "
            "give a shorter warm-up, more steps, or --gan-weight 0"
        )
    if real_data_path not in BUNDLED:
        cli.existing_folder("--real-data-path", real_data_path)


def check_inputs(store: TrajectoryStore, teacher: DiT, origin: dict, ckpt_path: str) -> None:
    """``UserError`` where the student, whose provenance is ``origin``, did not learn such trajectories as these."""
    if "caption_channels" in teacher.config:
        raise UserError(f"--data-path {store.folder}: of a text model, which R+D is not for; use train_ARD.py")
    if not {*SAME_TEACHER, "grid", "solver_indices", "target"} <= origin.keys():
        raise UserError(
            f"--ckpt-path {ckpt_path}: does not say which trajectories it was trained on; give a student that "
            "train_ARD.py trained"
        )
    require_same(
        f"--data-path {store.folder}: not the trajectories that the student was trained on",
        store.provenance,
        {name: origin.get(name) for name in (*SAME_TEACHER, *SAME_IF_SAID)},
    )


class GanBatches(Dataset):
    """Item n is this rank's share of step n: trajectories with labels, and real images with theirs, in orders apart."""

    def __init__(
        self,
        trajectories: TrajectoryBatches,
        source: Source,
        shape: tuple[int, int, int],
        *,
        hflip: bool,
        seed: int,
        d_time: int,
    ):
        self.trajectories, self.source, self.shape = trajectories, source, shape
        self.hflip, self.seed, self.d_time = hflip, seed, d_time
        self.shuffle = Shuffle(source.count, seed, "real")

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        indices = self.trajectories.context.step_indices(step, self.trajectories.global_batch_size)
        flips = [self.hflip and generator(self.seed, "augmentation", i).random() < 0.5 for i in indices]
        real = self.source.read(self.shuffle.rows(indices.start, indices.stop), np.array(flips))
        real["real_y"] = real.pop("y")
        real["posterior_noise"] = noise(self.seed, "posterior", indices, self.shape)
        if self.d_time:
            real["real_noise"] = noise(self.seed, "discriminator", [2 * i for i in indices], self.shape)
            real["fake_noise"] = noise(self.seed, "discriminator", [2 * i + 1 for i in indices], self.shape)
        return self.trajectories[step] | real


def build(
    student: ARD, teacher: DiT, gan: GanOptions, optimisation: Optimisation, context: DistributedContext
) -> tuple[TrainState, TrainState, AdversarialLosses]:
    """The student and the discriminator's heads in training, and the losses between them."""
    torch.manual_seed(optimisation.seed)
    heads = Discriminator.for_teacher(teacher, gan.d_width, gan.bn_group)
    cast_weights(teacher, optimisation.precision)
    for model in (student, teacher):
        prepare_blocks(model, compile=optimisation.compile, checkpoint_activations=optimisation.checkpoint_activations)
    if optimisation.compile:
        compile_each(heads.heads)
    state = TrainState(student, context, optimisation)
    d_state = TrainState(heads, context, replace(optimisation, lr=gan.d_lr, clip=gan.d_clip, ema_decay=None))
    adversarial = AdversarialLosses(
        state.ddp_model,
        d_state.ddp_model,
        FrozenFeatures(teacher.to(context.device), gan.d_time),
        total=context.all_reduce,
        samples=optimisation.global_batch_size / optimisation.accumulation,
    )
    return state, d_state, adversarial


#################################################################################
#                                   Training                                    #
#################################################################################


def run(args: argparse.Namespace) -> None:
    given = vars(args)
    optimisation, running = read_options(Optimisation, given), read_options(RunOptions, given)
    gan, quality = read_options(GanOptions, given), read_options(QualityOptions, given)
    running.check()
    context = distributed.choose_device(args.device)
    check_options(gan, optimisation, args.real_data_path)
    store = TrajectoryStore(args.data_path, verify=args.verify)
    student, start = checkpoints.load_named_student(read_options(StudentOptions, given), args.init_weights)
    teacher, teacher_config = store.load_teacher(args.teacher, args.teacher_heads, args.teacher_process)
    origin = start["provenance"]
    check_inputs(store, teacher, origin, args.ckpt_path)
    distributed.join(context)  # the main rank looks at a folder for all
    source, vae = open_suitable(
        args.real_data_path,
        teacher,
        teacher_config["provenance"],
        context,
        given=args.vae,
        needs_decoder=bool(args.sample_every or args.eval_every),
        **cli.chosen(args, ("skip_bad", "verify")),
    )
    require_outside_source(source, running.place)
    hflip = teacher_config["training"].get("hflip", True) if args.hflip is None else args.hflip
    order: dict[str, Any] = {"global_batch_size": args.global_batch_size, "seed": args.seed, "context": context}
    dumped = TrajectoryBatches(store, origin["solver_indices"], origin["target"], **order)
    batches = GanBatches(dumped, source, teacher.latent_shape, hflip=hflip, seed=args.seed, d_time=gan.d_time)
    start_state = {"start_hash": origin["weights_hash"], "start_step": origin["step"], "real": source.fingerprint}
    more = {"loss": "R+D", "hflip": hflip, "accumulation": args.accumulation, "init_weights": args.init_weights}
    points = {name: origin[name] for name in ("grid", "solver_indices", "target")}
    config = {
        "kind": "student",
        "model": student.config,
        "vae": teacher_config["vae"],
        "provenance": store.provenance | start_state | points,
        "training": optimisation.config() | more | vars(gan),
    }
    previews = student_previews(student, lambda: state.ema, vae, context.device, args.precision, dumped.conditions)
    size = teacher.input_size * vae.factor
    evaluate = PeriodicEvaluator(previews, context, size, quality) if quality.eval_every else None
    known: dict[str, Any] = {"teacher": teacher.config, "rows": len(store), "vae": vae}
    check_plan(plan_command("train_ARD_gan.py", student.config, given, context, **known), config, given, context)
    state, d_state, adversarial = build(student, teacher, gan, optimisation, context)
    states = {"": state, "_d": d_state}
    trainer = Trainer(context, config, states, optimisation, running, given, previews.save_preview, evaluate)

    trainer.folder.log(f"{args.real_data_path}: {summary(source, vae)}")
    for batch in trainer.steps(batches):
        batch["real"] = real_latents(batch, vae)
        if gan.rollout:
            with autocast(args.precision, context.device):
                batch["rollout"] = own_history(state.raw_model, batch["trajectory"][:, 0], batch["y"]).float()
        gan_weight = gan.gan_weight if trainer.step >= gan.gan_warmup else 0.0
        fakes = []
        for part in state.micro_batches(batch):
            with autocast(args.precision, context.device):
                losses, fake = adversarial.student_losses(part, gan_weight)
            state.backward(losses)
            fakes.append(fake)
        scalars = state.step()

        batch["fake"] = torch.cat(fakes)
        for part in d_state.micro_batches(batch):
            with autocast(args.precision, context.device):
                losses = adversarial.discriminator_losses(part)
            d_state.backward(losses)
        d_scalars = d_state.step()
        d_loss, d_grad_norm = d_scalars.pop("loss"), d_scalars.pop("grad_norm")
        trainer.end_step(scalars | {"d_loss": d_loss, **d_scalars, "d_grad_norm": d_grad_norm})
    distributed.finish(context)


if __name__ == "__main__":
    cli.main(build_parser(), run)
