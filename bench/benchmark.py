"""Measure speed: each stage of the pipeline against the device's limits, and variants against each other.

    python -m bench train --model DiT-S/2 --stack 3 --batch-size 2
    python -m bench sample --model DiT-B/2 --batch-size 4 --vs "--stack 0"
    python -m bench train --model DiT-S/2 --stack 3 --batch-size 2 --vs=--dense  # as it is usually written
    python -m bench gpu > gpu.txt         # every case of a GPU, DiT-XL/2 in bf16, in 8 minutes
    python -m bench report gpu.txt        # its table for a README

Each case prints a line to read and a line of JSON. FLOPs are counted on the meta device from the models' own code; the
peak is that of a large matrix product in the same precision, measured in the same run. Models have random weights.
"""

import argparse
import gc
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import cases
from bench.timing import Case, PeakMemory, about_device, peak_flops, profile, seconds, time_in_turns
from models import DiT_models
from models_ard import MASKS
from runtime import cli, distributed
from runtime.distributed import DistributedContext
from runtime.precision import add_compile_option, add_precision_option

GPU_CASES = """
sample --batch-size 128 --compile --vs="--stack 0"
sample --batch-size 1 --compile --vs=--cuda-graph
trajectories --batch-size 64 --compile --repeats 3
train --batch-size 64 --compile
train --batch-size 8 --compile
train --batch-size 16 --compile --vs=--no-compile
train --batch-size 64 --compile --checkpoint-activations --repeats 5
gan --batch-size 6 --compile
gan --batch-size 48 --compile --checkpoint-activations --repeats 5
decode --batch-size 32 --compile --vs=--no-compile
features --batch-size 256 --repeats 3 --vs=--tf32
store
metrics --repeats 1
ddp --batch-size 8 --compile
"""
CASES = {
    "train": cases.train_case,
    "gan": cases.gan_case,
    "sample": cases.sample_case,
    "trajectories": cases.trajectories_case,
    "decode": cases.decode_case,
    "features": cases.features_case,
}
ABOUT = {
    "train": "a student's training step",
    "gan": "a step of R+D",
    "sample": "a student's sampling of latents",
    "trajectories": "the teacher's guided ODE of 25 steps",
    "decode": "decoding latents to images",
    "features": "Inception features of a file of images",
    "store": "random reads of trajectories",
    "metrics": "Frechet distance, precision and recall",
    "ddp": "a training step on all GPUs of this machine",
    "gpu": "all of these for DiT-XL/2 in bf16",
    "report": "a table of another run's output",
}
HIDDEN = ("command", "vs", "device", "repeats", "profile", "minutes", "file")  # options that no case takes


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Measure cases.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=cli.Parser)
    for name, text in ABOUT.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "report":
            command.add_argument("file", metavar="FILE", help="Output of a run of this script.")
            continue
        distributed.add_device_option(command)
        if name == "gpu":
            command.add_argument(
                "--minutes", type=cli.not_negative_number, default=8.0, help="Minutes after which no case starts."
            )
            continue
        models = name in ("train", "gan", "sample", "trajectories", "ddp")
        if models:
            command.add_argument("--model", choices=DiT_models, default="DiT-XL/2", metavar="NAME", help="Model size.")
        if models or name == "decode":
            command.add_argument("--input-size", type=cli.positive, default=32, help="Side of the latent in pixels.")
            add_precision_option(command)
            add_compile_option(command)
        if name in ("train", "gan", "sample", "ddp"):
            command.add_argument("--steps", type=cli.positive, default=4, help="S, the student's steps.")
            command.add_argument(
                "--mask", choices=MASKS, default="M4", help="Points that a step sees: M1 its own .. M4 all before it."
            )
            command.add_argument("--stack", type=cli.not_negative, default=6, help="N, lower blocks that see history.")
        switch: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": False}
        if name in ("train", "ddp"):
            command.add_argument("--accumulation", type=cli.positive, default=1, help="Micro-batches of a step.")
        if name in ("train", "gan", "ddp"):
            command.add_argument("--checkpoint-activations", **switch, help="Recompute them in the backward pass.")
        if name in ("train", "sample"):
            command.add_argument("--dense", **switch, help="Take one long sequence, a mask, and adaLN for each token.")
        if name == "sample":
            command.add_argument("--cuda-graph", **switch, help="Record the sampler once and replay it.")
        if name == "decode":
            command.add_argument("--width", type=cli.positive, default=128, help="Channels of the first stage.")
        if name == "features":
            command.add_argument("--image-size", type=cli.positive, default=256, help="Pixels of a side.")
            command.add_argument("--tf32", **switch, help="Take products in TF32.")
        if name == "store":
            command.add_argument("--rows", type=cli.positive, default=2048, help="Trajectories in the store.")
        if name == "metrics":
            command.add_argument("--samples", type=cli.positive, default=10_000, help="Rows of drawn features.")
            command.add_argument("--reference", type=cli.positive, default=50_000, help="Rows of real features.")
        else:
            command.add_argument("--batch-size", type=cli.positive, default=64, help="Trajectories or images at once.")
        if name in CASES:
            command.add_argument("--vs", metavar="OPTIONS", help="Time the variant with these options too, in turns.")
            command.add_argument("--profile", **switch | {"default": True}, help="Split a call by kinds of kernels.")
        command.add_argument("--repeats", type=cli.positive, default=10, help="Timed runs, after two that are not.")
    return parser


