"""The cost of each stage of the ImageNet path: disk, memory, operations, and an estimate of the time.

    python -m costs.stages
    python -m costs.stages --tflops 400 --stack 28
    python -m costs.stages --memory # of a GPU in training: by its samples and options, and how many fit
    python -m costs.stages --rows   # each row of Table 1 by itself: its published figures, what it takes to train
    python -m costs.stages --flows  # what flow teachers cost in DiT's place, and their published figures

Bytes follow from the formats and the presets, operations are counted on the meta device from our own models; both are
exact. Hours are an estimate: operations divided by a rate that you name, with nothing lost between steps. Memory of a
GPU is that of weights, gradients, optimiser and average; activations come on top. That of the host is a rank's while it
works: models that are loaded, shards that are made, and in training the main rank's copy for its next snapshot.
"""

import argparse
from bisect import bisect
from functools import partial
from typing import Any

from costs.flops import TEXT_TOKENS, count_by_blocks, count_gan_step, meta_model, sampling_gflops, training_flops
from costs.memory import Execution, training_memory
from diffusion import PROCESSES
from diffusion.teacher_ode import TARGETS, grid_steps
from discriminator import Discriminator
from models import DiT, DiT_models
from models_ard import ARD, MASKS
from models_pixart import named_shape
from presets import FLOW_FIGURES, FLOW_ODES, TABLE_1, preset
from runtime import cli
from runtime.precision import on_meta_device
from runtime.vae import VAE_BYTES
from stores import latents, samples, trajectories
from stores.foreign_weights import shape_by_name
from stores.shards import ROWS_PER_SHARD

IMAGES, CLASSES, PIXELS = 1_281_167, 1000, 256  # ImageNet's training set as DiT-XL/2 256x256 sees it
INCEPTION_BYTES = 4 * 23_885_392  # weights of Inception-v3
INCEPTION_GFLOPS = 11.4  # two operations per multiply-accumulate, one image of 299x299
MEMORY_PRESETS = (
    *(("train_ARD.py", "ard-n6-m4-s4"), ("train_ARD_gan.py", "ard-n6-m4-s4-gan")),
    *(("train_ARD.py", "t2i-sigma-512"), ("train_ARD.py", "t2i-sigma-1024")),
)
WAYS = {
    "plain": Execution("bf16"),
    "`--compile`": Execution("bf16", compile=True),
    "`--checkpoint-activations`": Execution("bf16", checkpoint_activations=True),
    "both": Execution("bf16", compile=True, checkpoint_activations=True),
}
FEATURES = 2048 + 2023 + 1008  # numbers that the evaluator keeps of an image, float32
COLUMNS = (
    "stage",
    "how much",
    "operations",
    "GPU hours (estimate)",
    "disk",
    "memory of a GPU, at least",
    "of the host",
)
FLOW_COLUMNS = (
    *("preset", "solver", "guidance", "guided steps", "GMAC of a trajectory", "the dump's operations"),
    "GPU hours (estimate)",
)
ROW_COLUMNS = ("preset", "FID", "IS", "precision", "recall", "training", "operations", "GPU hours (estimate)")


def size(count: float) -> str:
    """Bytes to read."""
    return f"{count / 1e9:.0f} GB" if count >= 1e10 else f"{count / 1e9:.2g} GB"


