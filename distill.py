"""From a folder of pictures to a few-step pipeline, in one command that can be stopped and run again.

    python distill.py photos --image-size 64 --out results/photos
    python distill.py photos --image-size 256 --vae ema --out results/photos --gan --train "--model DiT-B/2 --lr 2e-4"

Encodes the pictures (with --vae), trains a teacher (or takes --teacher), dumps its trajectories, distils them, samples,
compares the samples with the pictures, and saves the student as a pipeline of diffusers. First it prints the
cost, and each command as one could type it. To resume, run it again.
"""

import argparse
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.timing import peak_flops
from costs.commands import plan_command, plan_latents, student_shape
from costs.plans import Plan
from lab.experiments import draw_samples, figures_of
from models import PROCESS_TIMES
from models_pixart import SIZE_OPTIONS, sized_shape
from runtime import cli, distributed
from runtime.checks import in_words, require_disk, size_of, writable_folder
from runtime.cli import UserError
from runtime.commands import Piece, options_of, run_pieces, unmade
from runtime.files import write_text
from runtime.vae import outline_vae
from stores import checkpoints
from stores.images import Source, latent_shape, open_source, require_outside_source

UTILISATION = 0.3  # of the rate of a large product, for the estimate of time
MOST_TOKENS = 256  # of an image, for the teacher that is trained where --train names none
SMALL = 64  # pixels of a side: smaller pictures are compared in features that need no download
SHOWN = 16  # samples in the picture


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Distil a model of your own pictures.")
    parser.add_argument("pictures", type=cli.folder, metavar="PICTURES", help="Folder with a sub-folder per class.")
    parser.add_argument("--out", type=cli.folder, required=True, help="Folder of all that is made.")
    parser.add_argument("--image-size", type=cli.positive, required=True, help="Pixels of a side.")
    parser.add_argument("--unconditional", action="store_true", help="Use no classes; the folder may be flat then.")
    parser.add_argument("--vae", type=cli.name, help="Work on latents of ema, mse, a folder or a hub id.")
    parser.add_argument("--teacher", type=cli.file, help="Distil this teacher instead of training one.")
    parser.add_argument(
        "--teacher-process",
        choices=PROCESS_TIMES,
        help="The teacher's process: ddpm is that of DiT, sit and repa are flows; if not said, ddpm.",
    )
    parser.add_argument("--init", type=cli.file, help="Train the teacher from these weights, a DiT of any classes.")
    parser.add_argument("--steps", type=cli.positive, default=4, help="S, the student's steps.")
    parser.add_argument("--gan", action="store_true", help="Fine-tune the student with a discriminator (R+D).")
    parser.add_argument("--seed", type=cli.not_negative, default=0, help="Seed of all stages.")
    group = parser.add_argument_group("sizes")
    group.add_argument("--train-iterations", type=cli.positive, default=50_000, help="Training steps of the teacher.")
    group.add_argument("--num-trajectories", type=cli.positive, default=20_000, help="Trajectories of the teacher.")
    group.add_argument("--student-iterations", type=cli.positive, default=20_000, help="Training steps of the student.")
    group.add_argument("--gan-iterations", type=cli.positive, default=5_000, help="Steps of R+D.")
    group.add_argument("--num-samples", type=cli.positive, default=5_000, help="Samples to compare with the pictures.")
    group = parser.add_argument_group('more options of a stage, as in --train "--model DiT-B/4 --lr 2e-4"')
    for name, script in (
        ("encode", "encode_latents.py"), ("train", "train.py"), ("dump", "sample_trajectory.py"),
        ("student", "train_ARD.py"), ("adversary", "train_ARD_gan.py"), ("sample", "sample_ARD.py"),
        ("evaluate", "evaluations.evaluator"),
    ):  # fmt: skip
        group.add_argument(f"--{name}", type=shlex.split, default=[], metavar="WORDS", help=f"Options of {script}.")
    cli.add_dry_run_option(parser)
    distributed.add_device_option(parser)
    return parser


