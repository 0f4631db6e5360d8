"""Count the GFLOPs column of the paper's Table 1 from our own models, on the meta device: nothing is computed.

    python -m costs.flops --json flops.json

PyTorch's counter watches the same ``ARD.sample`` and ``DiT.forward`` that users run, for one image of DiT-XL/2. The
paper counts multiply-accumulates, half of PyTorch's count, of the backbone, without the VAE.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion import process_of
from diffusion.process import Interval
from discriminator import AdversarialLosses, Discriminator, FrozenFeatures, own_history
from models import DiT, DiT_models
from models_ard import ARD
from models_pixart import student_type, teacher_type
from presets import TABLE_1
from runtime import cli
from runtime.checks import require_memory
from runtime.files import read_json, require_replaceable, write_text
from runtime.precision import on_meta_device

TEXT_TOKENS = 300  # of a caption where no store says how many: PixArt-Sigma's longest


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations (two for a multiply-accumulate) of ``work()``."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def meta_model(config: dict) -> DiT:
    """The model of a config on the meta device: shapes without numbers. ``ValueError`` where there is no such model."""
    side = config.get("input_size", 32)
    positions = 8 * (side // config.get("patch_size", 2)) ** 2 * config.get("hidden_size", 1152)
    require_memory(f"a model of {side} x {side} pixels or latents", positions, torch.device("cpu"))
    kind = student_type(config) if "steps" in config else teacher_type(config)
    with on_meta_device():
        return kind(**config).to("meta")


def text_shape(config: dict, text_tokens: int = 0) -> tuple[int, ...]:
    """(L, C) of a caption for a text model of that config, () for a model of classes."""
    channels = config.get("caption_channels")
    return (text_tokens or TEXT_TOKENS, channels) if channels else ()


def blank_inputs(model: DiT, text_tokens: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of noise and of y, a label or a caption, on the model's device."""
    device, shape = next(model.parameters()).device, text_shape(model.config, text_tokens)
    y = torch.ones(1, *shape, dtype=torch.float32 if shape else torch.int64, device=device)
    return torch.empty(1, *model.latent_shape, device=device), y


def count_by_blocks(config: dict, count: Callable[[Any], float]) -> float:
    """``count`` of the model of that config, in a moment: from models of one or two blocks, since all cost the same."""
    depth, layers = config.get("depth", 28), config.get("history_layers", 0)

    def few(blocks: int, with_history: int) -> float:
        history = {"history_layers": with_history} if "history_layers" in config else {}
        return count(meta_model(config | {"depth": blocks} | history))

    one, two = few(1, 0), few(2, 0)
    return one + (depth - 1) * (two - one) + (layers * (few(2, 1) - two) if layers else 0)


@torch.no_grad()
def sampling_gflops(
    model: DiT, steps: int, cfg_scale: float = 1.5, text_tokens: int = 0, guidance_interval: Interval | None = None
) -> float:
    """Multiply-accumulates, in 1e9, that one image costs: a student's sampling, or a teacher's ODE with guidance."""
    noise, y = blank_inputs(model, text_tokens)
    if isinstance(model, ARD):
        return count_flops(lambda: model.sample(noise, y)) / 2e9
    # A step is the same work at every time: count one, and one on both halves of the batch, and multiply.
    process = process_of(model)
    guided = sum(process.guided_steps(steps, guidance_interval)) if cfg_scale != 1 else 0
    alone, both = (count_flops(partial(process.trajectory, model, noise, y, 1, scale)) for scale in (1, cfg_scale))
    return (guided * both + (steps - guided) * alone) / 2e9


def training_flops(model: DiT, text_tokens: int = 0) -> int:
    """Operations of a training step for one sample, forward and backward; the model is on the meta device.

    A student's is that of regression, on all of its steps.
    """
    x, y = blank_inputs(model, text_tokens)
    time = torch.zeros(1, device=x.device)
    inputs = (x.expand(1, model.steps, *model.latent_shape), y) if isinstance(model, ARD) else (x, time, y)
    return count_flops(lambda: model(*inputs).sum().backward())


