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
from models import DiT_models
from models_ard import MASKS
from provenance import require_same
from samples import add_sampling_options, sample_to_file


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Sample a student to .npz.")
    group = parser.add_argument_group("student")
    group.add_argument(
        "--ckpt-path", "--ckpt_path", required=True, help="checkpoint of train_ARD.py or train_ARD_gan.py"
    )
    group.add_argument("--model", choices=DiT_models, metavar="NAME", help="its size, checked if given")
    group.add_argument("--steps", type=cli.positive, help="its steps S, checked if given")
    group.add_argument("--mask", choices=MASKS, help="its mask, checked if given")
    group.add_argument("--stack", type=cli.not_negative, help="its depth of history N, checked if given")
    add_sampling_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    student, config = checkpoint.load_student(args.ckpt_path, weights=args.weights)
    given = {"steps": args.steps, "mask": args.mask, "history_layers": args.stack}
    given |= DiT_models[args.model].keywords if args.model else {}
    given = {name: value for name, value in given.items() if value is not None}
    require_same(f"--ckpt-path {args.ckpt_path}: the options contradict this student", student.config, given)
    ranks = distributed.setup(args.device)

    def draw(z, y):
        return student.sample(z, y)[:, -1]

    sample_to_file(args, ranks, student, draw, config, Path(args.ckpt_path))
    distributed.finish(ranks)


if __name__ == "__main__":
    cli.main(build_parser(), run)