def count_stages(tflops: float, steps: int, mask: str, stack: int) -> list[dict[str, Any]]:
    """One row for each stage, by the presets of the row of Table 1 that has R and R+D."""
    dump, train = preset("sample_trajectory.py")["ard-n6-m4-s4"], preset("train_ARD.py")["ard-n6-m4-s4"]
    gan, draw = preset("train_ARD_gan.py")["ard-n6-m4-s4-gan"], preset("sample_ARD.py")["ard-n6-m4-s4"]
    with on_meta_device():
        teacher = DiT_models["DiT-XL/2"](num_classes=CLASSES)
        student = ARD.from_teacher(teacher, steps, mask, stack)
    weights, own = (4 * sum(p.numel() for p in model.parameters()) for model in (teacher, student))
    step = count_gan_step(student.config, teacher.config, d_time=0, d_width=None, bn_group=6, rollout=False)
    heads, per_sample = 4 * step["discriminator_parameters"], step["tflops_per_sample"]
    trained, kept = 5 * own, 4 * own  # with gradient and AdamW's two moments and the average; without the gradient
    points = len(grid_steps(dump["steps"], dump["grid"]))
    trajectory = trajectories.row_bytes(teacher.latent_shape, points, len(TARGETS), "fp16")
    encoded = latents.row_bytes(teacher.latent_shape, "fp16")
    drawn = draw["num_samples"]

    def row(stage: str, amount: str, work: float | None, disk: float, gpu: float, host: float) -> dict[str, Any]:
        values = (
            stage,
            amount,
            f"{work / 1e6:.3g} EFLOP" if work else "not counted",
            f"{work / tflops / 3600:.3g}" if work else "-",
            size(disk),
            size(gpu),
            size(host),
        )
        return dict(zip(COLUMNS, values, strict=True))

    return [
        row(
            "sample_trajectory.py",
            f"{dump['num_trajectories']:,} trajectories, once for all rows",
            dump["num_trajectories"] * sampling_gflops(teacher, dump["solver_steps"]) * 2 / 1e3,
            dump["num_trajectories"] * trajectory,
            weights,
            weights + 2 * ROWS_PER_SHARD * trajectory,
        ),
        row(
            "train_ARD.py",
            f"{train['iterations']:,} steps of {train['global_batch_size']}, 6 checkpoints and a snapshot",
            train["iterations"] * train["global_batch_size"] * per_sample["R"],
            7 * kept,
            trained,
            kept,
        ),
        row(
            "encode_latents.py",
            f"{IMAGES:,} images, both sides",
            None,
            IMAGES * encoded,
            VAE_BYTES,
            VAE_BYTES + 2 * ROWS_PER_SHARD * encoded,
        ),
        row(
            "train_ARD_gan.py",
            f"{gan['iterations']:,} steps of {gan['global_batch_size']}, a checkpoint and a snapshot",
            gan["iterations"] * gan["global_batch_size"] * per_sample["R+D"],
            2 * (kept + 3 * heads),
            trained + 4 * heads + weights,
            kept + 3 * heads,
        ),
        row(
            "sample_ARD.py",
            f"{drawn:,} images",
            drawn * sampling_gflops(student, steps) * 2 / 1e3,
            drawn * samples.row_bytes(PIXELS),
            own + VAE_BYTES,
            own + VAE_BYTES,
        ),
        row(
            "evaluations.evaluator",
            f"{drawn:,} samples, 10,000 real images",
            (drawn + 10_000) * INCEPTION_GFLOPS / 1e3,
            (drawn + 10_000) * FEATURES * 4,
            INCEPTION_BYTES,
            (drawn + 10_000) * FEATURES * 4,
        ),
    ]


def count_memory(card: float) -> list[dict[str, Any]]:
    """For the presets in training: memory of a GPU, one of 8, and the most samples of one GPU that ``card`` GB hold."""
    counted = []
    for script, name in MEMORY_PRESETS:
        options = preset(script)[name]
        config = shape_by_name(str(options.get("teacher"))) or named_shape(options["model"])
        student = meta_model(
            config | {"steps": options["steps"], "mask": options["mask"], "history_layers": options["stack"]}
        )
        step: dict[str, Any] = {}
        if "caption_channels" in config:
            step = {"text_tokens": TEXT_TOKENS, "teacher": meta_model(config), "solver_steps": options["solver_steps"]}
        elif script == "train_ARD_gan.py":
            with on_meta_device():
                step = {"teacher": meta_model(config), "heads": Discriminator(1, config["hidden_size"])}

        share, fits = options["global_batch_size"] // 8, range(1, 1000)
        shared, most = {"samples of a GPU": f"{share}, of 8 GPUs"}, {"samples of a GPU": f"most on {card:g} GB"}
        for way, how in WAYS.items():
            shared[way] = f"{_bytes(share, student, how, alone=False, **step) / 1e9:.1f} GB"
            most[way] = str(bisect(fits, card * 1e9, key=partial(_bytes, student=student, how=how, **step)))
        counted += [{"preset": f"`{name}`"} | shared, {"preset": f"`{name}`"} | most]
    return counted


def _bytes(samples: int, student: DiT, how: Execution, **step: Any) -> int:
    return sum(training_memory(student, how, samples, **step).values())


