"""Measure speed: each stage of the pipeline against what the device can do, and variants against each other.

    python benchmark.py train --model DiT-S/2 --stack 3 --batch-size 2
    python benchmark.py sample --model DiT-B/2 --batch-size 4 --vs "--stack 0"
    python benchmark.py gpu                          # every case of a GPU, DiT-XL/2 in bf16, in minutes

Each case prints a line to read and a line of JSON. FLOPs are counted on the meta device from the models' own code; the
peak is that of a large matrix product in the same precision, measured in the same run. Models have random weights.
"""

import argparse
import json
import resource
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import cli
import distributed
from diffusion import create_diffusion
from distributed import Ranks
from evaluations.flops import count_flops
from evaluations.metrics import frechet_distance, precision_recall
from evaluations.metrics import statistics as gaussian
from models import DiT, DiT_models
from models_ard import ARD, MASKS
from randomness import Shuffle
from shards import fill_store
from train_ARD import student_losses
from training import PRECISIONS, Network, Trainer, add_compile_option, autocast, compile_blocks, prepare_blocks
from trajectory import TrajectoryStore, grid_steps, pick_points

GPU_CASES = """
train --batch-size 64 --compile
train --batch-size 64 --compile --checkpoint-activations
train --batch-size 16 --compile --vs=--no-compile
sample --batch-size 128 --compile --vs="--stack 0"
trajectories --batch-size 64 --compile --repeats 3
store
evaluate --repeats 1
"""


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Measure speed.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=cli.Parser)
    about = {
        "train": "a student's training step",
        "sample": "a student's sampling of latents",
        "trajectories": "the teacher's guided ODE of 25 steps",
        "store": "random reads of trajectories",
        "evaluate": "Frechet distance, precision and recall",
        "gpu": "all of these for DiT-XL/2 in bf16",
    }
    for name, text in about.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "gpu":
            distributed.add_device_option(command)
            continue
        if name in ("train", "sample", "trajectories"):
            command.add_argument("--model", choices=DiT_models, default="DiT-XL/2", metavar="NAME", help="its size")
            command.add_argument("--input-size", type=cli.positive, default=32, help="side of the latent")
            command.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of matrix products")
            add_compile_option(command)
            command.add_argument("--vs", metavar="OPTIONS", help="time this variant too, in turns: what differs in it")
        if name in ("train", "sample"):
            command.add_argument("--steps", type=cli.positive, default=4, help="S, the student's steps")
            command.add_argument("--mask", choices=MASKS, default="M4", help="what a step may see")
            command.add_argument("--stack", type=cli.not_negative, default=6, help="N, lower blocks that see history")
        if name == "train":
            command.add_argument("--accumulation", type=cli.positive, default=1, help="micro-batches of a step")
            command.add_argument(
                "--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False, help="recompute them"
            )
        if name == "evaluate":
            command.add_argument("--samples", type=cli.positive, default=10_000, help="rows of the samples' features")
            command.add_argument("--reference", type=cli.positive, default=50_000, help="rows of the reference's")
        else:
            command.add_argument("--batch-size", type=cli.positive, default=64, help="trajectories or images")
        if name == "store":
            command.add_argument("--rows", type=cli.positive, default=2048, help="trajectories in the store")
        command.add_argument("--repeats", type=cli.positive, default=10, help="timed runs, after two that are not")
        distributed.add_device_option(command)
    return parser


#################################################################################
#                                   Timing                                      #
#################################################################################


@dataclass
class Case:
    """One thing to time: ``work`` does it, ``images`` it makes at a time, ``flops`` it needs (0: not counted)."""

    work: Callable[[], object]
    images: int
    flops: int = 0
    precision: str = "fp32"


def time_in_turns(works: list[Callable], repeats: int, device: torch.device, warmup: int = 2) -> np.ndarray:
    """Seconds of each work in each turn, (repeats, works): what disturbs the machine disturbs all alike."""

    def seconds(work: Callable) -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return np.array([[seconds(work) for work in works] for _ in range(warmup + repeats)])[warmup:]


