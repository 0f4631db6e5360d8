"""From a folder of pictures to a few-step pipeline, in one command that can be stopped and run again.

    python distill.py photos --image-size 64 --out results/photos
    python distill.py photos --image-size 256 --vae ema --out results/photos --gan --train "--model DiT-B/2 --lr 2e-4"

Encodes the pictures (with --vae), trains a teacher (or takes --teacher), dumps its trajectories, distils them, samples,
compares the samples with the pictures, and saves the student as a pipeline of diffusers. First it prints the
cost, and each command as one could type it. To resume, run it again.
"""

import argparse
import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.timing import peak_flops
from costs.commands import plan_command, plan_latents, student_shape
from costs.plans import Plan
from lab.experiments import draw_samples
from models import PROCESS_TIMES
from models_pixart import SIZE_OPTIONS, sized_shape
from runtime import cli, distributed
from runtime.checks import in_words, require_disk, size_of, writable_folder
from runtime.cli import UserError
from runtime.commands import as_typed, call, options_of
from runtime.files import read_json, write_text
from runtime.provenance import require_same
from runtime.vae import outline_vae
from stores import checkpoints
from stores.images import Source, latent_shape, open_source, require_outside_source

UTILISATION = 0.3  # of the rate of a large product, for the estimate of time
MOST_TOKENS = 256  # of an image, for the teacher that is trained where --train names none
SMALL = 64  # pixels of a side: smaller pictures are compared in features that need no download
SHOWN = 16  # samples in the picture


@dataclass(frozen=True)
class Stage:
    """One of our commands, the file that it makes when it is whole, and the command's options."""

    name: str
    command: list
    makes: Path
    options: dict[str, Any]


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


def launcher(device: str) -> list:
    """How a command that knows ranks is started: on all GPUs where there are several."""
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return ["torchrun", f"--nproc_per_node={gpus}"] if gpus > 1 else ["python"]


