"""What all samplers share: options, and the one way from a sample's index to its noise, label, latent and image.

for indices in writer.missing_batches(batch_size):   # the loop stands in the script
    writer.write(indices, *sampler(indices))
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusion.teacher_ode import ODE_OPTIONS, TeacherODE
from models import DiT
from models_ard import ARD
from runtime.cli import Parser, UserError, add_dry_run_option, file, name, not_negative, positive
from runtime.distributed import DistributedContext, add_device_option
from runtime.precision import (
    COMPUTED,
    CUDAGraph,
    add_compile_option,
    add_precision_option,
    autocast,
    cast_weights,
    compile_blocks,
    inference_copy,
)
from runtime.provenance import require_same
from runtime.randomness import LABEL_POLICIES, Classes, Conditions, labels, noise
from runtime.vae import VAE, Pixels, decoder_precision, load_same_vae, outline_vae, resolve_name
from stores.checkpoints import load_teacher, recorded_teacher
from stores.images import from_uint8, to_uint8
from stores.samples import SampleWriter, save_grid, writable_npz

# Noise (B, C, H, W) and y (B, ...), on the device -> latents (B, C, H, W): what a model makes of them. Where there are
# source images their latents (B, C, H, W) come third.
Draw = Callable[..., torch.Tensor]
# The latents (B, C, H, W) of the source images of some indices, by the model's autoencoder.
Sources = Callable[[Sequence[int], VAE | Pixels], torch.Tensor]

PREVIEW_COLUMNS, PREVIEW_ROWS = 10, 6

# What ``SamplingJob`` takes of the options.
SAMPLING_OPTIONS = (
    *("out", "num_samples", "seed", "label_policy", "class_labels", "weights", "vae", "vae_precision"),
    *("save_latents", "per_proc_batch_size", "precision", "compile", "cuda_graph"),
)


def add_sampling_options(parser: Parser) -> None:
    """The options that the samplers of teacher and student share."""
    group = parser.add_argument_group("samples")
    group.add_argument(
        "--out", type=file, help="Write this .npz; without it, one beside the checkpoint and named after it."
    )
    group.add_argument("--num-samples", type=positive, default=50_000, help="Draw exactly so many samples.")
    group.add_argument("--seed", type=not_negative, default=0, help="Sample i depends on (seed, i) alone.")
    group.add_argument("--label-policy", choices=LABEL_POLICIES, default="balanced", help="Choose labels in this way.")
    group.add_argument(
        "--class-labels", type=not_negative, nargs="+", metavar="LABEL", help="Take these labels in turn instead."
    )
    group.add_argument("--weights", choices=("ema", "raw"), default="ema", help="Use these weights of the checkpoint.")
    group.add_argument(
        "--vae", type=name, help="Decode by ema, mse, a folder or hub id instead of the model's own autoencoder."
    )
    group.add_argument(
        "--vae-precision",
        choices=("auto", *COMPUTED),
        default="auto",
        help="Use this number format for the decoder; auto is bf16 on GPUs and fp32 on CPUs.",
    )
    group.add_argument("--save-latents", action="store_true", help="Keep the samples before decoding, as float32.")
    group = parser.add_argument_group("run")
    group.add_argument(
        "--per-proc-batch-size", type=positive, default=64, help="Draw so many samples of a rank at once."
    )
    add_precision_option(group)
    add_compile_option(group)
    group.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Record the sampler once and replay it, faster for small batches on GPUs; does nothing elsewhere.",
    )
    add_dry_run_option(group)
    add_device_option(group)


class Samples(NamedTuple):
    """What was drawn for some indices."""

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
        """Write a PNG grid with a column for each class or caption, or for some of many, as far apart as can be."""
        columns = min(self.conditions.count or PREVIEW_COLUMNS, PREVIEW_COLUMNS)
        classes = [i * self.conditions.count // columns for i in range(columns)] * PREVIEW_ROWS
        save_grid(path, to_uint8(self._labelled(range(len(classes)), classes).images), columns)


def source_latents(images: torch.Tensor, vae: VAE | Pixels, model: DiT) -> torch.Tensor:
    """What source images, (B, 3, H, W) uint8 on the device, are to a model: (B, C, h, w), the encoder's mean."""
    if (vae.image_channels or model.in_channels) == 1:
        red, green, blue = images.int().unbind(1)
        images = ((299 * red + 587 * green + 114 * blue + 500) // 1000)[:, None]  # a grey image stays what it is
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
    model, config = load_teacher(path, weights=provenance["teacher_weights"], vae=provenance.get("vae"))
    found = {"teacher_hash": config["provenance"]["teacher_hash"]}
    require_same(f"--teacher {path}: the student learned from another teacher", provenance, found)
    return TeacherODE(model, conditions=conditions, **{name: provenance[name] for name in ODE_OPTIONS})


def student_previews(
    student: ARD,
    ema: Callable[[], ARD],
    vae: VAE | Pixels,
    device: torch.device,
    precision: str,
    conditions: Conditions | None = None,
) -> Sampler:
    """Draws what a student in training makes of the preview noises; ``ema()`` is the average of its weights by then."""

    def draw(noise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return inference_copy(ema(), precision).sample(noise, y)[:, -1]

    return Sampler(draw, student, vae, device, stream="preview", precision=precision, conditions=conditions)


PLACE_OPTIONS = ("out", "weights", "seed", "num_samples")  # what ``samples_path`` takes of the options


def samples_path(source: str, out: str | None, *, weights: str, seed: int, num_samples: int) -> Path:
    """The .npz to write: ``--out``, or one beside the checkpoint ``source``. ``UserError`` where it cannot be."""
    path = Path(out or f"{Path(source).with_suffix('')}-{weights}-seed{seed}-{num_samples}.npz")
    return writable_npz("--out", path)


class SamplingJob:
    """A sampler's command line, checked: ``plan`` is what --dry-run shows, ``start`` opens what the loop needs."""

    def __init__(
        self,
        model: DiT,
        config: dict,
        source: str,
        context: DistributedContext,
        *,
        out: str | None = None,
        num_samples: int,
        seed: int = 0,
        label_policy: str = "balanced",
        class_labels: Sequence[int] | None = None,
        weights: str = "ema",
        vae: str | None = None,
        vae_precision: str = "auto",
        save_latents: bool = False,
        per_proc_batch_size: int = 64,
        precision: str = "fp32",
        compile: bool = False,
        cuda_graph: bool = False,
        conditions: Conditions | None = None,
    ):
        """``config`` is that of the checkpoint ``source``. ``UserError`` names an option that does not suit."""
        conditions = conditions or Classes(model.num_classes)
        if class_labels and not all(0 <= label < max(conditions.count, 1) for label in class_labels):
            raise UserError(f"--class-labels {class_labels}: this model has labels 0..{conditions.count - 1}")
        if vae and config["vae"] is None and vae != "none":
            raise UserError(f"--vae {vae}: this model works on pixels, leave the option out")
        if vae == "none" and config["vae"] is not None:
            raise UserError(f"--vae none: this model works on latents of {config['vae']}, leave the option out")
        self.out = samples_path(source, out, weights=weights, seed=seed, num_samples=num_samples)
        self.model, self.context, self.num_samples, self.save_latents = model, context, num_samples, save_latents
        self.compile, self.cuda_graph = compile, cuda_graph
        self.vae, self.own_vae = vae, (config["vae"], config["provenance"].get("vae_hash"))
        self.vae_precision = decoder_precision(vae_precision, context.device)
        self.about_vae = outline_vae(vae or config["vae"])
        self.drawing: dict[str, Any] = {
            "seed": seed,
            "label_policy": label_policy,
            "class_labels": class_labels,
            "precision": precision,
            "conditions": conditions,
        }
        self.drawing["fill_up_to"] = per_proc_batch_size if compile or cuda_graph else 0
        self.provenance = config["provenance"] | {
            "sample_seed": seed,
            "sample_labels": class_labels or label_policy,
            "sample_precision": precision,
            "weights": weights,
            "decoder": resolve_name(vae or config["vae"]),
            "decoder_precision": self.vae_precision,
        }
        self.provenance |= {f"sample_{name}": value for name, value in conditions.about.items()}
        self.plan = self.provenance | {"out": str(self.out), "count": num_samples}
        SampleWriter(self.out, num_samples, self.provenance, context, save_latents)  # refuses what is there of others

    def start(self, draw: Draw, sources: Sources | None = None) -> tuple[Sampler, SampleWriter]:
        """What draws samples by index with ``draw``, and what writes them; the model is on its device then."""
        device = self.context.device
        vae = load_same_vae(*self.own_vae, device, self.vae, self.vae_precision, self.compile)
        cast_weights(self.model.to(device), self.drawing["precision"])
        if self.compile:
            compile_blocks(self.model)
        writer = SampleWriter(self.out, self.num_samples, self.provenance, self.context, self.save_latents)
        if self.cuda_graph:
            draw = CUDAGraph(draw, device)
        return Sampler(draw, self.model, vae, device, **self.drawing, sources=sources), writer
