"""Train a teacher by DiT's recipe, on digits, on a folder of images, or on their latents; by captions, a PixArt.

    python train.py --model DiT-Micro/2 --data-path digits
    python train.py --init DiT-XL-2-256x256.pt --data-path photos --image-size 256 --vae ema --lr-warmup 1000
    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path imagenet/train --image-size 256 --vae ema

To resume, run the same command again.
"""

import argparse
from typing import Any

import torch
from torch.utils.data import Dataset

from costs.commands import check_plan, plan_command
from costs.flops import meta_model
from diffusion import PROCESSES, Process, process_of
from evaluations.quality import PeriodicEvaluator, QualityOptions, add_quality_options
from models import DiT
from models_pixart import MODELS, SIZE_OPTIONS, PixArt_models, sized_shape, teacher_type
from runtime import cli, distributed
from runtime.cli import UserError, chosen, read_options
from runtime.distributed import DistributedContext
from runtime.precision import autocast, prepare_blocks
from runtime.randomness import Classes, Conditions, Shuffle, generator, noise
from sampler import teacher_previews
from stores import checkpoints
from stores.captions import CaptionStore, add_captions_option, require_captions
from stores.image_folder import add_skip_bad_option
from stores.images import Source, latent_shape, open_source, open_vae, real_latents, require_outside_source, summary
from stores.initial_weights import init_shape, start_from
from trainer import Optimisation, RunOptions, Trainer, TrainState, add_training_options

NAMES = ", ".join(MODELS)


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Train a DiT teacher.")
    group = parser.add_argument_group("data and model")
    group.add_argument(
        "--data-path",
        type=cli.folder,
        required=True,
        help='Train on an image folder with a sub-folder per class, a latent store, or the word "digits" or "emoji"; '
        'with --captions "digit-scenes".',
    )
    group.add_argument("--image-size", type=cli.positive, help="Pixels of a side; image folders need it.")
    group.add_argument(
        "--channels", type=cli.positive, choices=(1, 3), help="1 for a folder of grey images only; without it, 3."
    )
    add_skip_bad_option(group)
    group.add_argument(
        "--vae",
        type=cli.name,
        help="Encode images by ema or mse (stabilityai/sd-vae-ft-...), a folder or hub id; else train on pixels.",
    )
    group.add_argument("--unconditional", action="store_true", help="Use no classes; an image folder may be flat then.")
    group.add_argument(
        "--model", choices=MODELS, metavar="NAME", help=f"One of {NAMES}; needed unless the four below are given."
    )
    of_model = "instead of that of --model."
    group.add_argument("--depth", type=cli.positive, help=f"Number of blocks, {of_model}")
    group.add_argument("--width", type=cli.positive, help=f"Hidden size of a token, {of_model}")
    group.add_argument("--heads", type=cli.positive, help=f"Attention heads, {of_model}")
    group.add_argument("--patch", type=cli.positive, help=f"Side of a patch in pixels or latents, {of_model}")
    group.add_argument(
        "--init",
        type=cli.file,
        help="Begin with these weights: a checkpoint, DiT or PixArt weights by official name, file, folder or hub id.",
    )
    group.add_argument("--keep-labels", action="store_true", help="Keep the label table of --init: the same classes.")
    add_captions_option(group)
    group.add_argument(
        "--process",
        choices=PROCESSES,
        help="Predict noise and variance as DiT, velocity as SiT, or as REPA without its projection loss; else do "
        "as --init does, or ddpm.",
    )
    group.add_argument("--label-dropout", type=cli.fraction, default=0.1, help="Rate of the null label in training.")
    group.add_argument("--hflip", action=argparse.BooleanOptionalAction, default=True, help="Mirror images at random.")
    add_training_options(parser, global_batch_size=256, iterations=400_000)
    add_quality_options(parser)
    return parser


# How many steps of the ODE make a picture, and how few the many samples of an evaluation.
PREVIEW_STEPS, EVALUATION_STEPS = 25, 10


