"""A student as a pipeline of diffusers: a folder or hub id in, images out.

    python pipeline_ard.py results/demo/ard-x0/checkpoints/0000600.pt --out digits-ard

    from pipeline_ard import ARDPipeline                     # this repository must be on Python's path
    pipe = ARDPipeline.from_pretrained("digits-ard")         # or a hub id, or from_checkpoint("....pt")
    images = pipe(class_labels=[3, 7], generator=torch.Generator().manual_seed(0)).images

``pipe.push_to_hub("me/digits-ard")`` uploads what ``save_pretrained`` writes.

The folder holds model_index.json, ``transformer`` (config.json and safetensors), ``vae`` for models on latents, and a
model card. Importing this module is what lets diffusers find its classes; there is no pickle.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from models_ard import ARD
from models_pixart import model_name
from runtime import cli
from runtime.cli import UserError
from runtime.randomness import noise
from runtime.vae import VAE, Pixels, load_autoencoder, resolve_name
from stores.checkpoints import load_student
from stores.images import to_uint8

STRICT = {"use_safetensors": True, "low_cpu_mem_usage": False}  # no pickle, and no warning about a package of hints


class ARDTransformer(ModelMixin, ConfigMixin):
    """``models_ard.ARD`` as a component of diffusers; its config holds ARD's own."""

    __module__ = "pipeline_ard"  # what model_index.json names, also where this file runs as a command

    @register_to_config
    def __init__(self, shape: dict):
        """``shape``: ``ARD.config``."""
        super().__init__()
        self.student = ARD(**shape)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> "ARDTransformer":
        """As diffusers', but weights that do not fit exactly raise ``ValueError``; diffusers leaves them random."""
        model, found = super().from_pretrained(path, **options | STRICT, output_loading_info=True)
        wrong = {kind: found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[kind]}
        if wrong:
            raise ValueError(f"{path}: the weights do not fit the model ({wrong})")
        return model

    def forward(
        self, noise: torch.Tensor, y: torch.Tensor, given: Mapping[int, torch.Tensor] | None = None
    ) -> Iterator[torch.Tensor]:
        """The predictions of ``ARD.sample``, one by one."""
        return self.student.sample_steps(noise, y, given)

    def _apply(self, *args: Any, **kwargs: Any) -> "ARDTransformer":
        """Moves or casts all but the times of steps, which stay float32: 999 would be 1000 in bfloat16."""
        times: Any = self.student.times
        super()._apply(*args, **kwargs)
        self.student.times = times.to(self.student.pos_embed.device)
        return self


