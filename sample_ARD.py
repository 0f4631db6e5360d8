"""Sample a student to ADM's .npz, in its S steps with a kv-cache.

    python sample_ARD.py --num-samples 100 --ckpt-path results/000-DiT-Micro-2/checkpoints/0002000.pt
    torchrun --nnodes=1 --nproc_per_node=1 sample_ARD.py --stack=6 --ckpt_path=.../checkpoints/0300000.pt

The checkpoint knows its model: --model, --steps, --mask and --stack are only checked against it. Points of the
student's own trajectory can be replaced, and it goes on from there: by source images, which it translates to the
classes asked for (appendix C.2 of the paper), or by its teacher's, to see how errors add up (Fig. 6b).

    python sample_ARD.py --ckpt-path STUDENT --source-images photos --class-labels 207 --num-samples 8
    python sample_ARD.py --ckpt-path STUDENT --teacher-steps 2 --num-samples 50000
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from costs.commands import add_presets, check_plan, plan_command
from diffusion.teacher_ode import pick_points
from models_ard import ARD
from runtime import cli, distributed
from runtime.cli import UserError, add_options, read_options
from runtime.files import file_sha256
from runtime.vae import VAE, Pixels, outline_vae
from sampler import (
    DrawingOptions,
    SampleOptions,
    add_sampling_options,
    check_sampling,
    learned_ode,
    open_sampler,
    source_latents,
)
from stores import checkpoints
from stores.captions import add_captions_option, open_conditions, require_captions
from stores.checkpoints import StudentOptions
from stores.image_arrays import Images
from stores.image_folder import ImageFolder
from stores.pictures import center_crop
from stores.samples import SampleWriter, write_pngs


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Sample a student to .npz.")
    add_presets(parser, "sample_ARD.py")
    group = parser.add_argument_group("student")
    add_options(group, StudentOptions)
    add_captions_option(group)
    group = parser.add_argument_group("given points")
    group.add_argument(
        "--source-images",
        type=cli.name,
        help="Start sample i from image i of this folder or .npz, modulo their number.",
    )
    group.add_argument("--source-step", type=cli.positive, default=1, help="Replace this step's prediction, 1 .. S-1.")
    group.add_argument(
        "--teacher-steps", type=cli.not_negative, default=0, help="Take N first points of S from the teacher's ODE."
    )
    group.add_argument("--teacher", type=cli.file, help="Find that teacher here instead of where the checkpoint says.")
    add_sampling_options(parser)
    return parser


class SourceImages:
    """The images of a folder or .npz, taken in turn: sample i starts from image i, modulo their number."""

    def __init__(self, path: str, student: ARD):
        """``UserError`` where there is nothing to read."""
        self.student, option = student, "--source-images"
        self.images: ImageFolder | Images
        if Path(path).is_dir():
            self.images = ImageFolder(path, size=student.input_size, unconditional=True, option=option)
            self.hash = self.images.fingerprint["listing"]
        else:
            self.images = Images(option, path)
            self.hash = file_sha256(path)[:16]

    def __call__(self, indices: Sequence[int], vae: VAE | Pixels) -> torch.Tensor:
        """The latents of these samples' sources (B, C, h, w), centre-cropped and resized to the student's side."""
        rows, side = np.array(indices) % self.images.count, self.student.input_size * vae.factor
        if isinstance(self.images, ImageFolder):
            self.images.size = side
            images = self.images.read(rows, np.zeros(len(rows), bool))["images"]
        else:
            arrays = [array[0] for row in rows for _, array in self.images.batches(range(row, row + 1), 1)]
            cropped = [np.array(center_crop(Image.fromarray(array), side)) for array in arrays]
            images = torch.from_numpy(np.stack(cropped)).permute(0, 3, 1, 2)
        return source_latents(images.to(self.student.pos_embed.device), vae, self.student)


def open_sources(path: str | None, step: int, student: ARD, provenance: dict) -> SourceImages | None:
    """The images of ``--source-images``, noted in ``provenance``; ``UserError`` where they have no place."""
    if path is None:
        return None
    if step >= student.steps:
        raise UserError(f"--source-step {step}: this student has {student.steps} steps, the last of which is the image")
    if provenance.get("target") == "xt":
        raise UserError("--source-images: this student's points are noisy states (target xt), it takes no clean images")
    sources = SourceImages(path, student)
    provenance |= {"source_images": path, "source_hash": sources.hash, "source_step": step}
    return sources


def run(args: argparse.Namespace) -> None:
    require_captions(args.captions)
    given = vars(args)
    options, drawing = read_options(SampleOptions, given), read_options(DrawingOptions, given)
    out = options.path(args.ckpt_path)
    context = distributed.choose_device(args.device)
    student, config = checkpoints.load_named_student(read_options(StudentOptions, given), options.weights)
    conditions = open_conditions(args.captions, student, config["provenance"])
    sources = open_sources(args.source_images, args.source_step, student, config["provenance"])
    if args.teacher_steps > student.steps:
        raise UserError(f"--teacher-steps {args.teacher_steps}: this student has {student.steps} steps")
    ode = learned_ode(config["provenance"], args.ckpt_path, args.teacher, conditions) if args.teacher_steps else None
    config["provenance"] |= {"teacher_steps": args.teacher_steps} if ode else {}
    provenance = check_sampling(config, options, drawing.precision, conditions, context)
    writer = SampleWriter(out, options.num_samples, provenance, context, options.save_latents)
    about = provenance | {"out": str(out), "count": options.num_samples}
    known: dict[str, Any] = {"vae": outline_vae(args.vae or config["vae"]), "text_tokens": conditions.max_text_tokens}
    check_plan(plan_command("sample_ARD.py", student.config, given, context, **known), about, given, context, out)
    distributed.join(context)
    if ode:
        ode.teacher.to(context.device)

    def draw(noise: torch.Tensor, y: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        given = {}
        if ode:
            points = pick_points(*ode(noise, y), provenance["solver_indices"])[provenance["target"]]
            given = dict(enumerate(points[:, : args.teacher_steps].unbind(1)))
        if source is not None:
            given[args.source_step - 1] = source
        return student.sample(noise, y, given)[:, -1]

    sampler = open_sampler(draw, student, config, options, drawing, conditions, context, sources)
    with writer:
        for indices in writer.missing_batches(args.per_proc_batch_size):
            writer.write(indices, *sampler(indices))
    if context.is_main:
        write_pngs(out, options.png)
        print(f"{out}: {options.num_samples} samples" + (", already there" if writer.complete else ""))
    distributed.finish(context)


if __name__ == "__main__":
    cli.main(build_parser(), run)
