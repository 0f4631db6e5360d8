"""Measure speed: each stage of the pipeline against what the device can do, and variants against each other.

    python benchmark.py train --model DiT-S/2 --stack 3 --batch-size 2
    python benchmark.py sample --model DiT-B/2 --batch-size 4 --vs "--stack 0"
    python benchmark.py gpu                          # every case of a GPU, DiT-XL/2 in bf16, in minutes

Each case prints a line to read and a line of JSON. FLOPs are counted on the meta device from the models' own code; the
peak is that of a large matrix product in the same precision, measured in the same run. Models have random weights.
"""

import argparse
import shlex
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion import create_diffusion
from diffusion.teacher_ode import grid_steps, pick_points
from evaluations.flops import count_flops
from evaluations.metrics import frechet_distance, precision_recall
from evaluations.metrics import statistics as gaussian
from losses import regression_losses
from models import DiT, DiT_models
from models_ard import ARD, MASKS
from runtime import cli, distributed
from runtime.distributed import DistributedContext
from runtime.precision import add_compile_option, add_precision_option, autocast, compile_blocks, prepare_blocks
from runtime.randomness import Shuffle
from runtime.timing import Case, report, time_in_turns
from stores.shards import ShardWriter
from stores.trajectories import TrajectoryStore
from trainer import TrainState

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
            command.add_argument("--model", choices=DiT_models, default="DiT-XL/2", metavar="NAME", help="Model.")
            command.add_argument("--input-size", type=cli.positive, default=32, help="Side of the latent.")
            add_precision_option(command)
            add_compile_option(command)
            command.add_argument("--vs", metavar="OPTIONS", help="Time the variant with these options too, in turns.")
        if name in ("train", "sample"):
            command.add_argument("--steps", type=cli.positive, default=4, help="S, the student's steps.")
            command.add_argument("--mask", choices=MASKS, default="M4", help="What a step sees.")
            command.add_argument("--stack", type=cli.not_negative, default=6, help="N, lower blocks that see history.")
        if name == "train":
            command.add_argument("--accumulation", type=cli.positive, default=1, help="Micro-batches of a step.")
            command.add_argument(
                "--checkpoint-activations",
                action=argparse.BooleanOptionalAction,
                default=False,
                help="Recompute.",
            )
        if name == "evaluate":
            command.add_argument("--samples", type=cli.positive, default=10_000, help="Rows of drawn features.")
            command.add_argument("--reference", type=cli.positive, default=50_000, help="Rows of real features.")
        else:
            command.add_argument("--batch-size", type=cli.positive, default=64, help="Trajectories or images at once.")
        if name == "store":
            command.add_argument("--rows", type=cli.positive, default=2048, help="Trajectories in the store.")
        command.add_argument("--repeats", type=cli.positive, default=10, help="Timed runs, after two that are not.")
        distributed.add_device_option(command)
    return parser


#################################################################################
#                                 The stages                                    #
#################################################################################