def peak_flops(precision: str, device: torch.device) -> float:
    """The best rate of a large square matrix product, in FLOPs per second."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=PRECISIONS[precision] or torch.float32)
    return 2 * size**3 / time_in_turns([lambda: a @ b], 10, device).min()


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the device's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(name: str, options: dict, case: Case, times: np.ndarray, device: torch.device, more: dict) -> None:
    """Print one case, to read and as JSON."""
    median = statistics.median(times)
    line = {"case": name, **options, "seconds": median, "fastest": times.min(), "slowest": times.max()}
    line |= {"ms_per_image": 1000 * median / case.images, "images_per_second": case.images / median}
    if case.flops:
        peak = peak_flops(case.precision, device)
        line |= {"tflops": case.flops / 1e12, "peak_tflops_per_second": peak / 1e12}
        line["mfu"] = case.flops / median / peak
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    line |= {"peak_memory_gb": peak_memory(device) / 1e9, "torch": torch.__version__, "on": on} | more
    numbers = ("ms_per_image", "images_per_second", "mfu", "peak_memory_gb", *more)
    shown = ", ".join(f"{key} {line[key]:.4g}" for key in numbers if key in line)
    print(f"{name}: {median:.4g} s ({times.min():.4g} to {times.max():.4g}), {shown}")
    print(json.dumps(line), flush=True)


#################################################################################
#                                 The stages                                    #
#################################################################################


def build_model(args, device: torch.device) -> DiT:
    """A teacher, or the student of one, in which nothing is zero as it would be at initialisation."""
    with torch.device(device):
        model = DiT_models[args.model](input_size=args.input_size)
        if "stack" in args:
            try:
                model = ARD.from_teacher(model, args.steps, args.mask, args.stack)
            except ValueError as error:
                raise cli.UserError(f"--steps {args.steps} --stack {args.stack}: {error}") from None
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def train_case(args, device: torch.device, folder: Path) -> Case:
    """What train_ARD.py does with a batch that is on the device: losses, gradients, clipping, AdamW, EMA."""
    model, ranks = build_model(args, device), Ranks(0, 1, device)

    def batch(size: int, where) -> dict:
        shape = (size, model.steps + 1, *model.latent_shape)
        return {"trajectory": torch.randn(shape, device=where), "y": torch.arange(size, device=where) % 1000}

    with torch.device("meta"):
        counted = ARD(**model.config)

    def forward_and_backward() -> None:
        student_losses(counted, batch(1, "meta"))["loss"].sum().backward()

    flops = count_flops(forward_and_backward)
    prepare_blocks(model, args)
    network = Network(model, ranks, lr=1e-4, clip=1.0, ema_decay=0.9999)
    run = {"global_batch_size": args.batch_size, "run_dir": tempfile.mkdtemp(dir=folder)}
    trainer = Trainer(argparse.Namespace(**vars(args), **run), ranks, {"model": model.config}, {"": network})
    data = batch(args.batch_size, device)

    def work() -> None:
        trainer.backward(network, partial(student_losses, network.model), data)
        network.step()

    return Case(work, args.batch_size, flops * args.batch_size, args.precision)


def drawn(model: DiT, draw: Callable, args, device: torch.device) -> Case:
    """A case of ``draw(model, noise, y)`` without gradients."""

    def inputs(size: int, where) -> tuple:
        return torch.randn(size, *model.latent_shape, device=where), torch.arange(size, device=where) % 1000

    with torch.device("meta"):
        counted = type(model)(**model.config)
    with torch.no_grad():
        flops = count_flops(lambda: draw(counted, *inputs(1, "meta")))
    if args.compile:
        compile_blocks(model)
    noise, y = inputs(args.batch_size, device)

    @torch.no_grad()
    def work() -> None:
        with autocast(args.precision, device):
            draw(model, noise, y)

    return Case(work, args.batch_size, flops * args.batch_size, args.precision)


def sample_case(args, device: torch.device, folder: Path) -> Case:
    """The latents that sample_ARD.py draws, all steps."""
    return drawn(build_model(args, device), lambda model, noise, y: model.sample(noise, y), args, device)


def trajectories_case(args, device: torch.device, folder: Path) -> Case:
    """The teacher's states that sample_trajectory.py dumps, with guidance 1.5."""
    solver, points = create_diffusion("25"), grid_steps(4)

    def draw(model, noise, y):
        return pick_points(*solver.ddim_trajectory(model, noise, y, 1.5), points)

    return drawn(build_model(args, device), draw, args, device)