def stages(args: argparse.Namespace, out: Path, side: int) -> dict[str, Piece]:
    """The commands by name and in order. ``side``: that of latents or of pixels."""
    gpus = max(1, torch.cuda.device_count()) if args.device in ("auto", "cuda") else 1
    size, flat = ["--image-size", args.image_size], ["--unconditional"] * args.unconditional
    device, seed = ["--device", args.device], ["--seed", args.seed, "--device", args.device]
    pictures = Path(args.pictures)
    # Paths where they are none of models on a hub.
    given, init, vae = (Path(it) if it and Path(it).exists() else it for it in (args.teacher, args.init, args.vae))
    real: list = [pictures, *size, *flat]
    found: dict[str, Piece] = {}

    def add(name: str, script: str, place: str, *words: Any, ranks: int = gpus, iterations: int = 0) -> Piece:
        words = (*words, *getattr(args, name, ()))
        found[name] = Piece.of(script, out / place, *words, ranks=ranks, iterations=iterations)
        return found[name]

    if vae:
        real = [add("encode", "encode_latents.py", "latents", "--data-path", *real, "--vae", vae, *device)]
    process: list = ["--teacher-process", args.teacher_process] if args.teacher_process else []
    if given:
        known = ["--teacher", given, *process]
    else:
        patch = next((patch for patch in (2, 4) if (side // patch) ** 2 <= MOST_TOKENS), 8)
        model = ["--init", init] if init else ["--model", f"DiT-S/{patch}"]
        model += ["--process", args.teacher_process] if args.teacher_process else []
        words = ["--data-path", *real, *model, "--ema-warmup", *seed]
        known = ["--teacher", add("train", "train.py", "teacher", *words, iterations=args.train_iterations)]
    words = [*known, "--num-trajectories", args.num_trajectories, *seed]
    store = add("dump", "sample_trajectory.py", "trajectories", *words)
    words = ["--data-path", store, "--steps", args.steps, "--ema-warmup", *seed]
    student = add("student", "train_ARD.py", "student", *words, iterations=args.student_iterations)
    if args.gan:
        words = ["--data-path", store, "--ckpt-path", student, "--real-data-path", real[0], "--ema-warmup", *seed]
        words += ["--gan-weight", 0.5, "--gan-warmup", args.gan_iterations // 10]
        student = add("adversary", "train_ARD_gan.py", "student-gan", *words, iterations=args.gan_iterations)
    words = ["--ckpt-path", student, "--num-samples", args.num_samples, *seed]
    samples = add("sample", "sample_ARD.py", "student.npz", *words)
    words = [*known, "--num-samples", min(SHOWN, args.num_samples), *seed]
    found["teacher"] = Piece.of("sample.py", out / "teacher.npz", *words)
    found["pipeline"] = Piece.of("pipeline_ard.py", out / "pipeline", student)
    features = "pixels" if args.image_size <= SMALL else "inception"  # the latter's weights are fetched
    words = [pictures, samples, *size, "--features", features, "--allow-few"]
    add("evaluate", "evaluations.evaluator", "student.json", *words, ranks=1)
    return found


def options_by_stage(found: dict[str, Piece]) -> dict[str, dict[str, Any]]:
    """The options of each command by its own parser; ``UserError`` where they move what the stage is to make."""
    found_options = {}
    for name, piece in found.items():
        options = found_options[name] = options_of(piece, f"distill.py --{name}")
        if "iterations" in options and f"{options['iterations']:07d}.pt" != piece.makes.name:
            raise UserError(f"--{name}: give --{name}-iterations instead of --iterations in it")
        place = next(options[key] for key in ("run_dir", "json", "out") if options.get(key))
        makes = piece.makes.absolute()
        if Path(place).absolute() not in (makes, *makes.parents):
            raise UserError(f"--{name}: {place} is another place than the next stage looks at; leave that to --out")
    return found_options


def plan_of(script: str, options: dict, teacher: dict, student: dict, count: int, vae: Any) -> Plan | None:
    """The needs of a stage by the arguments of both models, for ``count`` pictures; None for what is not counted."""
    context, config = distributed.launched(), student if "ARD" in script else teacher
    if script == "encode_latents.py":
        shape = teacher["in_channels"], teacher["input_size"], teacher["input_size"]
        return plan_latents(options, context, count=count, shape=shape, vae=vae)
    if script.startswith("train"):
        return plan_command(script, config, options, context, rows=count, teacher=teacher)
    return plan_command(script, config, options, context, vae=vae) if script.startswith("sample") else None


def teacher_shape(args: argparse.Namespace, train: dict | None, source: Source, latents: tuple[int, ...]) -> dict:
    """The arguments of the teacher's model: of given weights by their config, else by the options that train it."""
    options, own = train or {}, {"input_size": latents[1], "num_classes": source.num_classes}
    if given := args.teacher or args.init:
        option, process = ("--init", options["process"]) if train else ("--teacher", args.teacher_process)
        config = checkpoints.load_teacher(given, option, vae=args.vae, process=process)[1]["model"]
        if "caption_channels" in config:
            raise UserError(
                f"{option} {given}: reads text, give a model of classes; docs/text-to-image.md is for others"
            )
        return config | own if train else config
    process = options["process"] or "ddpm"
    own |= {"in_channels": latents[0], "class_dropout_prob": options["label_dropout"]}
    sizes = sized_shape(options["model"], **{name: options[name] for name in SIZE_OPTIONS})
    return {"learn_sigma": process == "ddpm", "process": process} | sizes | own


def cost_table(found: dict[str, Piece], left: list[Piece], plans: dict, device: torch.device) -> tuple[str, int]:
    """Each stage's needs by its plan, its time on this device estimated; and the bytes of all on the disk."""
    lines, disk = ["stage      steps      disk        memory      operations   hours, about"], 0
    for name, about in plans.items():
        disk += about["disk_bytes"]
        sizes = f"{in_words(about['disk_bytes']):<11} {in_words(about['memory_bytes_per_rank']['total']):<11}"
        time = f"{about['flops'] or 0.0:<12.3g} {found[name].seconds / 3600:.3g}"
        lines.append(f"{name:<10} {about['steps']:<10} {sizes} {time}" + "  (made)" * (found[name] not in left))
    hours = sum(piece.seconds for piece in found.values()) / 3600
    where = f"at {UTILISATION:.0%} of the rate of a large product in fp32 on {device}"
    return "\n".join([*lines, f"in all: {in_words(disk)} on the disk, about {hours:.3g} hours, {where}"]), disk


def finish(out: Path) -> None:
    """The picture, and in the pipeline's card the picture and the figures."""
    draw_samples(out / "samples.png", {"teacher": out / "teacher.npz", "student": out / "student.npz"}, SHOWN)
    card = out / "pipeline" / "README.md"
    if "## Samples" not in card.read_text():
        shutil.copy(out / "samples.png", out / "pipeline" / "samples.png")
        text = "\n## Samples\n\n![Teacher and student from the same noise](samples.png)\n\n| | |\n|---|---|\n"
        for name, value in figures_of(out / "student.npz").items():
            if isinstance(value, float | int | str):
                text += f"| {name} | {value:.4g} |\n" if isinstance(value, float) else f"| {name} | {value} |\n"
        write_text(card, card.read_text() + text)


def run(args: argparse.Namespace) -> None:
    out = writable_folder("--out", args.out)
    if args.teacher and args.init:
        raise UserError("--init: begins a teacher's training, which --teacher leaves out; give one of the two")
    context = distributed.choose_device(args.device)
    source = open_source(args.pictures, args.image_size, args.unconditional, "PICTURES")
    require_outside_source(source, {"--out": args.out})
    vae = outline_vae(args.vae)
    latents = latent_shape(source, vae)
    found = stages(args, out, latents[1])
    options = options_by_stage(found)
    teacher = teacher_shape(args, options.get("train"), source, latents)
    student = student_shape(teacher, options["student"])
    rate, plans = UTILISATION * peak_flops("fp32", context.device)["mean"], {}
    for name, piece in found.items():
        if plan := plan_of(piece.text[0], options[name], teacher, student, source.count, vae):
            plans[name] = plan.describe()
            found[name] = replace(piece, seconds=piece.seconds + (plans[name]["flops"] or 0) / rate)
    pieces = [*found.values()]
    table, disk = cost_table(found, unmade(pieces, out), plans, context.device)
    require_disk("PICTURES and what is made of them", out, disk - (size_of(out) if out.exists() else 0))
    if args.dry_run:
        stages_typed = {name: str(piece) for name, piece in found.items()}
        cli.show_plan({"stages": stages_typed, "disk_bytes": disk, "cost": table.splitlines()}, args)
        return
    print(table, flush=True)
    run_pieces(pieces, out)
    finish(out)
    print(f"{out}: the pipeline is in {out / 'pipeline'}, the picture {out / 'samples.png'}")


if __name__ == "__main__":
    cli.main(build_parser(), run)