def count_rows(tflops: float) -> list[dict[str, Any]]:
    """For each row of Table 1: the paper's figures, and the cost of training its presets (R+D: on top of R)."""
    regression, adversarial = preset("train_ARD.py"), preset("train_ARD_gan.py")
    teacher = dict(DiT_models["DiT-XL/2"].keywords, num_classes=CLASSES)
    counted = []
    for name, row in TABLE_1.items():
        work, trained = 0.0, "-"
        if row.mask:
            options, shape = (
                (adversarial if row.loss == "R+D" else regression)[name],
                ("steps", "mask", "history_layers"),
            )
            student = teacher | {key: getattr(row, key) for key in shape}
            per_sample = count_by_blocks(student, training_flops)
            if row.loss == "R+D":
                step = count_gan_step(student, teacher, d_time=0, d_width=None, bn_group=6, rollout=False)
                per_sample = 1e12 * step["tflops_per_sample"]["R+D"]
            trained = f"{options['iterations']:,} steps of {options['global_batch_size']}"
            work = options["iterations"] * options["global_batch_size"] * per_sample / 1e18
        values = (
            *(f"`{name}`", f"{row.fid:.2f}", f"{row.inception_score:.2f}", f"{row.precision:.3f}", f"{row.recall:.3f}"),
            *(trained, f"{work:.3g} EFLOP" if work else "-", f"{1e6 * work / tflops / 3600:.3g}" if work else "-"),
        )
        counted.append(dict(zip(ROW_COLUMNS, values, strict=True)))
    return counted


def count_flows(tflops: float) -> list[dict[str, Any]]:
    """For DiT and each flow teacher: what its dump by its preset takes; students cost the same with all of them."""
    dumps, counted = preset("sample_trajectory.py"), []
    for name in ("", *(f"{flow}-" for flow in FLOW_ODES)):
        dump = dumps[f"{name}ard-n6-m4-s4"]
        teacher = shape_by_name(dump["teacher"])
        assert teacher is not None
        steps, interval = dump["solver_steps"], dump.get("guidance_interval")
        solver = {"steps": steps, "cfg_scale": dump["cfg_scale"], "guidance_interval": interval}
        gflops = count_by_blocks(teacher, partial(sampling_gflops, **solver))
        work = 2e9 * gflops * dump["num_trajectories"] / 1e18
        process = PROCESSES[teacher.get("process", "ddpm")]
        on = f" on [{interval[0]:g}, {interval[1]:g}]" if interval else ""
        values = (
            *(f"`{name}ard-n6-m4-s4`", f"{process.solver}, {steps} steps", f"{dump['cfg_scale']:g}{on}"),
            *(f"{sum(process.guided_steps(steps, interval))} of {steps}", f"{gflops:.0f}"),
            *(f"{work:.3g} EFLOP", f"{1e6 * work / tflops / 3600:.3g}"),
        )
        counted.append(dict(zip(FLOW_COLUMNS, values, strict=True)))
    return counted


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, prog="costs.stages", description="Count the cost of each stage of the ImageNet path.")
    parser.add_argument(
        "--tflops", type=cli.positive_number, default=300.0, help="Rate of a GPU, in 1e12 operations per second."
    )
    parser.add_argument("--steps", type=cli.positive, default=4, help="S, the student's steps.")
    parser.add_argument("--mask", choices=MASKS, default="M4", help="Points a step sees: M1 its own .. M4 all before.")
    parser.add_argument("--stack", type=cli.not_negative, default=6, help="N, the lower blocks that see history.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--rows", action="store_true", help="Print each row of Table 1 instead, by its presets.")
    kind.add_argument("--flows", action="store_true", help="Print the dumps of flow teachers instead, by presets.")
    kind.add_argument("--memory", action="store_true", help="Print a GPU's memory in training instead, in bf16.")
    parser.add_argument("--card", type=cli.positive_number, default=80.0, help="Memory of the GPU in GB, for --memory.")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.memory:
        rows = count_memory(args.card)
    elif args.flows:
        rows = count_flows(args.tflops)
    else:
        rows = count_rows(args.tflops) if args.rows else count_stages(args.tflops, args.steps, args.mask, args.stack)
    print("| " + " | ".join(rows[0]) + " |\n" + "|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")
    if args.flows:
        print("\n| teacher | its authors' sampler | guidance | FID, published |\n|---|---|---|---|")
        print("\n".join(f"| {' | '.join(row)} |" for row in FLOW_FIGURES))
    if args.memory:
        print("\nTensors only, planned; bf16. The CUDA context, libraries and the allocator want some GB more.")
        return
    if args.rows or args.flows:
        whose = "the paper's (Table 1)" if args.rows else "not ours, and not of these solvers"
        print(f"\nFigures are {whose}. Hours are an estimate at {args.tflops:g} TFLOP/s per GPU.")
        return
    print(
        f"\nDiT-XL/2, 256 px, S={args.steps}, {args.mask}, N={args.stack}. Operations and bytes are counted; hours are "
        f"an estimate at {args.tflops:g} TFLOP/s per GPU. Activations need more memory, with the batch of a GPU."
    )


if __name__ == "__main__":
    cli.main(build_parser(), run)
