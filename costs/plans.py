"""The needs of a command, counted from shapes before anything is loaded or made.

A run is refused by its plan where it cannot work, and ``--dry-run`` prints it, in every script alike:

    "disk_bytes"             bytes that the run writes, at its peak
    "memory_bytes_per_rank"  by parts, and in "total": at least so much, for a few small things are not counted
    "steps"                  how often the script's loop goes round: optimiser steps, or batches of a rank
    "epochs"                 passes over the data; null where they are made, or not known yet
    "flops"                  operations of all ranks together, two for a multiply-accumulate; null where not counted
    "fetch"                  files that would be downloaded first
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from costs.flops import count_by_blocks, count_gan_step, meta_model, sampling_gflops, text_shape, training_flops
from costs.memory import Execution, training_memory
from diffusion.process import Interval
from discriminator import Discriminator
from models import DiT
from runtime import launcher
from runtime.checks import in_words, require_disk, require_memory, size_of
from runtime.cli import ShortageError, UserError
from runtime.distributed import DistributedContext
from runtime.precision import DTYPES, on_meta_device
from runtime.vae import Outline, Pixels, outline_vae
from stores import samples
from stores.checkpoints import moments_bytes, weights_bytes
from stores.runs import run_bytes

PIXELS = Pixels()
ACCURACY = 0.15  # of a plan's memory, which counts neither all of a step's tensors nor what a GPU's libraries take


@dataclass(frozen=True)
class Plan:
    """See above. ``flops`` counts when it is called; ``amount`` and ``batch`` are the options to name in a message."""

    amount: str
    batch: str
    disk_bytes: int
    memory: dict[str, int]
    steps: int
    epochs: float | None = None
    flops: Callable[[], float] | None = None
    fetch: list[str] = field(default_factory=list)
    more: Callable[[], dict] = dict  # to tell
    lighter: Callable[[], dict[str, int]] = dict  # bytes of memory with other options, in words

    def check(self, path: str | Path, device: torch.device) -> None:
        """``ShortageError`` where disk or memory are too small; the files at ``path`` are a part of it."""
        path = Path(path)
        there = path.with_suffix(".partial") if path.suffix == ".npz" else path
        try:
            if not path.is_file():
                require_disk(self.amount, path, self.disk_bytes - size_of(there))
            require_memory(self.batch, self.memory.get("batch", 0), torch.device("cpu"))  # it is made there
            needed, what = sum(self.memory.values()), f"{self.batch}, with this model"
            total = require_memory(what, round((1 - ACCURACY) * needed), device, self.advice)
        except UserError as error:
            raise ShortageError(str(error), self.describe) from None
        advice = self.advice(total) if device.type == "cuda" and (1 + ACCURACY) * needed > total else ""
        if advice and launcher.speaker().rank == 0:
            has = f"about {in_words(needed)} of memory, the GPU has {in_words(total)}"
            print(f"{what}: {has}{advice}", file=sys.stderr)

    def advice(self, total: int) -> str:
        """Which options surely do with so much memory, from the fastest on, for a sentence; "" where none do."""
        fits = {way: size for way, size in self.lighter().items() if (1 + ACCURACY) * size < total}
        first = {way.partition(" ")[0]: way for way in reversed(fits)}  # the fewest parts of each kind
        return "; " * bool(first) + ", ".join(f"{way} needs {in_words(fits[way])}" for way in reversed(first.values()))

    def describe(self) -> dict:
        """As JSON has it."""
        return {
            "disk_bytes": self.disk_bytes,
            "memory_bytes_per_rank": self.memory | {"total": sum(self.memory.values())},
            "steps": self.steps,
            "epochs": self.epochs,
            "flops": round(self.flops()) if self.flops else None,
            "fetch": self.fetch,
            **self.more(),
        }


def latent_shape_of(config: dict) -> tuple[int, int, int]:
    """(C, H, W) of the output of a model of that config; DiT's own defaults where it does not say."""
    side = config.get("input_size", 32)
    return config.get("in_channels", 4), side, side


def text_numbers(config: dict, text_tokens: int) -> int:
    """How many numbers a caption is to a text model of that config; 0 for a model of classes."""
    shape = text_shape(config, text_tokens)
    return math.prod(shape) if shape else 0


