"""A page to try a student in the browser: its teacher's images beside its own, and its points from noise to image.

    python app.py                                     # assets/emoji_ard.pt where it is, else the student of `make demo`
    python app.py --ckpt-path STUDENT --beside OTHER  # any student, and what another makes of the same noise
    python app.py --ckpt-path results/000-DiT-XL-2/checkpoints/0300000.pt --teacher DiT-XL-2-256x256.pt

The image of class c is sample c of sample.py and sample_ARD.py with the same seed, that of the i-th caption sample i.
Needs requirements-extra.txt.
"""

import argparse
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from diffusion.teacher_ode import TeacherODE, pick_points
from models_ard import ARD, method_name
from runtime import cli, distributed
from runtime.cli import UserError
from runtime.precision import autocast
from runtime.provenance import require_same
from runtime.randomness import noise
from runtime.text import WORDS, Prompts, caption_encoder
from runtime.vae import VAE, Pixels, load_vae
from sampler import learned_ode, source_latents
from stores import checkpoints
from stores.images import to_uint8
from stores.pictures import center_crop
from stores.samples import draw_grid

# The students that are looked for without --ckpt-path, each with the one beside it; the newest file of each.
DEFAULTS = (
    ("assets/emoji_ard.pt", "assets/emoji_step.pt"),
    ("results/demo/ard-x0/checkpoints/*.pt", "results/demo/step-x0/checkpoints/*.pt"),
)
SEES = {
    "M1": "the point to its left only",
    "M2": "the point to its left and the one before",
    "M3": "the point to its left and the noise",
    "M4": "all points to its left",
}
EXAMPLES = ("a six beside an eight", "a three above a seven")  # captions in the words of the text demo
CSS = """
.gradio-container {max-width: 1100px !important; margin-inline: auto !important}
.picture {border: none !important; min-height: 40px}
.picture img {object-fit: contain}
.picture .icon-button-wrapper {display: none}
.points img {object-position: left}
"""
Wanted = list[int] | list[str]  # numbers of classes, or of samples where there are none, or captions


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Try a student in the browser, beside its teacher and another student.")
    parser.add_argument(
        "--ckpt-path",
        "--ckpt_path",
        type=cli.name,
        help="Checkpoint of a student, or a pipeline's folder or hub id; without it, assets/emoji_ard.pt where it "
        "is, else the newest of the demo.",
    )
    parser.add_argument(
        "--beside",
        type=cli.name,
        metavar="STUDENT",
        help="Another student of the same teacher, to be compared point by point; without --ckpt-path, that by step "
        "distillation.",
    )
    parser.add_argument("--teacher", help="Find its teacher here instead of where the checkpoint says.")
    parser.add_argument(
        "--encoder", type=cli.name, help="Find the encoder of captions here instead, a folder or hub id."
    )
    parser.add_argument(
        "--vae", help="Decode by ema, mse, a folder or a hub id instead of the model's own autoencoder."
    )
    parser.add_argument("--port", type=cli.positive, default=7860, help="Serve the page at this port of this machine.")
    parser.add_argument("--share", action="store_true", help="Open a public address as well, through gradio's servers.")
    distributed.add_device_option(parser)
    return parser


def default_students() -> tuple[Path | None, Path | None]:
    """The first of ``DEFAULTS`` that is there, and the one beside it if that is there too."""
    for student, beside in DEFAULTS:
        if found := max(Path().glob(student), default=None):
            return found, max(Path().glob(beside), default=None)
    return None, None


def picture(images: torch.Tensor, titles: Sequence[str] = (), columns: int = 5) -> Image.Image:
    """Images (B, 1 or 3, H, W) in [-1, 1] in rows of ``columns`` at most; small ones have large pixels."""
    return draw_grid(to_uint8(images).cpu(), min(columns, len(images)), 160, 8, titles)


