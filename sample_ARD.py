"""Sample a student to ADM's .npz, in its S steps with a kv-cache.

    python sample_ARD.py --num-samples 100 --ckpt-path results/000-DiT-Micro-2/checkpoints/0002000.pt
    torchrun --nnodes=1 --nproc_per_node=1 sample_ARD.py --stack=6 --ckpt_path=.../checkpoints/0300000.pt

The checkpoint knows its model: --model, --steps, --mask and --stack are only checked against it.
"""

import argparse
from pathlib import Path

import checkpoint
import cli
import distributed
from presets import preset
from samples import add_sampling_options, sample_to_file


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Sample a student to .npz.")
    parser.add_presets(preset("sample_ARD.py"))
    group = parser.add_argument_group("student")
    checkpoint.add_student_options(group)
    add_sampling_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    student, config = checkpoint.load_named_student(args, args.weights)
    ranks = distributed.setup(args.device)

    def draw(z, y):
        return student.sample(z, y)[:, -1]

    sample_to_file(args, ranks, student, draw, config, Path(args.ckpt_path))
    distributed.finish(ranks)


if __name__ == "__main__":
    cli.main(build_parser(), run)
