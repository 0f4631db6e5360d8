"""Sample a student to ADM's .npz, in its S steps with a kv-cache.

    python sample_ARD.py --num-samples 100 --ckpt-path results/000-DiT-Micro-2/checkpoints/0002000.pt
    torchrun --nnodes=1 --nproc_per_node=1 sample_ARD.py --stack=6 --ckpt_path=.../checkpoints/0300000.pt

The checkpoint knows its model: --model, --steps, --mask and --stack are only checked against it.
"""

import argparse

import torch

from evaluations.plans import SAMPLED_OPTIONS, plan_samples
from models import DiT_models
from presets import preset
from runtime import cli, distributed
from runtime.cli import chosen
from runtime.distributed import DistributedContext
from sampler import PLACE_OPTIONS, SAMPLING_OPTIONS, SamplingJob, add_sampling_options, samples_path
from stores import checkpoints


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Sample a student to .npz.")
    parser.add_presets(preset("sample_ARD.py"), plan_of_options)
    checkpoints.add_student_options(parser.add_argument_group("student"))
    add_sampling_options(parser)
    return parser


def plan_of_options(args: argparse.Namespace) -> dict:
    """The plan for the size that a name or a preset says, where the weights are not here yet."""
    shape = {"steps": args.steps, "mask": args.mask, "history_layers": args.stack}
    config = DiT_models[args.model].keywords | shape if args.model and None not in shape.values() else None
    return plan_samples(config, DistributedContext(), **chosen(args, SAMPLED_OPTIONS)).describe() if config else {}


def run(args: argparse.Namespace) -> None:
    samples_path(args.ckpt_path, **chosen(args, PLACE_OPTIONS))
    context = distributed.stand_alone(args.device)
    student, config = checkpoints.load_named_student(weights=args.weights, **chosen(args, checkpoints.STUDENT_OPTIONS))
    job = SamplingJob(student, config, args.ckpt_path, context, **chosen(args, SAMPLING_OPTIONS))
    options = chosen(args, SAMPLED_OPTIONS) | {"vae": job.about_vae}
    plan = plan_samples(student.config, context, **options)
    plan.check(job.out, context.device)
    if args.dry_run:
        cli.show_plan(job.plan | plan.describe(), args)
        return
    distributed.join(context)

    def draw(noise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return student.sample(noise, y)[:, -1]

    sampler, writer = job.start(draw)
    with writer:
        for indices in writer.missing_batches(args.per_proc_batch_size):
            latents, images, y = sampler(indices)
            writer.write(indices, latents, images, y)
    if context.is_main:
        print(f"{job.out}: {args.num_samples} samples" + (", already there" if writer.complete else ""))
    distributed.finish(context)


if __name__ == "__main__":
    cli.main(build_parser(), run)
