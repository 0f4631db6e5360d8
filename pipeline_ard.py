"""A student as a pipeline of diffusers: a folder or hub id in, images out.

    python pipeline_ard.py results/demo/ard-x0/checkpoints/0000600.pt --out digits-ard

    from diffusers import DiffusionPipeline                  # wherever diffusers is, without this repository
    pipe = DiffusionPipeline.from_pretrained("digits-ard", trust_remote_code=True)
    images = pipe(class_labels=[3, 7], generator=torch.Generator().manual_seed(0)).images

A student that reads text takes prompts, ``pipe("a six beside an eight")``, for which it loads the encoder of the
captions that it was trained on, by name, or their ``prompt_embeds``.

``pipe.push_to_hub("me/digits-ard")`` uploads the folder that ``save_pretrained`` writes.

The folder holds model_index.json, ``transformer`` (config.json and safetensors), ``vae`` for models on latents, a model
card, and the code that it needs (stores/portable.py). There is no pickle. ``ARDPipeline.from_pretrained`` of this file
loads the same folder and runs none of the code in it.
"""

import argparse
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from PIL import Image

from models_pixart import model_name, student_type
from runtime import cli
from runtime.cli import UserError
from runtime.precision import DTYPES
from runtime.randomness import noise
from runtime.text import WORDS, caption_encoder, encode
from runtime.vae import decode_latents
from stores.images import to_uint8

MODULE = "pipeline_ard"  # of the file with the classes, which model_index.json names
STRICT = {"use_safetensors": True, "low_cpu_mem_usage": False}  # no pickle, and no warning about a package of hints


CARD = """---
library_name: diffusers
pipeline_tag: {task}
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

It needs PyTorch and diffusers{needs}.
Its classes are in `pipeline_ard.py` beside this card, which you may want to read before you trust it:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER OR HUB ID", trust_remote_code=True)
images = pipe({call}, generator=torch.Generator().manual_seed(0)).images
images[0].save("image.png")
```

`latents=pipe.noise(seed, [0, 1])` gives the noise of that repository's `sample_ARD.py` instead. {note} The method: [arXiv:2504.11295](https://arxiv.org/abs/2504.11295).

## Where it comes from

| | |
|---|---|
{table}

All that is recorded:

```json
{provenance}
```
"""
CODE: str | None = None  # in a saved folder, the text of this very file


