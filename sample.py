"""Sample the teacher to ADM's .npz, with the noise and labels that sample_ARD.py gives its students.

python sample.py --teacher assets/digits_teacher.pt --num-samples 100 --out results/teacher.npz
"""

import argparse

from costs.plans import SAMPLED_OPTIONS, SOLVER_OPTIONS, plan_samples
from diffusion.teacher_ode import ODE_OPTIONS, TeacherODE, add_ode_options
from presets import preset
from runtime import cli, distributed
from runtime.cli import chosen
from runtime.distributed import DistributedContext
from sampler import PLACE_OPTIONS, SAMPLING_OPTIONS, SamplingJob, add_sampling_options, samples_path
from stores import checkpoints
from stores.captions import add_captions_option, open_conditions
from stores.foreign_weights import shape_by_name


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Sample the teacher to .npz.")
    parser.add_presets(preset("sample.py"), plan_of_options)
    group = parser.add_argument_group("teacher and its ODE")
    group.add_argument("--teacher", type=cli.file, required=True, help="Checkpoint, official name or hub id.")
    checkpoints.add_heads_option(group)
    add_captions_option(group)
    add_ode_options(group)
    add_sampling_options(parser)
    return parser


def plan_of_options(args: argparse.Namespace) -> dict:
    """The plan for the size that a name or a preset says, where the weights are not here yet."""
    config = shape_by_name(args.teacher)
    return (
        plan_samples(
            config, DistributedContext(), **chosen(args, SAMPLED_OPTIONS) | chosen(args, SOLVER_OPTIONS)
        ).describe()
        if config
        else {}
    )


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
    options = chosen(args, SAMPLED_OPTIONS) | chosen(args, SOLVER_OPTIONS)
    options |= {"vae": job.about_vae, "text_tokens": conditions.max_text_tokens}
    plan = plan_samples(teacher.config, context, **options)
    plan.check(job.out, context.device)
    if args.dry_run:
        cli.show_plan(job.plan | plan.describe(), args)
        return
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