def measure_store(args, device: torch.device, folder: Path) -> None:
    """Batches out of the store, against one .npz for each point and against a copy of as many bytes in a row."""
    shape, points = (args.rows, 4, 32, 32), 4
    data = {"noise": torch.randn(shape), "xt": torch.randn(args.rows, points, *shape[1:])}
    data = {name: value.half() for name, value in data.items()} | {"label": torch.arange(args.rows) % 1000}
    about = {"count": args.rows, "rows_per_shard": args.rows, "points": grid_steps(points)}
    fill_store(folder / "store", about, Ranks(0, 1, device), lambda rows, bar: data, "trajectory")
    store = TrajectoryStore(folder / "store")
    for row in range(args.rows):
        for k, latent in enumerate([data["noise"][row], *data["xt"][row]]):
            np.savez(folder / f"{row}-{k}.npz", latent=latent.numpy(), label=row % 1000)
    shuffle, position = Shuffle(args.rows, seed=0), iter(range(0, 10**9, args.batch_size))

    def rows() -> np.ndarray:
        start = next(position)
        return shuffle.rows(start, start + args.batch_size)

    def load(row: int, k: int) -> np.ndarray:
        with np.load(folder / f"{row}-{k}.npz") as file:
            return file["latent"]

    def read_files() -> torch.Tensor:
        return torch.from_numpy(np.stack([[load(row, k) for k in range(points + 1)] for row in rows()])).float()

    stored = data["xt"].flatten(0, 1)
    count = min(args.batch_size * (points + 1), len(stored))
    works = {
        "store": lambda: store.read(rows(), "xt", list(range(points))),
        "files": read_files,
        "copy": lambda: stored[:count].clone().float(),
    }
    times = time_in_turns(list(works.values()), args.repeats, device, warmup=max(2, args.rows // args.batch_size))
    more = {
        "over_files": statistics.median(times[:, 1] / times[:, 0]),
        "over_copy": statistics.median(times[:, 0] / times[:, 2]),
    }
    options = {"rows": args.rows, "batch_size": args.batch_size}
    report("store", options, Case(works["store"], args.batch_size), times[:, 0], device, more)


def measure_evaluate(args, device: torch.device, folder: Path) -> None:
    """The two slow figures of the evaluator, at the width of ADM's features."""
    random, width = np.random.default_rng(0), 2048
    reference = random.standard_normal((args.reference, width), dtype=np.float32)
    samples = random.standard_normal((args.samples, width), dtype=np.float32)
    both = (*gaussian(samples), *gaussian(reference))
    works = {
        "frechet": Case(lambda: frechet_distance(*both), 1),
        "precision_recall": Case(lambda: precision_recall(reference, samples, device=device), args.samples),
    }
    for name, case in works.items():
        times = time_in_turns([case.work], args.repeats, device, warmup=0)[:, 0]
        report(name, {"samples": args.samples, "reference": args.reference}, case, times, device, {})


def measure_variants(args, make: Callable, device: torch.device, folder: Path) -> None:
    """Time a case and, with --vs, its variant in turns."""
    variants = {"": args}
    if args.vs:
        given = [args.command, *options_of(args), *shlex.split(args.vs)]
        variants["vs"] = build_parser().parse_args(given)
    cases = {name: make(variant, device, folder) for name, variant in variants.items()}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = time_in_turns([case.work for case in cases.values()], args.repeats, device)
    for column, (name, case) in enumerate(cases.items()):
        ratios, more = times[:, column] / times[:, 0], {}
        if name:
            more = {"ratio": statistics.median(ratios), "ratio_min": ratios.min(), "ratio_max": ratios.max()}
        hidden = ("command", "vs", "device", "repeats")
        options = {key: value for key, value in vars(variants[name]).items() if key not in hidden}
        report(f"{args.command} {args.vs if name else ''}".strip(), options, case, times[:, column], device, more)


def options_of(args) -> list[str]:
    """The command line that gives these arguments, without --vs."""
    words = []
    for key, value in vars(args).items():
        if key in ("command", "vs"):
            continue
        option = "--" + key.replace("_", "-")
        words += ([option] if value else ["--no-" + option[2:]]) if isinstance(value, bool) else [option, str(value)]
    return words


CASES = {"train": train_case, "sample": sample_case, "trajectories": trajectories_case}
MEASURES = {"store": measure_store, "evaluate": measure_evaluate}


def run(args: argparse.Namespace) -> None:
    if args.command == "gpu":
        for line in GPU_CASES.strip().splitlines():
            words = shlex.split(line)
            words += ["--precision", "bf16"] if words[0] in CASES else []
            try:
                run(build_parser().parse_args([*words, "--device", args.device]))
            except torch.OutOfMemoryError:
                print(f"{line}: out of memory", flush=True)
            torch.cuda.empty_cache()
        return
    ranks = distributed.setup(args.device)
    with tempfile.TemporaryDirectory() as folder:
        if args.command in CASES:
            measure_variants(args, CASES[args.command], ranks.device, Path(folder))
        else:
            MEASURES[args.command](args, ranks.device, Path(folder))


if __name__ == "__main__":
    cli.main(build_parser(), run)
