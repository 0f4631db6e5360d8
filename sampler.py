"""Shared by all samplers: options, and the one way from a sample's index to its noise, label, latent and image.

for indices in writer.missing_batches(batch_size):   # the loop stands in the script
    writer.write(indices, *sampler(indices))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusion.teacher_ode import OdeOptions, TeacherODE
from models import DiT
from models_ard import ARD
from runtime.checks import writable_folder
from runtime.cli import (
    Parser,
    UserError,
    add_dry_run_option,
    add_options,
    file,
    folder,
    name,
    not_negative,
    option,
    positive,
    read_options,
    shortened,
)
from runtime.distributed import DistributedContext, add_device_option
from runtime.precision import COMPILE_HELP, COMPUTED, CUDAGraph, autocast, cast_weights, compile_each, inference_copy
from runtime.provenance import require_same
from runtime.randomness import LABEL_POLICIES, Classes, Conditions, labels, noise
from runtime.vae import VAE, Pixels, decoder_precision, load_same_vae, resolve_name
from stores.checkpoints import load_teacher, recorded_teacher
from stores.images import from_uint8, to_uint8
from stores.samples import save_grid, writable_npz

# Noise (B, C, H, W) and y (B, ...), on the device -> a model's latents (B, C, H, W). Where there are
# source images their latents (B, C, H, W) come third.
Draw = Callable[..., torch.Tensor]
# The latents (B, C, H, W) of the source images of some indices, by the model's autoencoder.
Sources = Callable[[Sequence[int], VAE | Pixels], torch.Tensor]

PREVIEW_COLUMNS, PREVIEW_ROWS = 10, 6


def number_of(word: str) -> int:
    """The number that a word is, -1 for other words."""
    return int(word) if word.isdecimal() else -1


@dataclass(frozen=True)
class SampleOptions:
    """Which samples are drawn, and where they go."""

    out: str | None = option(None, "Write this .npz; without it, one beside the checkpoint and named after it.", file)
    num_samples: int = option(50_000, "Number of samples.", positive)
    seed: int = option(0, "Sample i depends on (seed, i) alone.", not_negative)
    label_policy: str = option("balanced", "Choose labels in this way.", choices=LABEL_POLICIES)
    class_labels: list[str] | None = option(
        None, "Take these classes in turn instead, numbers or names.", name, nargs="+", metavar="LABEL"
    )
    png: str | None = option(None, "Write every sample as a PNG into this folder as well.", folder)
    weights: str = option("ema", "Use these weights of the checkpoint.", choices=("ema", "raw"))
    vae: str | None = option(None, "Decode by ema, mse, a folder or hub id instead of its own autoencoder.", name)
    vae_precision: str = option(
        "auto",
        "Use this number format for the decoder; auto is bf16 on GPUs and fp32 on CPUs.",
        choices=("auto", *COMPUTED),
    )
    save_latents: bool = option(False, "Keep the samples before decoding, as float32.", action="store_true")

    def path(self, source: str) -> Path:
        """The .npz to write: ``out``, or one beside the checkpoint ``source``. ``UserError`` where it cannot be."""
        beside = f"{Path(source).with_suffix('')}-{self.weights}-seed{self.seed}-{self.num_samples}.npz"
        if self.png:
            writable_folder("--png", self.png)
        return writable_npz("--out", Path(self.out or beside))

    def labels(self, config: dict, conditions: Conditions) -> list[int] | None:
        """``class_labels`` as numbers of the model with this config. ``UserError`` for one that it does not have."""
        if not self.class_labels:
            return None
        names = config["provenance"].get("class_names") or []
        numbers = [names.index(word) if word in names else number_of(word) for word in self.class_labels]
        if wrong := [word for word, i in zip(self.class_labels, numbers) if not 0 <= i < max(conditions.count, 1)]:
            known = f" or a name: {shortened(names, 10)}" if names else ""
            raise UserError(f"--class-labels {wrong[0]}: this model has labels 0..{conditions.count - 1}{known}")
        return numbers


@dataclass(frozen=True)
class DrawingOptions:
    """How they are computed."""

    per_proc_batch_size: int = option(64, "Batch size per rank.", positive)
    precision: str = option("fp32", "Use this number format for matrix products.", choices=COMPUTED)
    compile: bool = option(False, COMPILE_HELP)
    cuda_graph: bool = option(
        False, "Record the sampler once and replay it, faster for small batches on GPUs; does nothing elsewhere."
    )

    @property
    def fill_up_to(self) -> int:
        """The size of every batch where code is made for one, else 0."""
        return self.per_proc_batch_size if self.compile or self.cuda_graph else 0


def add_sampling_options(parser: Parser) -> None:
    """The options that the samplers of teacher and student share."""
    add_options(parser.add_argument_group("samples"), SampleOptions)
    group = parser.add_argument_group("run")
    add_options(group, DrawingOptions)
    add_dry_run_option(group)
    add_device_option(group)


def check_sampling(
    config: dict, options: SampleOptions, precision: str, conditions: Conditions, context: DistributedContext
) -> dict:
    """The provenance of samples of the model with this config. ``UserError`` names an option that does not suit it."""
    own, given = config["vae"], options.vae
    if given and own is None and given != "none":
        raise UserError(f"--vae {given}: this model works on pixels, leave the option out")
    if given == "none" and own is not None:
        raise UserError(f"--vae none: this model works on latents of {own}, leave the option out")
    provenance = config["provenance"] | {
        "sample_seed": options.seed,
        "sample_labels": options.labels(config, conditions) or options.label_policy,
        "sample_precision": precision,
        "weights": options.weights,
        "decoder": resolve_name(given or own),
        "decoder_precision": decoder_precision(options.vae_precision, context.device),
    }
    return provenance | {f"sample_{name}": value for name, value in conditions.about.items()}


class Samples(NamedTuple):
    """The samples of some indices."""

    latents: torch.Tensor  # (B, C, h, w) float32
    images: torch.Tensor  # (B, 1 or 3, H, W) about [-1, 1]
    y: torch.Tensor  # (B,) labels


class Sampler:
    """Draws samples by their indices: noise and labels are functions of (seed, index), images come from the decoder."""

    def __init__(
        self,
        draw: Draw,
        model: DiT,
        vae: VAE | Pixels,
        device: torch.device,
        *,
        seed: int = 0,
        stream: str = "sample",
        label_policy: str = "balanced",
        class_labels: Sequence[int] | None = None,
        precision: str = "fp32",
        fill_up_to: int = 0,
        sources: Sources | None = None,
        conditions: Conditions | None = None,
    ):
        """``model`` says the shape of latents, and the classes where no ``conditions`` are given. ``class_labels`` are
        taken in turn instead of the policy's. ``fill_up_to``: smaller batches are drawn at this size, the one that
        compiled code is made for. ``sources``: ``draw`` takes their latents as well.
        """
        self.draw, self.vae, self.device, self.precision = draw, vae, device, precision
        self.shape, self.conditions = model.latent_shape, conditions or Classes(model.num_classes)
        self.seed, self.stream, self.label_policy, self.class_labels = seed, stream, label_policy, class_labels
        self.fill_up_to, self.sources = fill_up_to, sources

    @torch.no_grad()
    def __call__(self, indices: Sequence[int]) -> Samples:
        """The samples of these indices."""
        if self.class_labels:
            return self._labelled(indices, [self.class_labels[i % len(self.class_labels)] for i in indices])
        return self._labelled(indices, labels(self.seed, indices, self.conditions.count, self.label_policy).tolist())

    def _labelled(self, indices: Sequence[int], classes: Sequence[int]) -> Samples:
        z, y = noise(self.seed, self.stream, indices, self.shape), torch.tensor(classes)
        inputs = [z, y] + ([self.sources(indices, self.vae)] if self.sources else [])
        filler = max(0, self.fill_up_to - len(y))
        full = [torch.cat([x, x.new_zeros(filler, *x.shape[1:])]) for x in inputs]
        full[1] = self.conditions(full[1])
        full = [x.to(self.device) for x in full]
        with autocast(self.precision, self.device):
            latents = self.draw(*full)[: len(y)].float()
        return Samples(latents, self.vae.decode(latents), y)

    @torch.no_grad()
    def save_preview(self, path: Path) -> None:
        """Write a PNG grid with a column for each class or caption, or for some of many, as far apart as can be.

        Above it stand the names of the classes where they have any, or the captions.
        """
        columns = min(self.conditions.count or PREVIEW_COLUMNS, PREVIEW_COLUMNS)
        classes = [i * self.conditions.count // columns for i in range(columns)]
        titles = [self.conditions.text(label) for label in classes] if self.conditions.count else []
        images = self._labelled(range(columns * PREVIEW_ROWS), classes * PREVIEW_ROWS).images
        save_grid(path, to_uint8(images), columns, titles)


def open_sampler(
    draw: Draw,
    model: DiT,
    config: dict,
    options: SampleOptions,
    drawing: DrawingOptions,
    conditions: Conditions,
    context: DistributedContext,
    sources: Sources | None = None,
) -> Sampler:
    """The sampler of a command's options: ``model``, of this ``config``, goes to the device and into the number format
    that it is to compute in, and is compiled, or ``draw`` recorded, if it is to be. The autoencoder that decodes the
    samples is the model's own, or ``--vae``.
    """
    cast_weights(model.to(context.device), drawing.precision)
    if drawing.compile:
        compile_each(model.blocks)
    precision = decoder_precision(options.vae_precision, context.device)
    own = config["vae"], config["provenance"].get("vae_hash")
    return Sampler(
        CUDAGraph(draw, context.device) if drawing.cuda_graph else draw,
        model,
        load_same_vae(*own, context.device, options.vae, precision, drawing.compile),
        context.device,
        seed=options.seed,
        label_policy=options.label_policy,
        class_labels=options.labels(config, conditions),
        precision=drawing.precision,
        fill_up_to=drawing.fill_up_to,
        sources=sources,
        conditions=conditions,
    )


def source_latents(images: torch.Tensor, vae: VAE | Pixels, model: DiT) -> torch.Tensor:
    """Source images, (B, 3, H, W) uint8 on the device -> a model's latents (B, C, h, w), the encoder's mean."""
    if (vae.image_channels or model.in_channels) == 1:
        red, green, blue = images.int().unbind(1)
        images = ((299 * red + 587 * green + 114 * blue + 500) // 1000)[:, None]  # a grey image keeps its values
    return vae.encode(from_uint8(images))[0]


def learned_ode(
    provenance: dict, student: str | Path, teacher: str | None = None, conditions: Conditions | None = None
) -> TeacherODE:
    """The ODE whose trajectories a student has learned, by its ``provenance``; ``student`` is the path of its file.

    ``teacher``: its path, if not the recorded one. ``UserError`` where that is another one.
    ``conditions`` of a text student are captions, those that it was trained on or others.
    """
    if "teacher_hash" not in provenance:
        raise UserError(f"--teacher {teacher}: the student's checkpoint does not say whose trajectories it learned")
    path = teacher or recorded_teacher(provenance["teacher"], student)
    told = {"weights": provenance["teacher_weights"], "process": provenance.get("process", "ddpm")}
    model, config = load_teacher(path, vae=provenance.get("vae"), **told)
    found = {"teacher_hash": config["provenance"]["teacher_hash"]}
    require_same(f"--teacher {path}: the student learned from another teacher", provenance, found)
    options: dict[str, Any] = {"guidance_interval": None} | provenance
    return TeacherODE(model, conditions=conditions, **vars(read_options(OdeOptions, options)))


def student_previews(
    student: ARD,
    ema: Callable[[], ARD],
    vae: VAE | Pixels,
    device: torch.device,
    precision: str,
    conditions: Conditions | None = None,
) -> Sampler:
    """Draws a training student's images of the preview noises; ``ema()`` is the average of its weights by then."""

    def draw(noise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return inference_copy(ema(), precision).sample(noise, y)[:, -1]

    return Sampler(draw, student, vae, device, stream="preview", precision=precision, conditions=conditions)


def teacher_previews(
    model: DiT,
    ema: Callable[[], DiT],
    vae: VAE | Pixels,
    device: torch.device,
    precision: str,
    conditions: Conditions,
    solver_steps: int,
    cfg_scale: float,
) -> Sampler:
    """The same of a teacher in training, by an ODE of ``solver_steps``; ``model`` says its shape."""

    def draw(noise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ode = TeacherODE(ema(), solver_steps=solver_steps, cfg_scale=cfg_scale, conditions=conditions)
        return ode.sample(noise, y)

    return Sampler(draw, model, vae, device, stream="preview", precision=precision, conditions=conditions)