def plan_training(
    config: dict,
    context: DistributedContext,
    *,
    rows: int | None,
    global_batch_size: int,
    accumulation: int,
    iterations: int,
    ckpt_every: int,
    keep: int,
    precision: str = "fp32",
    compile: bool = False,
    checkpoint_activations: bool = False,
    vae: Outline | Pixels = PIXELS,
    frozen: DiT | None = None,
    heads: Discriminator | None = None,
    flops_per_sample: Callable[[], float] | None = None,
    text_tokens: int = 0,
    group: int = 1,
    **step: Any,
) -> Plan:
    """Of a trainer, whose model has this ``config``, on ``rows`` of data.

    ``frozen`` is a teacher that is used besides. ``heads`` of a discriminator are in training too, without an average;
    one stands for those of all blocks. ``text_tokens`` are those of the longest caption of a text model. Parts of a
    batch are multiples of ``group``. ``step`` are the other arguments of ``training_memory``.
    """
    model, share = meta_model(config), len(context.share(global_batch_size))
    step |= {"teacher": frozen, "heads": heads, "alone": context.world_size == 1}
    step["text_tokens"] = text_shape(config, text_tokens)[0] if "caption_channels" in config else 0

    def memory_of(accumulation: int, checkpoint_activations: bool) -> dict[str, int]:
        how = Execution(precision, compile, checkpoint_activations)
        memory = training_memory(model, how, share, accumulation=accumulation, **step)
        return memory | {"weights": memory["weights"] + vae.weights_bytes, "order": 8 * (rows or 0)}

    def lighter() -> dict[str, int]:
        parts = [part for part in (2, 4, 8, 16, 32, 64) if part > accumulation and share % (part * group) == 0]
        ways = {f"--accumulation {part}": memory_of(part, checkpoint_activations) for part in parts}
        if not checkpoint_activations:
            ways["--checkpoint-activations"] = memory_of(accumulation, True)
            ways |= {f"--checkpoint-activations --accumulation {part}": memory_of(part, True) for part in parts}
        return {way: sum(memory.values()) for way, memory in ways.items()}

    trained = [model, *([heads] * len(model.blocks) if heads else [])]
    kept = weights_bytes(model) + sum(weights_bytes(each) + moments_bytes(each) for each in trained)
    samples = iterations * global_batch_size
    one = partial(training_flops, text_tokens=text_tokens)
    return Plan(
        f"--iterations {iterations} with --ckpt-every {ckpt_every}",
        f"--global-batch-size {global_batch_size}",
        run_bytes(kept, iterations, ckpt_every, keep),
        memory_of(accumulation, checkpoint_activations),
        iterations,
        samples / rows if rows else None,
        lambda: samples * (flops_per_sample() if flops_per_sample else count_by_blocks(config, one)),
        [] if vae.downloaded else [str(vae.name)],
        lighter=lighter,
    )


def plan_gan(
    student: dict,
    teacher: dict,
    context: DistributedContext,
    *,
    d_time: int,
    d_width: int | None,
    bn_group: int,
    rollout: bool,
    **options: Any,
) -> Plan:
    """Of R+D with models of these configs; the options are those of ``count_gan_step`` and of ``plan_training``.

    ``UserError`` where parts of the batch cut a group of the heads' batch norm.
    """
    size, parts = options["global_batch_size"], context.world_size * options["accumulation"]
    if size % (parts * bn_group):
        raise UserError(
            f"--global-batch-size {size}: {context.world_size} ranks x --accumulation {options['accumulation']} cut "
            f"the groups of --bn-group {bn_group}; give a multiple of {parts * bn_group}, or smaller groups"
        )
    cost = cache(
        partial(count_gan_step, student, teacher, d_time=d_time, d_width=d_width, bn_group=bn_group, rollout=rollout)
    )
    frozen = meta_model(teacher)
    with on_meta_device():  # all the same: making one spares seconds
        head = Discriminator(1, frozen.config["hidden_size"], d_width, bn_group)
    plan = plan_training(
        student,
        context,
        frozen=frozen,
        heads=head,
        rollout=rollout,
        group=bn_group,
        flops_per_sample=lambda: 1e12 * cost()["tflops_per_sample"]["R+D"],
        **options,
    )
    return replace(plan, more=cost)


def plan_samples(
    config: dict,
    context: DistributedContext,
    *,
    num_samples: int,
    per_proc_batch_size: int,
    precision: str,
    save_latents: bool,
    vae: Any = None,
    **solver: Any,
) -> Plan:
    """Of a sampler, whose options these are; parts and the file made of them lie on the disk side by side."""
    channels, side, _ = latent = latent_shape_of(config)
    vae = outline_vae("ema" if channels == 4 else None) if vae is None else vae
    row = samples.row_bytes(side * vae.factor, latent if save_latents else ())
    return plan_sampling(
        config,
        context,
        amount=f"--num-samples {num_samples}",
        count=num_samples,
        batch_size=per_proc_batch_size,
        row_bytes=2 * row,
        held_bytes=samples.INDEX_BYTES * num_samples,
        precision=precision,
        vae=vae,
        **solver,
    )


def plan_sampling(
    config: dict,
    context: DistributedContext,
    *,
    amount: str,
    count: int,
    batch_size: int,
    row_bytes: int,
    held_bytes: int = 0,
    solver_steps: int = 0,
    cfg_scale: float = 1.5,
    guidance_interval: Interval | None = None,
    precision: str = "fp32",
    vae: Outline | Pixels = PIXELS,
    text_tokens: int = 0,
) -> Plan:
    """Of what draws ``count`` samples or trajectories, ``row_bytes`` each on the disk.

    ``held_bytes``: those in a rank's memory beside a batch. ``solver_steps`` of a teacher; a student has its
    own.
    """
    model: Any = meta_model(config)
    rows = min(batch_size, count)
    held = rows * math.prod(model.latent_shape) * 4
    memory = {
        "weights": weights_bytes(model) * DTYPES[precision].itemsize // 4 + vae.weights_bytes,
        "batch": held * (2 * solver_steps + 1 if solver_steps else model.steps + 1)
        + 2 * rows * text_numbers(config, text_tokens),
        "rows": held_bytes,
    }
    steps = math.ceil(len(context.share(count)) / batch_size)
    one = partial(
        sampling_gflops,
        steps=solver_steps,
        cfg_scale=cfg_scale,
        text_tokens=text_tokens,
        guidance_interval=guidance_interval,
    )
    fetch = [] if vae.downloaded else [str(vae.name)]
    batch = f"--per-proc-batch-size {batch_size}"
    return Plan(
        amount, batch, count * row_bytes, memory, steps, None, lambda: 2e9 * count * count_by_blocks(config, one), fetch
    )
