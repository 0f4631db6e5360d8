"""Sample the teacher to ADM's .npz, with the noise and labels that sample_ARD.py gives its students.

python sample.py --teacher assets/digits_teacher.pt --num-samples 100 --out results/teacher.npz
"""

import argparse
from pathlib import Path

import checkpoint
import cli
import distributed
from presets import preset
from samples import add_sampling_options, sample_to_file
from teacher_ode import TeacherODE, add_ode_options


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Sample the teacher to .npz.")
    parser.add_presets(preset("sample.py"))
    group = parser.add_argument_group("teacher and its ODE")
    group.add_argument("--teacher", required=True, help="checkpoint of the teacher")
    add_ode_options(group)
    add_sampling_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    teacher, config = checkpoint.load_teacher(args.teacher, weights=args.weights)
    ode = TeacherODE(teacher, args)
    ranks = distributed.setup(args.device)
    config["provenance"] |= ode.provenance

    def draw(z, y):
        return ode(z, y)[0][:, -1]

    sample_to_file(args, ranks, teacher, draw, config, Path(args.teacher))
    distributed.finish(ranks)


if __name__ == "__main__":
    cli.main(build_parser(), run)
