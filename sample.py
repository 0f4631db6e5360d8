"""Sample the teacher to ADM's .npz, with the noise and labels that sample_ARD.py gives its students.

python sample.py --teacher assets/digits_teacher.pt --num-samples 100 --out results/teacher.npz
"""

import argparse
from typing import Any

from costs.commands import add_presets, check_plan, plan_command
from diffusion.teacher_ode import OdeOptions, TeacherODE
from runtime import cli, distributed
from runtime.cli import add_options, read_options
from runtime.vae import outline_vae
from sampler import DrawingOptions, SampleOptions, add_sampling_options, check_sampling, open_sampler
from stores import checkpoints
from stores.captions import add_captions_option, open_conditions, require_captions
from stores.samples import SampleWriter, write_pngs


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Sample the teacher to .npz.")
    add_presets(parser, "sample.py")
    group = parser.add_argument_group("teacher and its ODE")
    known = "Checkpoint, official name or hub id."
    group.add_argument("--teacher", "--ckpt-path", "--ckpt_path", type=cli.file, required=True, help=known)
    checkpoints.add_file_options(group)
    add_captions_option(group)
    add_options(group, OdeOptions)
    add_sampling_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    require_captions(args.captions)
    given = vars(args)
    options, drawing = read_options(SampleOptions, given), read_options(DrawingOptions, given)
    out = options.path(args.teacher)
    context = distributed.choose_device(args.device)
    teacher, config = checkpoints.load_teacher(
        args.teacher, weights=args.weights, heads=args.teacher_heads, vae=args.vae, process=args.teacher_process
    )
    conditions = open_conditions(args.captions, teacher, config["provenance"])
    ode = TeacherODE(teacher, conditions=conditions, **vars(read_options(OdeOptions, vars(args))))
    config["provenance"] |= ode.provenance
    provenance = check_sampling(config, options, drawing.precision, conditions, context)
    writer = SampleWriter(out, options.num_samples, provenance, context, options.save_latents)
    about = provenance | {"out": str(out), "count": options.num_samples}
    known: dict[str, Any] = {"vae": outline_vae(args.vae or config["vae"]), "text_tokens": conditions.max_text_tokens}
    check_plan(plan_command("sample.py", teacher.config, given, context, **known), about, given, context, out)
    distributed.join(context)

    sampler = open_sampler(ode.sample, teacher, config, options, drawing, conditions, context)
    with writer:
        for indices in writer.missing_batches(args.per_proc_batch_size):
            writer.write(indices, *sampler(indices))
    if context.is_main:
        write_pngs(out, options.png)
        print(f"{out}: {options.num_samples} samples" + (", already there" if writer.complete else ""))
    distributed.finish(context)


if __name__ == "__main__":
    cli.main(build_parser(), run)