class TeacherBatches(Dataset):
    """Item n is this rank's share of step n: images or latents, labels with some dropped, times and noise."""

    def __init__(
        self,
        source: Source,
        shape: tuple[int, int, int],
        *,
        global_batch_size: int,
        seed: int,
        label_dropout: float,
        hflip: bool,
        context: DistributedContext,
        process: Process = PROCESSES["ddpm"],
        conditions: Conditions | None = None,
    ):
        """``conditions`` of a text model are captions; without them, the classes of ``source``."""
        self.process = process
        self.source, self.shape, self.global_batch_size, self.seed = source, shape, global_batch_size, seed
        self.label_dropout, self.hflip, self.context = label_dropout, hflip, context
        self.conditions = conditions or Classes(source.num_classes)
        self.shuffle = Shuffle(source.count, seed)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        indices = self.context.step_indices(step, self.global_batch_size)
        draws = [generator(self.seed, "augmentation", i) for i in indices]
        t = torch.tensor([self.process.draw_time(draw) for draw in draws])
        dropped = torch.tensor([draw.random() < self.label_dropout for draw in draws])
        flips = torch.tensor([draw.random() < 0.5 and self.hflip for draw in draws]).numpy()
        real = self.source.read(self.shuffle.rows(indices.start, indices.stop), flips)
        return real | {
            "y": self.conditions(torch.where(dropped, self.conditions.count, real["y"])),
            "t": t,
            "noise": noise(self.seed, "training", indices, self.shape),
            "posterior_noise": noise(self.seed, "posterior", indices, self.shape),  # for the VAE's encoder
        }


def model_shape(model: str | None, initial: DiT | None, **sizes: int | None) -> tuple[dict[str, Any], str]:
    """The model's arguments that a named size and the options beside it stand for, and these options in words.

    With an ``initial`` model they are its own, and what is given must agree.
    """
    shape = sized_shape(model, **sizes)
    if initial is not None:
        return init_shape(initial.config, shape), "--init"
    given = [f"--{name} {value}" for name, value in ({"model": model} | sizes).items() if value is not None]
    words = " ".join(given)
    missing = [f"--{name}" for name, argument in SIZE_OPTIONS.items() if argument not in shape]
    if missing:
        raise UserError(f"{words or '--model'}: give {', '.join(missing)} as well, or a --model, one of {NAMES}")
    return shape, words


def open_initial(init: str | None, vae: str | None, process: str | None) -> tuple[DiT | None, dict, str]:
    """The model that the new one begins with, if any, and its config; the process of both."""
    if init is None:
        return None, {}, process or "ddpm"
    initial, config = checkpoints.load_teacher(init, "--init", vae=vae, process=process)
    return initial, config, initial.process


def open_captions(captions: str | None, model: str | None, source: Source, verify: bool) -> Conditions:
    """The meaning of the images' labels: classes, or as many captions. ``UserError`` where the model is not for
    them.
    """
    if model and (model in PixArt_models) != bool(captions):
        raise UserError(f"--model {model}: a PixArt needs --captions, a DiT takes none")
    if not captions:
        return Classes(source.num_classes, source.fingerprint.get("class_names"))
    store = CaptionStore(captions, verify=verify)
    if store.count != source.num_classes:
        raise UserError(
            f"--captions {captions}: {store.count} captions for the {source.num_classes} labels of the images"
        )
    return store


def outline(
    sizes: dict, words: str, source: Source, conditions: Conditions, vae: Any, *, data_path: str, label_dropout: float
) -> DiT:
    """The model of these sizes for these images and labels, without numbers; ``UserError`` where there is none."""
    channels, side, _ = latent_shape(source, vae)
    shape = sizes | {"input_size": side, "in_channels": channels, "class_dropout_prob": label_dropout}
    if isinstance(conditions, CaptionStore):
        shape["caption_channels"] = conditions.channels
    else:
        shape["num_classes"] = source.num_classes
    try:
        return meta_model(shape)
    except ValueError as error:
        raise UserError(f"{words}: does not fit --data-path {data_path}: {error}") from None


