"""Sample the teacher to ADM's .npz, with the noise and labels that sample_ARD.py gives its students.

python sample.py --teacher assets/digits_teacher.pt --num-samples 100 --out results/teacher.npz
"""

import argparse
from pathlib import Path

import checkpoint
import cli
import distributed
from diffusion import create_diffusion
from samples import add_sampling_options, sample_to_file


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Sample the teacher to .npz.")
    group = parser.add_argument_group("teacher and its ODE")
    group.add_argument("--teacher", required=True, help="checkpoint of the teacher")
    group.add_argument("--solver-steps", type=cli.positive, default=25, help="DDIM steps")
    group.add_argument("--cfg-scale", type=float, default=1.5, help="classifier-free guidance, 1: none")
    group.add_argument("--cfg-channels", type=cli.positive, default=3, help="guided channels (DiT's samples: 3 of 4)")
    add_sampling_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    teacher, config = checkpoint.load_teacher(args.teacher, weights=args.weights)
    checkpoint.check_guidance(teacher, args.cfg_scale)
    ranks = distributed.setup(args.device)
    diffusion = create_diffusion(str(args.solver_steps))
    config["provenance"] |= {
        "solver": "ddim",
        "solver_steps": args.solver_steps,
        "cfg_scale": args.cfg_scale,
        "cfg_channels": min(args.cfg_channels, teacher.in_channels),
    }

    def draw(z, y):
        return diffusion.ddim_trajectory(teacher, z, y, args.cfg_scale, args.cfg_channels)[0][:, -1]

    sample_to_file(args, ranks, teacher, draw, config, Path(args.teacher))
    distributed.finish(ranks)


if __name__ == "__main__":
    cli.main(build_parser(), run)