#################################################################################
#                                   Reports                                     #
#################################################################################


def report(name: str, options: dict, case: Case, times: np.ndarray, device: torch.device, more: dict) -> None:
    """Print one case, to read and as JSON; times: (repeats, 2), done and returned."""
    done, returned = times[:, 0], times[:, 1]
    median = statistics.median(done)
    line = {"case": name, **options, "seconds": median, "fastest": done.min(), "slowest": done.max()}
    line |= {"ms_per_image": 1000 * median / case.images, "images_per_second": case.images / median}
    line["cpu_seconds"] = statistics.median(returned)  # near "seconds": the processor limits
    if case.flops:
        peak = peak_flops(case.precision, device)
        line |= {"tflops": case.flops / 1e12, "mfu": case.flops / median / peak["best"]}
        line |= {f"{which}_peak_tflops_per_second": rate / 1e12 for which, rate in peak.items()}
    line |= more | about_device(device)
    numbers = ("ms_per_image", "mfu", "peak_memory_gb", "first_call_seconds", "ratio")
    shown = ", ".join(f"{key} {line[key]:.4g}" for key in numbers if key in line)
    print(f"{name}: {median:.4g} s ({done.min():.4g} to {done.max():.4g}), {shown}")
    print(json.dumps(line), flush=True)


TABLE = {
    "case": "case",
    "batch_size": "batch",
    "precision": "dtype",
    "seconds": "s",
    "ms_per_image": "ms per image",
    "mfu": "MFU",
    "peak_memory_gb": "GB",
    "first_call_seconds": "first call, s",
    "ratio": "times the plain one",
}


