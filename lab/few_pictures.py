"""What to expect of few pictures: a teacher fine-tuned from other weights, beside one trained from nothing.

    python -m lab.few_pictures pictures --out results/few-pictures            # the same command continues
    python -m lab.few_pictures pictures --out results/few-pictures --dry-run  # what it would run

Takes 100, 1,000 and 10,000 of the pictures in a folder, evenly from its classes, and trains on each both ways for
equal steps. All are judged against the whole folder, so learning few pictures by heart does not count.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from lab.experiments import BATCH, drawn_by_teacher, figures_of, judged, write_table
from lab.worlds import EMOJI
from models import DiT
from runtime import cli
from runtime.checks import writable_folder
from runtime.cli import UserError
from runtime.commands import CORES, Piece, run_pieces, unmade
from runtime.files import atomic_write
from stores import checkpoints
from stores.image_folder import ImageFolder

STARTS = ("nothing", "weights")
TRAINING = "--global-batch-size 64 --lr 5e-4 --ema-decay 0.99 --precision bf16 --no-hflip --sample-every 0"
COLUMNS = ("pictures", "start", "steps", "fid", "precision", "recall")


def take(pictures: ImageFolder, count: int, folder: Path) -> None:
    """Copy so many of the pictures into ``folder``, every n-th of those in the order of their classes."""
    for i in range(count):
        path = Path(pictures.paths[i * pictures.count // count])
        copy = folder / path.relative_to(pictures.root)
        if not copy.exists():
            with atomic_write(copy) as draft:
                shutil.copyfile(path, draft)


def plan(
    out: Path, pictures: Path, init: Path, model: DiT, sizes: list[int], iterations: int, count: int, seed: int
) -> tuple[list[Piece], dict[tuple[int, str], Piece]]:
    """The commands, and of each size and start the samples."""
    given, size = model.config, model.config["input_size"]
    shape = ["--depth", given["depth"], "--width", given["hidden_size"], "--heads", given["num_heads"]]
    shape += ["--patch", given["patch_size"], "--process", model.process]
    real = Piece.of("evaluations.reference", out / "pictures.npz", pictures, "--image-size", size)
    pieces, rows = [real], dict[tuple[int, str], Piece]()
    for n in sizes:
        for start, weights in zip(STARTS, (shape, ["--init", init]), strict=True):
            words = ["--data-path", out / f"pictures-{n}", "--image-size", size, *weights, *TRAINING.split()]
            words += ["--lr-warmup", iterations // 10, "--seed", seed]
            teacher = Piece.of("train.py", out / f"{n}-from-{start}", *words, iterations=iterations)
            file = out / f"{n}-from-{start}.npz"
            rows[n, start] = drawn_by_teacher(EMOJI, file, count, seed, *BATCH, teacher=teacher)
            pieces += [teacher, rows[n, start], judged(EMOJI, real, rows[n, start])]
    return pieces, rows


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, prog="lab.few_pictures", description="Compare fine-tuning with training from nothing.")
    parser.add_argument("pictures", type=Path, metavar="PICTURES", help="Folder with a sub-folder for each class.")
    parser.add_argument("--out", type=cli.folder, default="results/few-pictures", help="Folder of all that is made.")
    parser.add_argument("--init", type=Path, default=EMOJI.teacher, help="Weights to begin with.")
    parser.add_argument(
        "--sizes", nargs="+", type=cli.positive, default=[100, 1000, 10_000], help="Train on so many pictures each."
    )
    parser.add_argument("--iterations", type=cli.positive, default=1000, help="Training steps of each.")
    parser.add_argument("--num-samples", type=cli.positive, default=2000, help="Samples of each.")
    parser.add_argument("--seed", type=cli.not_negative, default=0, help="Seed of training and samples.")
    parser.add_argument("--jobs", type=cli.positive, default=CORES, help="Processes side by side, one thread each.")
    cli.add_dry_run_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    folder = writable_folder("--out", args.out)
    model, _ = checkpoints.load_teacher(args.init, "--init")
    pictures = ImageFolder(args.pictures, model.config["input_size"], option="PICTURES")
    if max(args.sizes) > pictures.count:
        raise UserError(f"--sizes {max(args.sizes)}: {args.pictures} holds {pictures.count} pictures")
    known = (args.sizes, args.iterations, args.num_samples, args.seed)
    pieces, samples = plan(folder, args.pictures.resolve(), args.init.resolve(), model, *known)
    if args.dry_run:
        cli.show_plan({"pieces": len(pieces), "left": len(unmade(pieces, folder))}, args)
        return
    for n in args.sizes:
        take(pictures, n, folder / f"pictures-{n}")
    run_pieces(pieces, folder, args.jobs)
    rows: list[dict[str, Any]] = []
    for (n, start), piece in samples.items():
        found = figures_of(piece.makes)
        figures = {name: found[name] for name in ("fid", "precision", "recall")}
        rows.append({"pictures": n, "start": start, "steps": args.iterations} | figures)
    about = (
        f"FID of {args.num_samples} samples against all {pictures.count} pictures, in features of an emoji classifier "
        f"(not ADM's). Batch 64, bf16, seed {args.seed}, CPU with {CORES} cores."
    )
    print("\n" + write_table(folder, COLUMNS, rows, [about], start="begun with"))


if __name__ == "__main__":
    cli.main(build_parser(), run)