def count_online_step(student: dict, teacher: dict, solver_steps: int, text_tokens: int = 0, **guidance: Any) -> float:
    """Operations of a step of regression, by models of these configs, for one sample whose trajectory is made in it.

    ``guidance``: the options of ``sampling_gflops``.
    """
    made = count_by_blocks(teacher, partial(sampling_gflops, steps=solver_steps, text_tokens=text_tokens, **guidance))
    return count_by_blocks(student, partial(training_flops, text_tokens=text_tokens)) + 2e9 * made


def count_gan_step(
    student_config: dict, teacher_config: dict, *, d_time: int, d_width: int | None, bn_group: int, rollout: bool
) -> dict:
    """Cost of one sample's step of R and of R+D (two operations per multiply-accumulate), and the heads' size.

    The options are those of train_ARD_gan.py, the configs those of the models; no weights are made.
    """

    def models(blocks: int) -> tuple[DiT, Discriminator]:
        with on_meta_device():
            teacher = DiT(**teacher_config | {"depth": blocks}).to("meta")
            return teacher, Discriminator(blocks, teacher.config["hidden_size"], d_width, bn_group)

    def step(student: Any) -> int:
        teacher, heads = models(len(student.blocks))
        losses_of = AdversarialLosses(student, heads, FrozenFeatures(teacher, d_time))
        latent, y = blank_inputs(teacher)
        batch = {"trajectory": latent.expand(1, student.steps + 1, *latent.shape[1:]), "y": y, "real_y": y}
        batch |= dict.fromkeys(("fake", "real", "fake_noise", "real_noise"), latent)

        def work() -> None:
            if rollout:
                batch["rollout"] = own_history(student, latent, y)
            losses, _ = losses_of.student_losses(batch, 1.0)
            losses["loss"].sum().backward()
            losses_of.discriminator_losses(batch)["loss"].sum().backward()

        return count_flops(work)

    counts = {"R": count_by_blocks(student_config, training_flops), "R+D": count_by_blocks(student_config, step)}
    return {
        "discriminator_parameters": teacher_config.get("depth", 28) * sum(p.numel() for p in models(1)[1].parameters()),
        "tflops_per_sample": {name: count / 1e12 for name, count in counts.items()},
        "flops_over_regression": counts["R+D"] / counts["R"],
    }


def count_table(model: str) -> list[dict]:
    """One row for each of Table 1's, counted for the given size."""
    rows, counted = [], {}
    with on_meta_device():
        teacher = DiT_models[model]()
    for name, row in TABLE_1.items():
        layers = None if row.history_layers is None else min(row.history_layers, len(teacher.blocks))
        case = row.steps, row.mask, layers
        if case not in counted:
            with on_meta_device():
                student = None
                if row.mask is not None and layers is not None:
                    student = ARD(row.steps, row.mask, layers, **teacher.config)
            counted[case] = sampling_gflops(student or teacher, row.steps)
        paper = row.gflops if model == "DiT-XL/2" else None
        about = {"row": name, "loss": row.loss, "steps": row.steps, "mask": row.mask, "history_layers": layers}
        rows.append(about | {"gflops": counted[case], "paper_gflops": paper})
    return rows


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, prog="costs.flops", description="Count the GFLOPs column of the paper's Table 1.")
    parser.add_argument("--model", choices=DiT_models, default="DiT-XL/2", metavar="NAME", help="Size of the model.")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="Write JSON rows to FILE, or print them.")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.json and args.json != "-":
        require_replaceable("--json", args.json, "a table of this command", lambda path: read_json(path)[0]["gflops"])
    rows = count_table(args.model)
    if args.json == "-":
        print(json.dumps(rows, indent=2))
        return
    print(f"{'row':<18}{'loss':>5}{'S':>5}{'mask':>6}{'N':>4}{'GFLOPs':>10}{'paper':>9}{'off by':>9}")
    for row in rows:
        mask, layers, paper = row["mask"] or "-", row["history_layers"], row["paper_gflops"]
        off = f"{100 * (row['gflops'] / paper - 1):+.2f}%" if paper else "-"
        layers = "-" if layers is None else layers
        line = f"{row['row']:<18}{row['loss']:>5}{row['steps']:>5}{mask:>6}{layers:>4}"
        print(f"{line}{row['gflops']:>10.1f}{paper or '-':>9}{off:>9}")
    if args.json:
        write_text(args.json, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    cli.main(build_parser(), run)
