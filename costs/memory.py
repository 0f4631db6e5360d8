"""The memory of a training step beside weights, optimiser and average, counted from the models' sizes.

Autograd keeps what a block's backward pass reads: a count of numbers for each number of the residual stream. How
many follows from the code of the blocks and, compiled, from what torch's partitioner computes again instead. A tracker
on tensors without numbers checks it (tests/pretended_cuda/memory.py). Counted are tensors: a GPU's CUDA context, what
libraries set aside, and what the allocator cannot use come on top.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from discriminator import Discriminator
from models import DiT
from models_ard import visible_steps
from runtime.precision import DTYPES
from stores.checkpoints import moments_bytes, weights_bytes

FP32 = 4


@dataclass(frozen=True)
class Execution:
    """How models run: the options of these names."""

    precision: str = "fp32"
    compile: bool = False
    checkpoint_activations: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a number in a matrix product."""
        return DTYPES[self.precision].itemsize


def cast_bytes(model: nn.Module, precision: str) -> int:
    """Bytes of the weights that ``runtime.precision.cast_weights`` casts, once they are cast."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return DTYPES[precision].itemsize * sum(p.numel() for layer in layers for p in layer.parameters())


def frozen_bytes(model: nn.Module, precision: str) -> int:
    """Bytes of the weights of a model that is only used, cast for it."""
    return FP32 * sum(p.numel() for p in model.parameters()) + cast_bytes(model, precision) - cast_bytes(model, "fp32")


def tokens_of(model: DiT, samples: int) -> int:
    """How many numbers pass from block to block: samples x points x tokens x width."""
    return samples * getattr(model, "steps", 1) * math.prod(model.pos_embed.shape)


def block_bytes(model: Any, how: Execution, *, history: bool = False, frozen: bool = False) -> float:
    """The numbers that a block keeps for its backward pass, for each number of the residual stream.

    ``frozen``: its weights take no gradients, so the inputs of its linear maps are not kept.
    """
    mlp, reads_text = model.config["mlp_ratio"], "caption_channels" in model.config
    if frozen:
        residual, products = 1 if how.compile else 2, 4 + mlp + how.compile  # q, k, v, what they read; the MLP within
    else:
        # Inputs of both norms and their outputs; compiled, one input. Linear maps' inputs, q, k, v, the MLP within.
        residual, products = 1 if how.compile else 4, 8 + 2 * mlp
    if reads_text:
        residual, products = residual + how.compile, products + 3
    if history:  # keys and values of what a step sees lie side by side, and so do the steps' outputs
        seen = [len(visible_steps(model.mask, step)) for step in range(model.steps)]
        products += 1 + 2 * sum(count for count in seen if count > 1) / model.steps
    return FP32 * residual + how.itemsize * products


def backward_bytes(
    model: DiT, samples: int, how: Execution, *, text_tokens: int = 0, frozen: bool = False
) -> tuple[int, int]:
    """Bytes that a forward pass of ``samples`` keeps for the backward pass, at the start of that and at its end."""
    numbers, depth, layers = tokens_of(model, samples), len(model.blocks), getattr(model, "history_layers", 0)
    text = 2 * how.itemsize * samples * text_tokens * model.config["hidden_size"]  # keys and values
    casts = 0 if frozen or how.itemsize == FP32 else cast_bytes(model.blocks[0], how.precision)
    plain, first = (
        numbers * block_bytes(model, how, history=history, frozen=frozen) + text + casts
        for history in (False, layers > 0)
    )
    under_way = numbers * (FP32 + how.itemsize * (1 + model.config["mlp_ratio"]))  # gradients inside a block
    if how.checkpoint_activations:
        start = FP32 * numbers * depth + (plain if layers < depth else first) + under_way
    else:
        heads = 0 if frozen else (2 * FP32 + how.itemsize) * numbers
        start = layers * first + (depth - layers) * plain + heads
    return round(start), round(first + under_way)


def forward_bytes(model: DiT, samples: int, how: Execution) -> int:
    """Bytes that a forward pass without gradients needs at once: the residual stream and an MLP."""
    return round(tokens_of(model, samples) * (2 * FP32 + 2 * how.itemsize * model.config["mlp_ratio"]))


def judged_bytes(heads: Discriminator, teacher: DiT, samples: int, batches: int, how: Execution) -> int:
    """Bytes that the discriminator's heads keep of ``batches`` of the teacher's features; one may stand for all."""
    head: Any = heads.heads[0]
    width, kernels = head.enter.norm.weight.numel(), sum(p.numel() for p in head.parameters())
    entering = how.itemsize * teacher.config["hidden_size"]
    within = width * (4 * how.itemsize if how.compile else 6 * FP32 + 2 * how.itemsize)
    casts = 0 if how.itemsize == FP32 else batches * how.itemsize
    tokens = samples * teacher.pos_embed.shape[1]
    return len(teacher.blocks) * (batches * tokens * (entering + within) + kernels * (FP32 + casts))


def step_bytes(
    model: DiT,
    how: Execution,
    samples: int,
    *,
    accumulation: int = 1,
    alone: bool = True,
    text_tokens: int = 0,
    teacher: DiT | None = None,
    solver_steps: int = 0,
    heads: Discriminator | None = None,
    rollout: bool = False,
) -> int:
    """The most that a rank's step on its samples holds at a time, gradients among it.

    ``alone``: gradients end with the step; in DDP their memory stays. ``teacher`` makes the trajectories in so many
    ``solver_steps``, or shows its features to the discriminator's ``heads``. ``rollout`` as in train_ARD_gan.py.
    """
    part, depth = math.ceil(samples / accumulation), len(model.blocks)
    own, theirs = moments_bytes(model) // 2, depth * moments_bytes(heads) // 2 // len(heads.heads) if heads else 0
    stays = 0 if alone else own + theirs
    sums, their_sums = (stays or size * (accumulation > 1) for size in (own, theirs))  # of the parts before
    start, end = backward_bytes(model, part * (1 + rollout), how, text_tokens=text_tokens)
    most = max(sums + start, (stays or own) + end)
    if teacher and heads:
        judging = backward_bytes(teacher, part, how, frozen=True)[0] + judged_bytes(heads, teacher, part, 1, how)
        features = FP32 * tokens_of(teacher, 2 * part) * depth
        return max(most, sums + start + judging, their_sums + features + judged_bytes(heads, teacher, part, 2, how))
    if teacher:  # its points, and once more side by side; both halves of guidance
        points = 2 * samples * (2 * solver_steps + 1) * FP32 * math.prod(teacher.latent_shape)
        return max(most, stays + points + forward_bytes(teacher, 2 * samples, how))
    return most


def training_memory(
    model: DiT,
    how: Execution,
    samples: int,
    *,
    teacher: DiT | None = None,
    heads: Discriminator | None = None,
    text_tokens: int = 0,
    **step: Any,
) -> dict[str, int]:
    """Bytes of a rank that trains on ``samples`` a step, by parts; the arguments are those of ``step_bytes``.

    Gradients take the activations' place as the backward pass frees these, which therefore count without them.
    """
    trained = [model, *([heads] * len(model.blocks) if heads else [])]
    moments = sum(moments_bytes(each) for each in trained)
    numbers = FP32 * (getattr(model, "steps", 1) + 1) * math.prod(model.latent_shape)
    caption = 2 * text_tokens * model.config.get("caption_channels", 0)  # float16
    most = step_bytes(model, how, samples, teacher=teacher, heads=heads, text_tokens=text_tokens, **step)
    return {
        "weights": sum(map(weights_bytes, trained)) + (frozen_bytes(teacher, how.precision) if teacher else 0),
        "gradients": moments // 2,
        "adam": moments,
        "ema": weights_bytes(model),
        "batch": samples * (numbers + caption),
        "activations": max(0, most - moments // 2),
    }
