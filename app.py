"""A page to try a student in the browser: teacher and student from the same noise, and its own predictions on the way.

    python app.py                                     # the student of `make demo`
    python app.py --ckpt-path results/000-DiT-XL-2/checkpoints/0300000.pt --teacher DiT-XL-2-256x256.pt

The image of class c is sample c of sample.py and sample_ARD.py with the same seed. Needs requirements-extra.txt.
"""

import argparse
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

from diffusion.teacher_ode import TeacherODE
from models_ard import ARD
from runtime import cli, distributed
from runtime.cli import UserError
from runtime.precision import autocast
from runtime.randomness import noise
from runtime.vae import VAE, Pixels, load_vae
from sampler import learned_ode, source_latents
from stores import checkpoints
from stores.images import to_uint8
from stores.pictures import center_crop

DEMO = Path("results/demo/ard-x0/checkpoints")
CSS = """
.gradio-container {max-width: 1100px !important; margin-inline: auto !important}
.picture {border: none !important; min-height: 40px}
.picture img {object-fit: contain; image-rendering: pixelated}
.picture .icon-button-wrapper {display: none}
"""


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Try a student in the browser, beside its teacher.")
    parser.add_argument(
        "--ckpt-path",
        "--ckpt_path",
        help=f"Checkpoint of a student, or a pipeline's folder; the newest in {DEMO} if absent.",
    )
    parser.add_argument("--teacher", help="Find its teacher here instead of where the checkpoint says.")
    parser.add_argument(
        "--vae", help="Decode by ema, mse, a folder or a hub id instead of the model's own autoencoder."
    )
    parser.add_argument("--port", type=cli.positive, default=7860, help="Serve the page at this port of this machine.")
    parser.add_argument("--share", action="store_true", help="Open a public address as well, through gradio's servers.")
    distributed.add_device_option(parser)
    return parser