def table(text: str) -> str:
    """The JSON lines of a run as a Markdown table, with device and date. ``UserError`` where there are none."""
    try:
        lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"case"')]
    except ValueError as error:
        raise cli.UserError(
            f"FILE: a line of it is damaged ({error}); give the output of a run of this script"
        ) from None
    if not lines:
        raise cli.UserError("FILE: holds no line of a benchmark; give the output of a run of this script")
    rows = ["| " + " | ".join(TABLE.values()) + " |", "|" + "---|" * len(TABLE)]
    for line in lines:
        cells = (line.get(key, "-") for key in TABLE)
        rows.append("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
    where = sorted({f"{line['on']}, torch {line['torch']}, {line['date']}" for line in lines})
    return "\n".join(
        [*rows, "", f"{'; '.join(where)}. MFU: share of the best rate of a large product in the same run."]
    )


#################################################################################
#                                  Measurements                                 #
#################################################################################


def measure(
    command: str, options: dict, vs: str | None, repeats: int, split: bool, context: DistributedContext
) -> None:
    """Time a case and, with --vs, its variant in turns."""
    device, variants = context.device, {"": options}
    if vs:
        given = build_parser().parse_args([command, *as_words(options), *shlex.split(vs)])
        variants[vs] = {name: value for name, value in vars(given).items() if name not in HIDDEN}
    timed: list[Case] = []
    more: list[dict[str, Any]] = []
    for variant in variants.values():  # one after another: the peak of each is its own
        with PeakMemory(device) as memory:
            case = CASES[command](variant, context)
            first, _ = seconds(case.work, device)
            case.work()
        timed.append(case)
        more.append({"first_call_seconds": first, "peak_memory_gb": memory.bytes / 1e9})
    times = time_in_turns([case.work for case in timed], repeats, device, warmup=1)
    for i, (name, variant) in enumerate(variants.items()):
        if name:
            ratios = times[:, i, 0] / times[:, 0, 0]
            more[i] |= {"ratio": statistics.median(ratios), "ratio_min": ratios.min(), "ratio_max": ratios.max()}
        if split:
            more[i]["profile"] = profile(timed[i].work, device)
        if context.is_main:
            report(f"{command} {name}".strip(), variant, timed[i], times[:, i], device, more[i])


def measure_store(options: dict, repeats: int) -> None:
    """Random reads of trajectories, and the cost of other layouts."""
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        stores = cases.store_cases(options, Path(folder))
        warmup = max(2, options["rows"] // options["batch_size"])
        with PeakMemory(cpu) as memory:
            times = time_in_turns([case.work for case in stores.values()], repeats, cpu, warmup)
    store, files, copy = times[:, :, 0].T
    more = {
        "peak_memory_gb": memory.bytes / 1e9,
        "over_files": statistics.median(files / store),
        "over_copy": statistics.median(store / copy),
    }
    report("store", options, stores["store"], times[:, 0], cpu, more)


def measure_metrics(options: dict, repeats: int, device: torch.device) -> None:
    """The slow figures of the evaluator, one after another."""
    for name, case in cases.metrics_cases(options, device).items():
        with PeakMemory(device) as memory:
            times = time_in_turns([case.work], repeats, device, warmup=0)
        report(name, options, case, times[:, 0], device, {"peak_memory_gb": memory.bytes / 1e9})


def measure_everything(device: str, minutes: float) -> None:
    """All cases of a GPU, each whatever became of those before."""
    started = time.monotonic()
    for line in GPU_CASES.strip().splitlines():
        words = shlex.split(line)
        if words[0] not in ("features", "store", "metrics"):
            words += ["--precision", "bf16"]
        if time.monotonic() - started > 60 * minutes:
            print(f"{line}: not started, {minutes:g} minutes are over", flush=True)
            continue
        try:
            run(build_parser().parse_args([*words, "--device", device]))
        except Exception as error:  # a case that fails must not cost the others
            print(f"{line}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()


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
    if args.command == "report":
        print(table(cli.existing_file("FILE", args.file).read_text()))
        return
    if args.command == "gpu":
        measure_everything(args.device, args.minutes)
        return
    options = {name: value for name, value in vars(args).items() if name not in HIDDEN}
    if args.command == "ddp":
        ranks = max(1, torch.cuda.device_count())
        options["batch_size"] *= ranks
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["-m", "bench"]
        command += ["train", *as_words(options), "--repeats", str(args.repeats), "--device", args.device]
        subprocess.run(command, check=True)
        return
    context = distributed.setup(args.device)
    if args.command == "store":
        measure_store(options, args.repeats)
    elif args.command == "metrics":
        measure_metrics(options, args.repeats, context.device)
    else:
        measure(args.command, options, args.vs, args.repeats, args.profile, context)
    distributed.finish(context)