class ARDPipeline(DiffusionPipeline):
    """Images of given classes in the student's S steps.

    ``labels`` has the class of each name, as in diffusers' DiTPipeline. Unconditional students take ``batch_size``.
    """

    __module__ = "pipeline_ard"
    _optional_components = ["vae"]  # diffusers' name for this; students on pixels have none

    def __init__(
        self,
        transformer: ARDTransformer,
        vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | None = None,
        provenance: dict | None = None,
    ):
        """``id2label``: names of each class, "0": "tench, Tinca tinca". ``provenance``: that of the student's
        checkpoint, which fills the model card.
        """
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(id2label=id2label or {}, provenance=provenance or {})
        names = [(name.strip(), int(i)) for i, text in (id2label or {}).items() for name in text.split(",")]
        self.labels = dict(sorted(names))

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, vae: str | None = None, labels: str | Path | None = None
    ) -> "ARDPipeline":
        """The pipeline of a checkpoint of train_ARD.py or train_ARD_gan.py.

        ``vae``: ema, mse, a folder or a hub id in place of the autoencoder that the checkpoint names. ``labels``: a
        file of the classes' names, where the checkpoint knows none; see ``read_labels``.
        """
        student, config = load_student(path, "CHECKPOINT")
        if "caption_channels" in student.config:
            raise UserError(f"CHECKPOINT {path}: reads text, which the pipeline does not; sample it by sample_ARD.py")
        if vae and config["vae"] is None:
            raise UserError(f"--vae {vae}: this model works on pixels, leave the option out")
        name = resolve_name(vae or config["vae"])
        transformer = ARDTransformer(shape=student.config)
        transformer.student.load_state_dict(student.state_dict())
        provenance = config["provenance"]
        names = provenance.get("class_names") or [str(i) for i in range(student.num_classes)]
        if labels:
            names = read_labels(labels, student.num_classes)
        decoder = load_autoencoder(name) if name else None
        return cls(
            transformer.eval(), decoder, {str(i): name for i, name in enumerate(names)}, provenance | {"vae": name}
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> "ARDPipeline":
        """As diffusers' ``from_pretrained``: a folder or hub id, ``dtype``, ...; safetensors only."""
        return super().from_pretrained(path, **options | STRICT)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As diffusers' ``save_pretrained``, with a model card; safetensors only."""
        super().save_pretrained(str(save_directory), **options | {"safe_serialization": True})
        (Path(save_directory) / "README.md").write_text(self.model_card())

    def _upload_folder(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        """What ``push_to_hub`` ends in; diffusers has put a card without content there before."""
        (Path(working_dir) / "README.md").write_text(self.model_card())
        return super()._upload_folder(working_dir, *args, **kwargs)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The classes of some names. ``ValueError`` for one that is not in ``labels``."""
        wanted = [label] if isinstance(label, str) else list(label)
        if unknown := [name for name in wanted if name not in self.labels]:
            raise ValueError(f"{', '.join(unknown)}: no such label, choose among {', '.join(self.labels)}")
        return [self.labels[name] for name in wanted]

    def noise(self, seed: int, indices: Sequence[int]) -> torch.Tensor:
        """What sample_ARD.py gives its samples of these indices, (B, C, H, W): for ``latents``."""
        return noise(seed, "sample", indices, self.transformer.student.latent_shape)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        given: Mapping[int, torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], Any] | None = None,
    ) -> Any:
        """Images of these classes, or of an unconditional student as many as ``batch_size`` says (1).

        ``latents``: noise (B, C, H, W), drawn with ``generator`` otherwise. ``given``: as ``ARD.sample``'s.
        ``output_type``: "pil"; "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1]; "latent", the samples before decoding.
        ``callback_on_step_end(pipe, step, time, {"latents": prediction})`` is called after each step.
        """
        student, device = self.transformer.student, self._execution_device
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is none of pil, np, pt, latent")
        if bool(student.num_classes) != (class_labels is not None) or (class_labels is not None and batch_size):
            raise ValueError("give class_labels to a student with classes, batch_size to an unconditional one")
        chosen = [int(label) for label in class_labels] if class_labels is not None else [0] * (batch_size or 1)
        if not all(0 <= label < max(student.num_classes, 1) for label in chosen):
            raise ValueError(f"class_labels {chosen}: this student has the labels 0..{student.num_classes - 1}")
        shape = (len(chosen), *student.latent_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: these labels need {shape}")
        sample = latents.to(device, self.transformer.dtype)
        y = torch.tensor(chosen, device=device)
        with self.progress_bar(total=student.steps) as progress:
            for step, prediction in enumerate(self.transformer(sample, y, given)):
                sample = prediction
                progress.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, student.times[step], {"latents": sample})
        images = sample.float() if output_type == "latent" else self._decode(sample.float(), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        decoder = Pixels() if self.vae is None else VAE.of(self.vae)
        images = decoder.decode(latents).cpu()
        if output_type == "pil":  # rounded as sample_ARD.py does
            arrays = to_uint8(images).permute(0, 2, 3, 1).numpy()
            return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()

    def model_card(self) -> str:
        """The README.md of a saved pipeline: YAML front matter, how to load it, where it comes from."""
        student, known = self.transformer.student.config, self.config.provenance
        training = known.get("training", {})
        rows = {
            "architecture": f"{model_name(student)}, inputs {self.transformer.student.latent_shape}",
            "steps S": student["steps"],
            "mask": student["mask"],
            "layers that see history N": f"{student['history_layers']} of {student['depth']}",
            "classes": student["num_classes"] or "none, unconditional",
            "target": known.get("target"),
            "grid": known.get("grid") and f"{known['grid']}, after teacher steps {known['solver_indices']}",
            "teacher": known.get("teacher") and f"`{known['teacher']}`, weights {known['teacher_hash']}",
            "teacher's ODE": known.get("solver")
            and f"{known['solver']}, {known['solver_steps']} steps, guidance {known['cfg_scale']}",
            "training": ", ".join(f"{key} {value}" for key, value in training.items()),
            "training steps": known.get("step"),
            "autoencoder": known.get("vae") or "none, the student works on pixels",
            "weights": known.get("weights_hash"),
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value not in (None, ""))
        call = "class_labels=[0, 1]" if student["num_classes"] else "batch_size=2"
        return CARD.format(steps=student["steps"], table=table, call=call, provenance=json.dumps(known, indent=2))


def read_labels(path: str | Path, count: int) -> list[str]:
    """Names of ``count`` classes: a line for each, or JSON with id2label, as DiTPipeline's model_index.json has it."""
    text = cli.existing_file("--labels", path).read_text(errors="replace")
    names = [line.strip() for line in text.splitlines()]
    if str(path).endswith(".json"):
        try:
            given = json.loads(text)
            given = given.get("id2label", given)
            names = [str(given[str(i)]) for i in range(len(given))]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"--labels {path}: has no id2label with a name for each of 0, 1, ...") from None
    if len(names) != count or not all(names):
        raise UserError(
            f"--labels {path}: has {len([name for name in names if name])} names, the model {count} classes"
        )
    return names


CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- diffusers
- ARD
- distillation
- diffusion-transformer
---

# A {steps}-step student by Autoregressive Distillation of Diffusion Transformers

Draws images in {steps} steps, without guidance, by the method of
[*Autoregressive Distillation of Diffusion Transformers*](https://arxiv.org/abs/2504.11295) (CVPR 2025). A student
inherits the licence of its teacher and of its autoencoder.

## Use

The classes are in `pipeline_ard.py` of the repository that trained it, which must be on Python's path:

```python
import torch

from pipeline_ard import ARDPipeline

pipe = ARDPipeline.from_pretrained("FOLDER OR HUB ID")
images = pipe({call}, generator=torch.Generator().manual_seed(0)).images
```

`latents=pipe.noise(seed, [0, 1])` gives the noise of that repository's `sample_ARD.py` instead.

## Where it comes from

| | |
|---|---|
{table}

All that is recorded:

```json
{provenance}
```
"""


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Write a student as a folder that diffusers' pipelines are loaded from.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="Checkpoint of train_ARD.py or train_ARD_gan.py.")
    parser.add_argument("--out", required=True, help="Folder to write, with a model card.")
    parser.add_argument("--vae", help="Put ema, mse, a folder or a hub id in place of the model's own autoencoder.")
    parser.add_argument("--labels", help="Names of the classes: a line for each, or a DiTPipeline's model_index.json.")
    return parser


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out}: it is there already; give a new folder")
    pipe = ARDPipeline.from_checkpoint(args.checkpoint, args.vae, args.labels)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    partial.rename(out)
    print(f"{out}: {sum(path.stat().st_size for path in out.rglob('*')) / 1e6:.1f} MB, with the card README.md")


if __name__ == "__main__":
    cli.main(build_parser(), run)