def run(args: argparse.Namespace) -> None:
    require_captions(args.captions)
    given = vars(args)
    optimisation, running = read_options(Optimisation, given), read_options(RunOptions, given)
    quality = read_options(QualityOptions, given)
    running.check()
    if args.keep_labels and not args.init:
        raise UserError("--keep-labels: has no meaning without --init")
    initial, about_initial, process = open_initial(**chosen(args, ("init", "vae", "process")))
    sizes, sizes_given = model_shape(initial=initial, **chosen(args, ("model", *SIZE_OPTIONS)))
    context = distributed.choose_device(args.device)
    distributed.join(context)  # the main rank looks at a folder for all
    images = chosen(args, ("data_path", "image_size", "unconditional", "channels", "skip_bad", "verify"))
    source = open_source(**images, context=context)
    require_outside_source(source, running.place)
    conditions = open_captions(args.captions, args.model, source, args.verify)
    vae, vae_name, vae_hash = open_vae(source, args.vae, context.device, bool(args.sample_every or args.eval_every))
    fitting: dict[str, Any] = chosen(args, ("data_path", "label_dropout"))
    sizes = {"learn_sigma": process == "ddpm", "process": process} | sizes
    model = outline(sizes, sizes_given, source, conditions, vae, **fitting)
    begins = {}
    if initial is not None:  # weights that do not fit are refused here, before the run exists
        weights = about_initial["provenance"]["teacher_hash"]
        begins = {"init": {"weights": weights, **start_from(model, initial, args.keep_labels)}}
    config = {
        "kind": "teacher",
        "model": model.config,
        "vae": vae_name,
        "vae_hash": vae_hash,
        "provenance": source.fingerprint | conditions.about | begins,
        "training": optimisation.config() | {"label_dropout": args.label_dropout, "hflip": args.hflip},
    }

    cfg_scale = 1.5 if args.label_dropout and conditions.count else 1.0
    previews, drawn = (
        teacher_previews(model, lambda: state.ema, vae, context.device, args.precision, conditions, n, cfg_scale)
        for n in (PREVIEW_STEPS, EVALUATION_STEPS)
    )
    evaluate = PeriodicEvaluator(drawn, context, source.size, quality) if quality.eval_every else None
    known: dict[str, Any] = {"rows": source.count, "vae": vae, "text_tokens": conditions.max_text_tokens}
    check_plan(plan_command("train.py", model.config, given, context, **known), config, given, context)
    torch.manual_seed(args.seed)
    # Labels are dropped by the data, a function of the index: the model itself stays in eval mode throughout.
    model = teacher_type(model.config)(**model.config).eval()
    if initial is not None:
        start_from(model, initial, args.keep_labels)
    prepare_blocks(model, compile=args.compile, checkpoint_activations=args.checkpoint_activations)
    state = TrainState(model, context, optimisation)
    trainer = Trainer(context, config, {"": state}, optimisation, running, given, previews.save_preview, evaluate)
    batches = TeacherBatches(
        source,
        model.latent_shape,
        context=context,
        process=process_of(model),
        conditions=conditions,
        **chosen(args, ("global_batch_size", "seed", "label_dropout", "hflip")),
    )
    trainer.folder.log(f"{args.data_path}: {summary(source, vae)}")
    if begins:
        trainer.folder.log(f"--init {args.init}: {begins['init']}")

    for batch in trainer.steps(batches):
        for part in state.micro_batches(batch):
            with autocast(args.precision, context.device):
                x = real_latents(part, vae)
                labels = {"y": part["y"]}
                losses = batches.process.training_losses(state.ddp_model, x, part["t"], labels, part["noise"])
            state.backward(losses)
        trainer.end_step(state.step())
    distributed.finish(context)


if __name__ == "__main__":
    cli.main(build_parser(), run)