def build_model(options: dict, device: torch.device) -> Any:
    """A teacher, or the student of one if there is "stack", in which nothing is zero as it would be initially."""
    with torch.device(device):
        model = DiT_models[options["model"]](input_size=options["input_size"])
        if "stack" in options:
            try:
                model = ARD.from_teacher(model, options["steps"], options["mask"], options["stack"])
            except ValueError as error:
                raise cli.UserError(f"--steps {options['steps']} --stack {options['stack']}: {error}") from None
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def train_case(options: dict, device: torch.device) -> Case:
    """What train_ARD.py does with a batch that is on the device: losses, gradients, clipping, AdamW, EMA."""
    model, size = build_model(options, device), options["batch_size"]

    def make_batch(size: int, where: Any) -> dict[str, torch.Tensor]:
        shape = (size, model.steps + 1, *model.latent_shape)
        return {"trajectory": torch.randn(shape, device=where), "y": torch.arange(size, device=where) % 1000}

    def losses(student: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return regression_losses(student(batch["trajectory"][:, :-1], batch["y"]), batch["trajectory"])

    with torch.device("meta"):
        counted = ARD(**model.config)
    flops = count_flops(lambda: losses(counted, make_batch(1, "meta")).sum().backward())
    prepare_blocks(model, compile=options["compile"], checkpoint_activations=options["checkpoint_activations"])
    state = TrainState(
        model,
        DistributedContext(device=device),
        lr=1e-4,
        clip=1.0,
        ema_decay=0.9999,
        global_batch_size=size,
        accumulation=options["accumulation"],
    )
    batch = make_batch(size, device)

    def work() -> None:
        for part in state.micro_batches(batch):
            with autocast(options["precision"], device):
                loss = losses(state.ddp_model, part)
            state.backward({"loss": loss})
        state.step()

    return Case(work, size, flops * size, options["precision"])


def drawing_case(model: DiT, draw: Callable, options: dict, device: torch.device) -> Case:
    """A case of ``draw(model, noise, y)`` without gradients."""

    def inputs(size: int, where: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(size, *model.latent_shape, device=where), torch.arange(size, device=where) % 1000

    with torch.device("meta"):
        counted = type(model)(**model.config)
    with torch.no_grad():
        flops = count_flops(lambda: draw(counted, *inputs(1, "meta")))
    if options["compile"]:
        compile_blocks(model)
    noise, y = inputs(options["batch_size"], device)

    @torch.no_grad()
    def work() -> None:
        with autocast(options["precision"], device):
            draw(model, noise, y)

    return Case(work, options["batch_size"], flops * options["batch_size"], options["precision"])


def sample_case(options: dict, device: torch.device) -> Case:
    """The latents that sample_ARD.py draws, all steps."""
    return drawing_case(build_model(options, device), lambda model, z, y: model.sample(z, y), options, device)


def trajectories_case(options: dict, device: torch.device) -> Case:
    """The teacher's states that sample_trajectory.py dumps, with guidance 1.5."""
    solver, points = create_diffusion("25"), grid_steps(4)

    def draw(model: DiT, noise: torch.Tensor, y: torch.Tensor) -> object:
        return pick_points(*solver.ddim_trajectory(model, noise, y, 1.5), points)

    return drawing_case(build_model(options, device), draw, options, device)


def measure_store(device: torch.device, folder: Path, *, rows: int, batch_size: int, repeats: int) -> None:
    """Batches out of the store, against one .npz for each point and against a copy of as many bytes in a row."""
    points, shape = 4, (rows, 4, 32, 32)
    data = {"noise": torch.randn(shape), "xt": torch.randn(rows, points, *shape[1:])}
    data = {name: value.half() for name, value in data.items()} | {"label": torch.arange(rows) % 1000}
    about = {"count": rows, "rows_per_shard": rows, "solver_indices": grid_steps(points)}
    with ShardWriter(folder / "store", about, DistributedContext(), unit="trajectory") as writer:
        writer.write(range(rows), data)
    store = TrajectoryStore(folder / "store")
    for row in range(rows):
        for k, latent in enumerate([data["noise"][row], *data["xt"][row]]):
            np.savez(folder / f"{row}-{k}.npz", latent=latent.numpy(), label=row % 1000)
    shuffle, position = Shuffle(rows, seed=0), iter(range(0, 10**9, batch_size))

    def next_rows() -> np.ndarray:
        start = next(position)
        return shuffle.rows(start, start + batch_size)

    def load(row: int, k: int) -> np.ndarray:
        with np.load(folder / f"{row}-{k}.npz") as file:
            return file["latent"]

    def read_files() -> torch.Tensor:
        latents = [[load(row, k) for k in range(points + 1)] for row in next_rows()]
        return torch.from_numpy(np.stack(latents)).float()

    stored = data["xt"].flatten(0, 1)
    count = min(batch_size * (points + 1), len(stored))
    works = {
        "store": lambda: store.read(next_rows(), "xt", list(range(points))),
        "files": read_files,
        "copy": lambda: stored[:count].clone().float(),
    }
    times = time_in_turns(list(works.values()), repeats, device, warmup=max(2, rows // batch_size))
    more = {
        "over_files": statistics.median(times[:, 1] / times[:, 0]),
        "over_copy": statistics.median(times[:, 0] / times[:, 2]),
    }
    options = {"rows": rows, "batch_size": batch_size}
    report("store", options, Case(works["store"], batch_size), times[:, 0], device, more)


def measure_evaluate(device: torch.device, folder: Path, *, samples: int, reference: int, repeats: int) -> None:
    """The two slow figures of the evaluator, at the width of ADM's features."""
    random, width = np.random.default_rng(0), 2048
    real = random.standard_normal((reference, width), dtype=np.float32)
    drawn = random.standard_normal((samples, width), dtype=np.float32)
    both = (*gaussian(drawn), *gaussian(real))
    works = {
        "frechet": Case(lambda: frechet_distance(*both), 1),
        "precision_recall": Case(lambda: precision_recall(real, drawn, device=device), samples),
    }
    for name, case in works.items():
        times = time_in_turns([case.work], repeats, device, warmup=0)[:, 0]
        report(name, {"samples": samples, "reference": reference}, case, times, device, {})


CASES = {"train": train_case, "sample": sample_case, "trajectories": trajectories_case}
MEASURES: dict[str, Callable] = {"store": measure_store, "evaluate": measure_evaluate}
HIDDEN = ("command", "vs", "device", "repeats")  # what is no option of a case


def measure_variants(command: str, options: dict, vs: str | None, repeats: int, device: torch.device) -> None:
    """Time a case and, with --vs, its variant in turns."""
    variants = {"": options}
    if vs:
        given = build_parser().parse_args([command, *as_words(options), *shlex.split(vs)])
        variants[vs] = {name: value for name, value in vars(given).items() if name not in HIDDEN}
    cases = [CASES[command](variant, device) for variant in variants.values()]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = time_in_turns([case.work for case in cases], repeats, device)
    for column, (name, variant) in enumerate(variants.items()):
        ratios, more = times[:, column] / times[:, 0], {}
        if name:
            more = {"ratio": statistics.median(ratios), "ratio_min": ratios.min(), "ratio_max": ratios.max()}
        report(f"{command} {name}".strip(), variant, cases[column], times[:, column], device, more)


def as_words(options: dict) -> list[str]:
    """The command line that gives these options."""
    words: list[str] = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


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
    device = distributed.setup(args.device).device
    options = {name: value for name, value in vars(args).items() if name not in HIDDEN}
    if args.command in CASES:
        measure_variants(args.command, options, args.vs, args.repeats, device)
        return
    with tempfile.TemporaryDirectory() as folder:
        MEASURES[args.command](device, Path(folder), repeats=args.repeats, **options)


if __name__ == "__main__":
    cli.main(build_parser(), run)