def stages(args: argparse.Namespace, out: Path, side: int) -> list[Stage]:
    """The commands in order, each parsed, and refused, by its own parser. ``side``: that of latents or of pixels."""
    run, device, seed = launcher(args.device), ["--device", args.device], ["--seed", args.seed]
    flat = ["--unconditional"] * args.unconditional
    teacher = Path(args.teacher) if args.teacher else out / f"teacher/checkpoints/{args.train_iterations:07d}.pt"
    store, student = out / "trajectories", out / f"student/checkpoints/{args.student_iterations:07d}.pt"
    latents = out / "latents"
    real = [latents] if args.vae else [args.pictures, "--image-size", args.image_size, *flat]
    found: list[Stage] = []

    def add(name: str, makes: Path, *words: Any) -> None:
        options = options_of(list(words), f"distill.py --{name}")
        if "iterations" in options and f"{options['iterations']:07d}.pt" != makes.name:
            raise UserError(f"--{name}: give --{name}-iterations instead of --iterations in it")
        found.append(Stage(name, list(words), makes, options))

    if args.vae:
        command = [*run, "encode_latents.py", "--data-path", args.pictures, "--image-size", args.image_size, *flat]
        add("encode", latents / "manifest.json", *command, "--vae", args.vae, "--out", latents, *device, *args.encode)
    if not args.teacher:
        patch = next((patch for patch in (2, 4) if (side // patch) ** 2 <= MOST_TOKENS), 8)
        model = ["--init", args.init] if args.init else ["--model", f"DiT-S/{patch}"]
        command = [*run, "train.py", "--data-path", *real, *model, "--ema-warmup"]
        command += ["--process", args.teacher_process] if args.teacher_process else []
        command += ["--iterations", args.train_iterations, "--run-dir", out / "teacher", *seed, *device]
        add("train", teacher, *command, *args.train)
    known = ["--teacher", teacher]
    known += ["--teacher-process", args.teacher_process] if args.teacher and args.teacher_process else []
    command = [*run, "sample_trajectory.py", *known, "--num-trajectories", args.num_trajectories]
    add("dump", store / "manifest.json", *command, "--out", store, *seed, *device, *args.dump)
    command = [*run, "train_ARD.py", "--data-path", store, "--steps", args.steps, "--ema-warmup"]
    command += ["--iterations", args.student_iterations, "--run-dir", out / "student", *seed, *device]
    add("student", student, *command, *args.student)
    if args.gan:
        tuned = out / f"student-gan/checkpoints/{args.gan_iterations:07d}.pt"
        command = [*run, "train_ARD_gan.py", "--data-path", store, "--ckpt-path", student, "--ema-warmup"]
        command += ["--real-data-path", real[0], "--gan-weight", 0.5, "--gan-warmup", args.gan_iterations // 10]
        command += ["--iterations", args.gan_iterations, "--run-dir", out / "student-gan", *seed, *device]
        add("adversary", tuned, *command, *args.adversary)
        student = tuned
    command = [*run, "sample_ARD.py", "--ckpt-path", student, "--num-samples", args.num_samples]
    add("sample", out / "student.npz", *command, "--out", out / "student.npz", *seed, *device, *args.sample)
    command = ["python", "sample.py", *known, "--num-samples", min(SHOWN, args.num_samples)]
    add("teacher", out / "teacher.npz", *command, "--out", out / "teacher.npz", *seed, *device)
    add("pipeline", out / "pipeline/README.md", "python", "pipeline_ard.py", student, "--out", out / "pipeline")
    command = ["python", "-m", "evaluations.evaluator", args.pictures, out / "student.npz"]
    features = "pixels" if args.image_size <= SMALL else "inception"  # the latter's weights are fetched
    command += ["--image-size", args.image_size, "--features", features, "--allow-few"]
    command += ["--json", out / "student.json", *args.evaluate]
    add("evaluate", out / "student.json", *command)
    return found


def plan_of(stage: Stage, teacher: dict, student: dict, count: int, vae: Any) -> Plan | None:
    """The needs of a stage by the arguments of both models, for ``count`` pictures; None for what is not counted."""
    context, options = distributed.launched(), stage.options
    if stage.name == "encode":
        shape = teacher["in_channels"], teacher["input_size"], teacher["input_size"]
        return plan_latents(options, context, count=count, shape=shape, vae=vae)
    if stage.name == "train":
        return plan_command("train.py", teacher, options, context, rows=count)
    if stage.name == "dump":
        return plan_command("sample_trajectory.py", teacher, options, context)
    if stage.name == "sample":
        return plan_command("sample_ARD.py", student, options, context, vae=vae)
    script = {"student": "train_ARD.py", "adversary": "train_ARD_gan.py"}.get(stage.name)
    return plan_command(script, student, options, context, rows=count, teacher=teacher) if script else None


def teacher_shape(args: argparse.Namespace, train: Stage | None, source: Source, latents: tuple[int, ...]) -> dict:
    """The arguments of the teacher's model: of given weights by their config, else by the stage that trains it."""
    options, own = train.options if train else {}, {"input_size": latents[1], "num_classes": source.num_classes}
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


def cost_table(found: list[Stage], plans: dict[str, Plan], device: torch.device) -> tuple[str, int]:
    """Each stage's needs, its time on this device estimated; and the bytes of all on the disk."""
    rate = UTILISATION * peak_flops("fp32", device)["mean"]
    lines, disk, hours = ["stage      steps      disk        memory      operations   hours, about"], 0, 0.0
    for stage in found:
        if stage.name not in plans:
            continue
        about = plans[stage.name].describe()
        flops, memory = about["flops"] or 0.0, about["memory_bytes_per_rank"]["total"]
        disk, hours = disk + about["disk_bytes"], hours + flops / rate / 3600
        sizes = f"{in_words(about['disk_bytes']):<11} {in_words(memory):<11} {flops:<12.3g}"
        made = "  (made)" if stage.makes.exists() else ""
        lines.append(f"{stage.name:<10} {about['steps']:<10} {sizes} {flops / rate / 3600:.3g}{made}")
    lines.append(
        f"in all: {in_words(disk)} on the disk, about {hours:.3g} hours, at {UTILISATION:.0%} of the rate of a large "
        f"product in fp32 on {device}"
    )
    return "\n".join(lines), disk


def finish(out: Path, features: dict) -> None:
    """The picture, and in the pipeline's card the picture and the figures."""
    draw_samples(out / "samples.png", {"teacher": out / "teacher.npz", "student": out / "student.npz"}, SHOWN)
    card = out / "pipeline" / "README.md"
    figures = {name: value for name, value in features.items() if isinstance(value, float | int | str)}
    if "## Samples" not in card.read_text():
        shutil.copy(out / "samples.png", out / "pipeline" / "samples.png")
        rows = "\n".join(f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
                         for name, value in figures.items())  # fmt: skip
        text = f"\n## Samples\n\n![Teacher and student from the same noise](samples.png)\n\n| | |\n|---|---|\n{rows}\n"
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
    named = {stage.name: stage for stage in found}
    teacher = teacher_shape(args, named.get("train"), source, latents)
    student = student_shape(teacher, named["student"].options)
    counted = {stage.name: plan_of(stage, teacher, student, source.count, vae) for stage in found}
    typed = {stage.name: as_typed(stage.command) for stage in found}
    table, disk = cost_table(found, {name: plan for name, plan in counted.items() if plan}, context.device)
    require_disk("PICTURES and what is made of them", out, disk - (size_of(out) if out.exists() else 0))
    if args.dry_run:
        cli.show_plan({"stages": typed, "disk_bytes": disk}, args)
        return
    note = out / "distill.json"
    if note.exists():
        before = read_json(note)
        made = [stage.name for stage in found if stage.makes.exists()]
        what = f"--out {out}: holds stages that were made otherwise; give another folder, or the options of before"
        require_same(what, {name: before.get(name) for name in made}, {name: typed[name] for name in made})
    print(table, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_text(note, json.dumps(typed, indent=1) + "\n")
    for number, stage in enumerate(found, 1):
        print(f"[{number}/{len(found)}] {stage.name}" + (": made already" if stage.makes.exists() else ""), flush=True)
        if not stage.makes.exists():
            call([stage.command])
    finish(out, read_json(out / "student.json"))
    print(f"{out}: the pipeline is in {out / 'pipeline'}, the picture {out / 'samples.png'}")


if __name__ == "__main__":
    cli.main(build_parser(), run)
