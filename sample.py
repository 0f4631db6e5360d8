"""Sample the teacher to ADM's .npz, with the noise and labels that sample_ARD.py gives its students.

python sample.py --teacher assets/digits_teacher.pt --num-samples 100 --out results/teacher.npz
"""

import argparse

from costs.commands import add_presets, check_plan, plan_command
from diffusion.teacher_ode import ODE_OPTIONS, TeacherODE, add_ode_options
from runtime import cli, distributed
from runtime.cli import chosen
from sampler import PLACE_OPTIONS, SAMPLING_OPTIONS, SamplingJob, add_sampling_options, samples_path
from stores import checkpoints
from stores.captions import add_captions_option, open_conditions


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Sample the teacher to .npz.")
    add_presets(parser, "sample.py")
    group = parser.add_argument_group("teacher and its ODE")
    group.add_argument("--teacher", type=cli.file, required=True, help="Checkpoint, official name or hub id.")
    checkpoints.add_heads_option(group)
    add_captions_option(group)
    add_ode_options(group)
    add_sampling_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    samples_path(args.teacher, **chosen(args, PLACE_OPTIONS))
    context = distributed.choose_device(args.device)
    teacher, config = checkpoints.load_teacher(
        args.teacher, weights=args.weights, heads=args.teacher_heads, vae=args.vae
    )
    conditions = open_conditions(args.captions, teacher, config["provenance"])
    ode = TeacherODE(teacher, conditions=conditions, **chosen(args, ODE_OPTIONS))
    config["provenance"] |= ode.provenance
    job = SamplingJob(teacher, config, args.teacher, context, conditions=conditions, **chosen(args, SAMPLING_OPTIONS))
    about = teacher.config, vars(args), context
    plan = plan_command("sample.py", *about, vae=job.about_vae, text_tokens=conditions.max_text_tokens)
    check_plan(plan, job.plan, vars(args), context, job.out)
    distributed.join(context)
    sampler, writer = job.start(ode.sample)
    with writer:
        for indices in writer.missing_batches(args.per_proc_batch_size):
            latents, images, y = sampler(indices)
            writer.write(indices, latents, images, y)
    if context.is_main:
        print(f"{job.out}: {args.num_samples} samples" + (", already there" if writer.complete else ""))
    distributed.finish(context)


if __name__ == "__main__":
    cli.main(build_parser(), run)