class Comparison:
    """A student, its teacher and maybe another student of it on one device, ready to draw."""

    def __init__(
        self,
        students: dict[str, ARD],
        ode: TeacherODE,
        vae: VAE | Pixels,
        device: torch.device,
        *,
        points: tuple[list[int], str] = ([], "x0"),
        names: Sequence[str] = (),
    ):
        """``students`` by their names, the first is the one to try. ``points``: after which of the teacher's steps its
        own lie, and which target they are. ``names`` of the classes; an unconditional student has none, nor has one
        that reads text, whose ``ode`` has ``Prompts`` for conditions.
        """
        self.students, self.student, self.ode, self.vae = students, next(iter(students.values())), ode, vae
        self.device, self.points, self.names = device, points, list(names)
        self.prompts = ode.conditions if isinstance(ode.conditions, Prompts) else None
        for model in (*students.values(), ode.teacher):
            model.to(device)
        first: Wanted = [""] if self.prompts else [0]
        for draw in (ode.sample, self.student.sample):  # the first call of each takes longer
            self._timed(draw, *self.inputs(first, 0))

    def inputs(self, wanted: Wanted, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise (B, C, H, W), and labels (B,) or text (B, L, C)."""
        indices, y = list(range(len(wanted))), torch.zeros(len(wanted), dtype=torch.int64)
        if self.prompts:
            y = self.prompts.encode([str(caption) for caption in wanted])
        else:
            indices = [int(label) for label in wanted]
            y = torch.tensor(indices) if self.names else y
        z = noise(seed, "sample", indices, self.student.latent_shape)
        return z.to(self.device), y.to(self.device)

    def titles(self, wanted: Wanted) -> list[str]:
        """What stands above the images."""
        return [item if isinstance(item, str) else self.names[item] if self.names else "" for item in wanted]

    @torch.no_grad()
    def _timed(self, draw: Callable[..., torch.Tensor], *inputs: Any) -> tuple[torch.Tensor, float]:
        started = time.perf_counter()
        with autocast("fp32", self.device):
            latents = draw(*inputs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return latents, time.perf_counter() - started

    def decode(self, latents: torch.Tensor, titles: Sequence[str] = (), columns: int = 5) -> Image.Image:
        """A picture of latents (B, C, h, w)."""
        return picture(self.vae.decode(latents.float()), titles, columns)

    def draw(self, wanted: Wanted, seed: int) -> tuple[Image.Image, float, list[Image.Image], float]:
        """The teacher's picture, its seconds, the student's after each step, and its seconds."""
        teachers, teacher_time = self._timed(self.ode.sample, *self.inputs(wanted, seed))
        predictions, student_time = self._timed(self.student.sample, *self.inputs(wanted, seed))
        titles, last = self.titles(wanted), self.student.steps - 1
        pictures = [self.decode(x, titles if k == last else ()) for k, x in enumerate(predictions.unbind(1))]
        return self.decode(teachers, titles), teacher_time, pictures, student_time

    def on_the_way(self, wanted: Wanted, seed: int) -> list[Image.Image]:
        """From one noise to the image, a picture of each model: the teacher, at the student's points, and students."""
        z, y = self.inputs(wanted, seed)
        indices, target = self.points
        rows = [self._timed(lambda z, y: pick_points(*self.ode(z, y), indices)[target], z, y)[0]]
        rows += [self._timed(student.sample, z, y)[0] for student in self.students.values()]
        pictures = []
        for points in rows:
            titles = ["noise", *(f"step {k + 1}" for k in range(points.shape[1]))]
            pictures.append(self.decode(torch.cat([z, points[0]]), titles, len(titles)))
        return pictures

    def edit(self, image: Image.Image, wanted: Wanted, seed: int, step: int) -> tuple[Image.Image, Image.Image]:
        """The source as the student sees it, and its image from it after ``step`` for each class or caption."""
        cropped = center_crop(image.convert("RGB"), self.student.input_size * self.vae.factor)
        with torch.no_grad():
            source = source_latents(pil_to_tensor(cropped)[None].to(self.device), self.vae, self.student)
        given = {step - 1: source.expand(len(wanted), -1, -1, -1)}
        predictions, _ = self._timed(self.student.sample, *self.inputs(wanted, seed), given)
        return self.decode(source), self.decode(predictions[:, -1], self.titles(wanted))


class Page:
    """The page, a ``gradio.Blocks``, piece by piece."""

    def __init__(self, gr: ModuleType, models: Comparison):
        self.gr, self.models = gr, models
        self.names = models.names or [str(i) for i in range(10)]
        self.steps, self.solver_steps = models.student.steps, models.ode.provenance["solver_steps"]

    def build(self, editable: bool) -> Any:
        """``editable``: with a tab for source images."""
        gr = self.gr
        with gr.Blocks(title="ARD", analytics_enabled=False) as page:
            gr.Markdown(
                f"## {self.steps} steps instead of {self.solver_steps}\nA teacher and its student, from the same noise."
            )
            with gr.Row():
                self.wanted = self.choice()
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, scale=0, min_width=120)
            with gr.Tab("Compare"):
                self.compare_tab()
            with gr.Tab("Point by point"):
                self.points_tab()
            if editable:
                with gr.Tab("Edit an image"):
                    self.edit_tab()
        return page

    def choice(self) -> Any:
        """Where one says what is to be drawn: the classes, or captions."""
        gr, names = self.gr, self.names
        if prompts := self.models.prompts:
            value = "\n".join(EXAMPLES) if prompts.encoder.name == WORDS else ""
            return gr.Textbox(value, label="Captions, one a line", lines=3, placeholder="a caption", elem_id="captions")
        choices = dict(choices=list(zip(names, range(len(names)))), value=list(range(min(10, len(names)))))
        choices |= dict(label="Classes" if self.models.names else "Samples", scale=1)
        return gr.CheckboxGroup(**choices) if len(names) <= 20 else gr.Dropdown(**choices, multiselect=True)

    def read(self, chosen: Any) -> Wanted:
        """What was chosen; an error that the page shows where that is nothing."""
        wanted = [line for line in chosen.splitlines() if line.strip()] if self.models.prompts else sorted(chosen)
        if not wanted:
            raise self.gr.Error("Write a caption." if self.models.prompts else "Choose one.", print_exception=False)
        return wanted

    def shown(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        """The handler, whose ``UserError`` the page shows; its first arguments are what is wanted and the seed."""

        def handle(chosen: Any, seed: float | None, *more: Any) -> Any:  # None where the field is empty
            try:
                return handler(self.read(chosen), int(seed or 0), *more)
            except UserError as error:
                raise self.gr.Error(str(error), print_exception=False) from None

        return handle

    def panel(self, caption: str, kind: str = "picture") -> tuple[Any, Any]:
        """A caption and the place for a picture; ``kind`` has its classes in ``CSS``."""
        with self.gr.Column(min_width=120):
            options = dict(show_label=False, format="png", interactive=False, buttons=[], elem_classes=kind.split())
            return self.gr.Markdown(caption), self.gr.Image(**options)

    def compare_tab(self) -> None:
        """Teacher beside student, timed, and the student's predictions."""
        gr, steps = self.gr, self.steps
        teacher_says, student_says = f"Teacher, {self.solver_steps} steps", f"Student, {steps} steps"

        def compare(wanted: Wanted, seed: int) -> list:
            teacher, teacher_time, on_the_way, student_time = self.models.draw(wanted, seed)
            says = [
                f"{teacher_says}: **{teacher_time:.3f} s**, {len(wanted)} at once",
                f"{student_says}: **{student_time:.3f} s**, {teacher_time / student_time:.0f} times faster",
            ]
            return [*says, teacher, on_the_way[-1], *on_the_way[:-1]]

        button = gr.Button("Draw", variant="primary")
        with gr.Row():
            sides = [self.panel(teacher_says), self.panel(student_says)]
        points = []
        if steps > 1:
            gr.Markdown("#### The student's predictions on the way")
            with gr.Row():
                points = [self.panel(f"after step {k + 1}")[1] for k in range(steps - 1)]
        captions, pictures = zip(*sides, strict=True)
        button.click(self.shown(compare), [self.wanted, self.seed], [*captions, *pictures, *points])

    def points_tab(self) -> None:
        """From noise to image, point by point: teacher, student, and the student beside it."""
        gr, indices, students = self.gr, self.models.points[0], self.models.students
        what = "the image as it is predicted by then" if self.models.points[1] == "x0" else "a noisy state on the way"
        apart = " What sets the students' rows apart is what history buys." if len(students) > 1 else ""
        gr.Markdown(f"The first of what is chosen above, from one noise. A point is {what}.{apart}")
        button = gr.Button("Draw the points", variant="primary")
        after = f"after {', '.join(map(str, indices[:-1]))} and {indices[-1]}" if len(indices) > 1 else "after all"
        rows = [self.panel(f"**Teacher**, {after} of its {self.solver_steps} steps", "picture points")]
        for name, student in students.items():
            mask = student.mask if student.history_layers else "M1"
            rows.append(self.panel(f"**{name}**: a step sees {SEES[mask]}", "picture points"))

        def draw(wanted: Wanted, seed: int) -> list[Image.Image]:
            return self.models.on_the_way(wanted[:1], seed)

        button.click(self.shown(draw), [self.wanted, self.seed], [image for _, image in rows])

    def edit_tab(self) -> None:
        """A source image in place of one of the student's predictions."""
        gr = self.gr

        def edit(wanted: Wanted, seed: int, source: Image.Image | None, step: int) -> tuple[Image.Image, Image.Image]:
            if source is None:
                raise gr.Error("Upload an image.", print_exception=False)
            return self.models.edit(source, wanted, seed, int(step))

        gr.Markdown("The image takes the place of one of the student's predictions, which goes on from there.")
        with gr.Row():
            source = gr.Image(type="pil", label="Source", sources=["upload", "clipboard"], elem_id="source")
            with gr.Column():
                step = gr.Slider(1, self.steps - 1, value=1, step=1, label="In place of the prediction of step")
                button = gr.Button("Edit", variant="primary")
                results = [self.panel("The image as the student sees it"), self.panel("The student's images")]
        inputs = [self.wanted, self.seed, source, step]
        button.click(self.shown(edit), inputs, [image for _, image in results])


def require_free(port: int) -> None:
    """``UserError`` where this machine cannot serve at that port."""
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: choose another, this one cannot be served at ({error})") from None


def open_models(path: str | Path, beside: str | Path | None, args: argparse.Namespace) -> tuple[Comparison, bool]:
    """The models of the page, and whether the student takes clean images in the place of its predictions."""
    student, config = checkpoints.load_student(path)
    provenance = config["provenance"]
    device = distributed.setup(args.device).device
    reads_text, conditions = "caption_channels" in student.config, None
    if reads_text:
        conditions = Prompts(caption_encoder(provenance.get("captions"), device, args.encoder))
    elif args.encoder:
        raise UserError(f"--encoder {args.encoder}: this student has classes and reads no text, leave the option out")
    ode = learned_ode(provenance, path, args.teacher, conditions)
    students = {called(student, provenance): student}
    if beside:
        other, theirs = checkpoints.load_student(beside, "--beside")
        same = {name: provenance[name] for name in ("teacher_hash", "target")}
        require_same(f"--beside {beside}: learned from another teacher, or another target", theirs["provenance"], same)
        name = called(other, theirs["provenance"])
        students[f"{name} ({Path(beside).name})" if name in students else name] = other
    names = provenance.get("class_names") or [str(i) for i in range(student.num_classes)]
    models = Comparison(
        students,
        ode,
        load_vae(args.vae or config["vae"], device),
        device,
        points=(provenance["solver_indices"], provenance["target"]),
        names=names,
    )
    return models, student.steps > 1 and provenance["target"] == "x0"


def called(student: ARD, provenance: dict) -> str:
    """A student's name: its method, and R+D if it was fine-tuned so."""
    name = method_name(student.steps, student.mask, student.history_layers)
    tuned = provenance.get("training", {}).get("loss") == "R+D"
    return name[0].upper() + name[1:] + (", R+D" if tuned else "")


def run(args: argparse.Namespace) -> None:
    require_free(args.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr  # optional, and seconds to import
    except ImportError:
        raise UserError("app.py needs gradio: pip install -r requirements-extra.txt -c constraints.txt") from None
    path, beside = args.ckpt_path, args.beside
    if path is None:
        path, found = default_students()
        beside = beside or found
        if path is None:
            places = " nor ".join(student for student, _ in DEFAULTS)
            raise UserError(f"--ckpt-path: neither {places} is there; run `make demo`, or give a student")
        print(f"{path}" + (f" beside {beside}" if beside else "") + ", as no --ckpt-path is given", flush=True)
    models, editable = open_models(path, beside, args)
    page = Page(gr, models).build(editable)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none to be downloaded
    options = dict(server_port=args.port, share=args.share, theme=theme, css=CSS, footer_links=[], ssr_mode=False)
    page.launch(quiet=True, prevent_thread_lock=True, **options)
    print(f"http://127.0.0.1:{args.port}" + (f" and {page.share_url}" if args.share else ""), flush=True)
    page.block_thread()


if __name__ == "__main__":
    cli.main(build_parser(), run)