class ARDTransformer(ModelMixin, ConfigMixin):
    """``models_ard.ARD`` as a component of diffusers; its config holds ARD's own."""

    __module__ = MODULE

    @register_to_config
    def __init__(self, shape: dict):
        """``shape``: ``ARD.config``."""
        super().__init__()
        self.student = student_type(shape)(**shape)

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
    """Images of given classes, or of prompts, in the student's S steps.

    ``labels`` has the class of each name, as in diffusers' DiTPipeline. Unconditional students take ``batch_size``.
    """

    __module__ = MODULE
    _optional_components = ["vae"]  # diffusers' name for this; students on pixels have none

    def __init__(
        self,
        transformer: ModelMixin,  # an ARDTransformer, of this module or of the copy beside the weights
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
        self.encoder: Any = None  # of prompts, loaded when the first comes

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        vae: str | None = None,
        labels: str | Path | None = None,
        encoder: str | None = None,
    ) -> "ARDPipeline":
        """The pipeline of a checkpoint of train_ARD.py or train_ARD_gan.py.

        ``vae``: ema, mse, a folder or a hub id in place of the autoencoder that the checkpoint names. ``labels``: a
        file of the classes' names, where the checkpoint knows none; see ``read_labels``. ``encoder``: where others find
        the encoder of its captions, a hub id rather than a folder of yours.
        """
        ours = ("stores.checkpoints", "stores.pipelines", "runtime.vae")
        try:  # a saved pipeline is without the repository, whose import statements diffusers would take for packages
            checkpoints, pipelines, vaes = map(importlib.import_module, ours)
        except ImportError:
            raise UserError(
                "from_checkpoint: checkpoints are read by the repository; use from_pretrained here"
            ) from None

        student, config = checkpoints.load_student(path, "CHECKPOINT")
        if vae and config["vae"] is None:
            raise UserError(f"--vae {vae}: this model works on pixels, leave the option out")
        name = vaes.resolve_name(vae or config["vae"])
        transformer = ARDTransformer(shape=student.config)
        transformer.student.load_state_dict(student.state_dict())
        provenance = config["provenance"]
        if encoder and not provenance.get("captions"):
            raise UserError(f"--encoder {encoder}: this student was trained on no captions, leave the option out")
        if encoder:
            provenance["captions"] = provenance["captions"] | {"encoder": encoder}
        names = provenance.get("class_names") or [str(i) for i in range(student.num_classes)]
        if labels:
            names = pipelines.read_labels(labels, student.num_classes)
        decoder = vaes.load_autoencoder(name) if name else None
        return cls(
            transformer.eval(), decoder, {str(i): name for i, name in enumerate(names)}, provenance | {"vae": name}
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> "ARDPipeline":
        """As diffusers' ``from_pretrained``: a folder or hub id, ``dtype``, ...; safetensors only.

        Runs no code of the folder's, so it asks for no trust.
        """
        folder = Path(path)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
        index = json.loads((folder / "model_index.json").read_text())
        parts = {"transformer": ARDTransformer.from_pretrained(folder / "transformer", **options)}
        if (folder / "vae").is_dir():
            parts["vae"] = AutoencoderKL.from_pretrained(folder / "vae", **options | STRICT)
        return cls(**parts, **{name: index.get(name) for name in ("id2label", "provenance")})

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As diffusers' ``save_pretrained``, with a model card and the code to load it; safetensors only."""
        super().save_pretrained(str(save_directory), **options | {"safe_serialization": True})
        self._finish(Path(save_directory))

    def _upload_folder(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        """What ``push_to_hub`` ends in; diffusers has put a card without content there before."""
        self._finish(Path(working_dir))
        return super()._upload_folder(working_dir, *args, **kwargs)

    def _finish(self, folder: Path) -> None:
        """Add the card and the code, and name the latter in model_index.json, where diffusers looks for it."""
        code = CODE or importlib.import_module("stores.pipelines").portable_code()
        (folder / "README.md").write_text(self.model_card())
        for place in (folder, folder / "transformer"):  # diffusers wants it beside each of its classes
            (place / f"{MODULE}.py").write_text(code)
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = [MODULE, type(self).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        os.umask(umask := os.umask(0))  # the only way to read it
        for file in folder.rglob("*"):
            if file.is_file():  # safetensors makes its files for their owner alone
                file.chmod(0o666 & ~umask)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The classes of some names. ``ValueError`` for one that is not in ``labels``."""
        wanted = [label] if isinstance(label, str) else list(label)
        if unknown := [name for name in wanted if name not in self.labels]:
            raise ValueError(f"{', '.join(unknown)}: no such label, choose among {', '.join(self.labels)}")
        return [self.labels[name] for name in wanted]

    def _classes(self, class_labels: Sequence[int | str]) -> list[int]:
        """The numbers of classes given by number or name."""
        return [self.get_label_ids(label)[0] if isinstance(label, str) else int(label) for label in class_labels]

    def noise(self, seed: int, indices: Sequence[int]) -> torch.Tensor:
        """sample_ARD.py's noise for the samples of these indices, (B, C, H, W): for ``latents``."""
        return noise(seed, "sample", indices, self.transformer.student.latent_shape)

    def load_text_encoder(self, name: str | None = None, precision: str = "bf16") -> None:
        """Load the encoder of the captions that the student was trained on: from where they say, or from ``name``.

        ``name``: a folder or hub id. ``ValueError`` where it is not to be had, or another one.
        """
        try:
            about = self.config.provenance.get("captions")
            self.encoder = caption_encoder(about, self._execution_device, name, precision)
        except UserError as error:
            raise ValueError(f"{error}; or give prompt_embeds".replace("--encoder", "text encoder", 1)) from None

    def _text(self, prompt: Any, prompt_embeds: torch.Tensor | None) -> torch.Tensor:
        """The tokens of prompts, (B, L, C)."""
        channels = self.transformer.student.config["caption_channels"]
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give prompt, or else prompt_embeds, to a student that reads text")
        if prompt_embeds is not None:
            if prompt_embeds.shape[2:] != (channels,):
                raise ValueError(f"prompt_embeds of shape {tuple(prompt_embeds.shape)}: must be (B, L, {channels})")
            return prompt_embeds
        if self.encoder is None:
            self.load_text_encoder()
        try:
            return encode(self.encoder, [prompt] if isinstance(prompt, str) else [str(text) for text in prompt])
        except UserError as error:
            raise ValueError(str(error).replace("--encoder", "text encoder", 1)) from None

    def _labels(self, class_labels: Any, batch_size: int | None) -> torch.Tensor:
        """The numbers of classes, (B,); zeros for an unconditional student."""
        count = self.transformer.student.num_classes
        if bool(count) != (class_labels is not None) or (class_labels is not None and batch_size):
            raise ValueError("give class_labels to a student with classes, batch_size to an unconditional one")
        if isinstance(class_labels, int | str):
            class_labels = [class_labels]
        chosen = self._classes(class_labels) if class_labels is not None else [0] * (batch_size or 1)
        if not all(0 <= label < max(count, 1) for label in chosen):
            raise ValueError(f"class_labels {chosen}: this student has the labels 0..{count - 1}")
        return torch.tensor(chosen)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        given: Mapping[int, torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], Any] | None = None,
        num_inference_steps: int | None = None,
        prompt: Sequence[str] | str | None = None,
        prompt_embeds: torch.Tensor | None = None,
    ) -> Any:
        """Images of these classes, numbers or names, or ``batch_size`` (1) images of an unconditional student.

        A student that reads text takes a ``prompt`` or several, also in the first place, or their ``prompt_embeds``,
        tokens (B, L, C) of the encoder that its captions came from, where rows of zeros are padding.
        ``latents``: noise (B, C, H, W), drawn with ``generator`` otherwise. ``given``: as ``ARD.sample``'s.
        ``output_type``: "pil"; "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1]; "latent", the samples before decoding.
        ``callback_on_step_end(pipe, step, time, {"latents": prediction})`` is called after each step.
        ``num_inference_steps``, an argument of other pipelines, can only be the student's own number.
        """
        student, device = self.transformer.student, self._execution_device
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is none of pil, np, pt, latent")
        if num_inference_steps not in (None, student.steps):
            raise ValueError(
                f"num_inference_steps {num_inference_steps}: this student has {student.steps} steps, each trained for "
                "its place; leave the argument out"
            )
        if "caption_channels" in student.config and not batch_size:
            y = self._text(class_labels if prompt is None else prompt, prompt_embeds)
        elif prompt is not None or prompt_embeds is not None or "caption_channels" in student.config:
            raise ValueError("give prompt or prompt_embeds to a student that reads text, and nothing else")
        else:
            y = self._labels(class_labels, batch_size)
        shape = (len(y), *student.latent_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: this many need {shape}")
        sample = latents.to(device, self.transformer.dtype)
        y = y.to(device)
        with self.progress_bar(total=student.steps) as progress:
            for step, prediction in enumerate(self.transformer(sample, y, given)):
                sample = prediction
                progress.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, student.times[step], {"latents": sample})
        images = sample.float() if output_type == "latent" else self._decode(sample.float(), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        if self.vae is not None:
            latents = decode_latents(self.vae.to(memory_format=torch.channels_last), latents)
        images = latents.cpu()
        if output_type == "pil":  # rounded as sample_ARD.py does
            arrays = to_uint8(images).permute(0, 2, 3, 1).numpy()
            return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()

    def model_card(self) -> str:
        """The README.md of a saved pipeline: YAML front matter, how to load it, where it comes from."""
        student, known = self.transformer.student.config, self.config.provenance
        training, captions = known.get("training", {}), known.get("captions")
        rows = {
            "architecture": f"{model_name(student)}, inputs {self.transformer.student.latent_shape}",
            "steps S": student["steps"],
            "mask": student["mask"],
            "layers that see history N": f"{student['history_layers']} of {student['depth']}",
            "classes": student.get("num_classes") or ("none, it reads text" if captions else "none, unconditional"),
            "text encoder": captions and f"`{captions['encoder']}`, {captions['max_tokens']} tokens at most",
            "target": known.get("target"),
            "grid": known.get("grid") and f"{known['grid']}, after teacher steps {known['solver_indices']}",
            "teacher": known.get("teacher") and f"`{Path(known['teacher']).name}`, weights {known['teacher_hash']}",
            "process": known.get("process"),
            "teacher's ODE": known.get("solver")
            and f"{known['solver']}, {known['solver_steps']} steps, guidance {known['cfg_scale']}",
            "training": ", ".join(f"{key} {value}" for key, value in training.items()),
            "training steps": known.get("step"),
            "autoencoder": known.get("vae") or "none, the student works on pixels",
            "weights": known.get("weights_hash"),
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value not in (None, ""))
        classes = student.get("num_classes")
        call, task = (
            ("class_labels=[0, 1]", "class-to-image") if classes else ("batch_size=2", "unconditional-image-generation")
        )
        note, needs = "`pipe.labels` has the classes by name.", ""
        if "caption_channels" in student:
            call, task = '["A PROMPT", "ANOTHER"]', "text-to-image"
            note = "`pipe.load_text_encoder(FOLDER)` takes the text encoder from elsewhere."
            theirs = captions and captions["encoder"] != WORDS
            needs = ", and for its text encoder transformers and sentencepiece" if theirs else ""
        about = {"task": task, "call": call, "note": note, "needs": needs, "steps": student["steps"], "table": table}
        return CARD.format(**about, provenance=json.dumps(known, indent=2))


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Write a student as a folder that diffusers' pipelines are loaded from.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="Checkpoint of train_ARD.py or train_ARD_gan.py.")
    parser.add_argument("--out", required=True, help="Folder to write, with a model card.")
    parser.add_argument("--vae", help="Put ema, mse, a folder or a hub id in place of the model's own autoencoder.")
    parser.add_argument("--labels", help="Names of the classes: a line for each, or a DiTPipeline's model_index.json.")
    parser.add_argument(
        "--encoder", help="Name this as the encoder of a text student's captions, a hub id or a folder."
    )
    parser.add_argument(
        "--precision", choices=DTYPES, default="fp32", help="Number format of the weights in the folder."
    )
    return parser


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out}: it exists already; give a new folder")
    pipe = ARDPipeline.from_checkpoint(args.checkpoint, args.vae, args.labels, args.encoder)
    pipe.to(DTYPES[args.precision])
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    partial.rename(out)
    print(f"{out}: {sum(path.stat().st_size for path in out.rglob('*')) / 1e6:.1f} MB, with the card README.md")


if __name__ == "__main__":
    cli.main(build_parser(), run)