def picture(images: torch.Tensor) -> Image.Image:
    """Images (B, 1 or 3, H, W) in [-1, 1] in rows of five at most; small ones have large pixels."""
    enlarged = F.interpolate(to_uint8(images).float(), scale_factor=max(1, 160 // images.shape[-1]))
    grid = make_grid(enlarged, nrow=min(5, len(images)), padding=8, pad_value=255)
    return Image.fromarray(grid.byte().permute(1, 2, 0).cpu().numpy())


class Comparison:
    """A student and its teacher on one device, ready to draw."""

    def __init__(self, student: ARD, ode: TeacherODE, vae: VAE | Pixels, names: list[str], device: torch.device):
        """``names`` of the classes; an unconditional student has none."""
        self.student, self.ode, self.vae, self.names, self.device = student, ode, vae, names, device
        student.to(device)
        ode.teacher.to(device)
        for draw in (ode.sample, student.sample):  # the first call of each takes longer
            self._timed(draw, *self.inputs([0], 0))

    def inputs(self, classes: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise (B, C, H, W) and labels (B,); an unconditional student takes numbers of samples for classes."""
        z = noise(seed, "sample", classes, self.student.latent_shape)
        return z.to(self.device), torch.tensor(classes if self.names else [0] * len(classes), device=self.device)

    @torch.no_grad()
    def _timed(self, draw: Callable[..., torch.Tensor], *inputs: Any) -> tuple[torch.Tensor, float]:
        started = time.perf_counter()
        with autocast("fp32", self.device):
            latents = draw(*inputs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return latents, time.perf_counter() - started

    def decode(self, latents: torch.Tensor) -> Image.Image:
        """A picture of latents (B, C, h, w)."""
        return picture(self.vae.decode(latents.float()))

    def draw(self, classes: list[int], seed: int) -> tuple[Image.Image, float, list[Image.Image], float]:
        """The teacher's picture, its seconds, the student's after each step, and its seconds."""
        teachers, teacher_time = self._timed(self.ode.sample, *self.inputs(classes, seed))
        predictions, student_time = self._timed(self.student.sample, *self.inputs(classes, seed))
        return self.decode(teachers), teacher_time, [self.decode(x) for x in predictions.unbind(1)], student_time

    def edit(self, image: Image.Image, classes: list[int], seed: int, step: int) -> tuple[Image.Image, Image.Image]:
        """The source as the student sees it, and its image from it after ``step`` for each class."""
        cropped = center_crop(image.convert("RGB"), self.student.input_size * self.vae.factor)
        with torch.no_grad():
            source = source_latents(pil_to_tensor(cropped)[None].to(self.device), self.vae, self.student)
        given = {step - 1: source.expand(len(classes), -1, -1, -1)}
        predictions, _ = self._timed(self.student.sample, *self.inputs(classes, seed), given)
        return self.decode(source), self.decode(predictions[:, -1])


def build_page(gr: ModuleType, models: Comparison, editable: bool) -> Any:
    """The page, a ``gradio.Blocks``. ``editable``: with a tab for source images."""
    steps, solver_steps = models.student.steps, models.ode.provenance["solver_steps"]
    teacher_says, student_says = f"Teacher, {solver_steps} steps", f"Student, {steps} steps"
    names = models.names or [str(i) for i in range(10)]

    def panel(caption: str) -> tuple[Any, Any]:
        with gr.Column(min_width=120):
            options = dict(show_label=False, format="png", interactive=False, buttons=[], elem_classes="picture")
            return gr.Markdown(caption), gr.Image(**options)

    def compare(chosen: list[int], seed: float | None) -> list:  # None where the field is empty
        if not chosen:
            raise gr.Error("Choose at least one.", print_exception=False)
        teacher, teacher_time, on_the_way, student_time = models.draw(sorted(chosen), int(seed or 0))
        faster = f"{len(chosen)} at once, {teacher_time / student_time:.0f} times faster"
        captions = [f"{teacher_says}: **{teacher_time:.3f} s**", f"{student_says}: **{student_time:.3f} s** ({faster})"]
        return [*captions, teacher, on_the_way[-1], *on_the_way]

    def edit(source: Image.Image | None, chosen: list[int], seed: float | None, step: int) -> tuple:
        if source is None or not chosen:
            raise gr.Error("Upload an image and choose at least one class.", print_exception=False)
        return models.edit(source, sorted(chosen), int(seed or 0), int(step))

    with gr.Blocks(title="ARD", analytics_enabled=False) as page:
        gr.Markdown(f"## {steps} steps instead of {solver_steps}\nA teacher and its ARD student, from the same noise.")
        with gr.Row():
            choices = dict(choices=list(zip(names, range(len(names)))), value=list(range(min(10, len(names)))))
            choices |= dict(label="Classes" if models.names else "Samples", scale=1)
            few = len(names) <= 20
            classes = gr.CheckboxGroup(**choices) if few else gr.Dropdown(**choices, multiselect=True)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, scale=0, min_width=120)
        with gr.Tab("Compare"):
            button = gr.Button("Draw", variant="primary")
            with gr.Row():
                sides = [panel(teacher_says), panel(student_says)]
            gr.Markdown("#### The student's predictions on the way")
            with gr.Row():
                points = [panel(f"after step {k + 1}" + " (the sample)" * (k == steps - 1)) for k in range(steps)]
            captions, pictures = zip(*sides, strict=True)
            button.click(compare, [classes, seed], [*captions, *pictures, *(image for _, image in points)])
        if editable:
            with gr.Tab("Edit an image"):
                gr.Markdown("The image takes the place of one of the student's predictions, which goes on from there.")
                with gr.Row():
                    source = gr.Image(type="pil", label="Source", sources=["upload", "clipboard"], elem_id="source")
                    with gr.Column():
                        step = gr.Slider(1, steps - 1, value=1, step=1, label="In place of the prediction of step")
                        edit_button = gr.Button("Edit", variant="primary")
                        results = [panel("The image as the student sees it"), panel("The student's images")]
                edit_button.click(edit, [source, classes, seed, step], [image for _, image in results])
    return page


def require_free(port: int) -> None:
    """``UserError`` where this machine cannot serve at that port."""
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: choose another, this one cannot be served at ({error})") from None


def run(args: argparse.Namespace) -> None:
    require_free(args.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr  # optional, and seconds to import
    except ImportError:
        raise UserError("app.py needs gradio: pip install -r requirements-extra.txt -c constraints.txt") from None
    path = args.ckpt_path or max(DEMO.glob("*.pt"), default=None)
    if path is None:
        raise UserError(f"--ckpt-path: there is no student in {DEMO}; run `make demo`, or give a checkpoint")
    student, config = checkpoints.load_student(path)
    if "caption_channels" in student.config:
        raise UserError(f"--ckpt-path {path}: reads text, which the page does not; sample it by sample_ARD.py")
    provenance = config["provenance"]
    ode = learned_ode(provenance, path, args.teacher)
    device = distributed.setup(args.device).device
    names = provenance.get("class_names") or [str(i) for i in range(student.num_classes)]
    models = Comparison(student, ode, load_vae(args.vae or config["vae"], device), names, device)
    page = build_page(gr, models, editable=student.steps > 1 and provenance["target"] == "x0")
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none to be downloaded
    options = dict(server_port=args.port, share=args.share, theme=theme, css=CSS, footer_links=[], ssr_mode=False)
    page.launch(quiet=True, prevent_thread_lock=True, **options)
    print(f"http://127.0.0.1:{args.port}" + (f" and {page.share_url}" if args.share else ""), flush=True)
    page.block_thread()


if __name__ == "__main__":
    cli.main(build_parser(), run)
