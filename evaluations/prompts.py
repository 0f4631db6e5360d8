"""Samples with their prompts, for those who judge how well they agree: CLIP here, CompBench and GenEval elsewhere.

    python -m evaluations.prompts compbench samples.npz --captions data/prompts --out images
    python -m evaluations.prompts geneval samples.npz --captions data/prompts --metadata evaluation_metadata.jsonl \\
        --out images
    python -m evaluations.prompts clip samples.npz --captions data/prompts --clip-weights openai

T2I-CompBench reads `PROMPT_000123.png`: the prompt stands before the first _, the last number is the order.
GenEval reads `00007/samples/0000.png` beside `00007/metadata.jsonl`, the line of its file that the prompt came from.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from runtime import cli, distributed
from runtime.checks import writable_folder
from runtime.cli import UserError
from runtime.files import atomic_write, quiet_hub, read_json, read_lines, require_replaceable, write_text
from runtime.provenance import require_same
from stores.captions import CaptionStore, add_captions_option
from stores.image_arrays import Images
from stores.samples import read_provenance

LONGEST_NAME = 200  # bytes of a prompt in a file's name; systems allow 255 in all


class Prompted:
    """A file of samples with the caption of each."""

    def __init__(self, samples: str, captions: str | None):
        """``UserError`` where the samples were not drawn from these captions."""
        self.images = Images("SAMPLES", samples)
        if not captions:
            raise UserError("--captions: give the captions that the samples were drawn from")
        self.store, labels = CaptionStore(captions), self.images.member("arr_1")
        origin = read_provenance(samples)
        about = origin.get("sample_captions") or origin.get("captions")  # the latter of an exported dump
        if about is None or labels is None:
            raise UserError(f"{self.images.what}: was not drawn from captions")
        same = {name: about[name] for name in ("text_sha256", "count")}
        require_same(f"--captions {captions}: not those of {samples}", self.store.about["captions"], same)
        self.labels: np.ndarray = labels

    def batches(self, size: int) -> Any:
        """(numbers of some samples, images (B, H, W, 3) uint8), all of them in turn."""
        for start, images in tqdm(self.images.batches(range(self.images.count), size), unit="batch", disable=None):
            yield range(start, start + len(images)), images

    def text(self, sample: int) -> str:
        """The caption of a sample."""
        return self.store.text(int(self.labels[sample]))


def empty_image_folder(out: str, pattern: str) -> Path:
    """The folder to write to. ``UserError`` where it holds anything but files of this pattern, as an earlier run's."""
    folder = writable_folder("--out", out)
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    strange = [name for name in sorted(found) if not re.fullmatch(pattern, name.removesuffix(".partial"))]
    if strange:
        raise UserError(f"--out {out}: the folder holds other files ({strange[0]}), give a new one")
    return folder


def compbench_name(prompt: str, sample: int) -> str:
    """The file of a sample as T2I-CompBench wants it; characters that a file's name cannot hold are left out."""
    kept = "".join(" " if letter in "_/\\\0" else letter for letter in prompt)
    short = " ".join(kept.split()).encode()[:LONGEST_NAME].decode(errors="ignore").rstrip(" .") or "image"
    return f"{short}_{sample:06d}.png"


def save(path: Path, image: np.ndarray) -> None:
    """Write an image (H, W, 3) uint8 as PNG."""
    with atomic_write(path) as partial:
        Image.fromarray(image).save(partial, format="PNG")


def run_compbench(args: argparse.Namespace) -> None:
    prompted, folder = Prompted(args.samples, args.captions), empty_image_folder(args.out, r".+_\d{6,}\.png")
    for samples, images in prompted.batches(64):
        for sample, image in zip(samples, images, strict=True):
            save(folder / compbench_name(prompted.text(sample), sample), image)
    print(f"{args.out}: {prompted.images.count} images")


def run_geneval(args: argparse.Namespace) -> None:
    prompted = Prompted(args.samples, args.captions)
    lines = read_lines("--metadata", args.metadata)
    if len(lines) != prompted.store.count:
        raise UserError(f"--metadata {args.metadata}: {len(lines)} lines for {prompted.store.count} captions")
    folder = empty_image_folder(args.out, r"\d{5,}")
    for number, line in enumerate(lines):
        write_text(folder / f"{number:05d}" / "metadata.jsonl", line + "\n")
    seen = [0] * len(lines)
    for samples, images in prompted.batches(64):
        for sample, image in zip(samples, images, strict=True):
            number = int(prompted.labels[sample])
            save(folder / f"{number:05d}" / "samples" / f"{seen[number]:04d}.png", image)
            seen[number] += 1
    print(f"{args.out}: {prompted.images.count} images of {len(lines)} prompts")


@torch.no_grad()
def clip_score(
    prompted: Prompted, model_name: str, weights: str | None, device: torch.device, batch_size: int = 64
) -> float:
    """100 times the mean cosine of CLIP's embeddings of image and caption, negative ones as 0 (Hessel et al. 2021)."""
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"clip: needs open_clip, pip install -r requirements-extra.txt ({error})") from None
    quiet_hub()
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(model_name, pretrained=weights, device=device)
        tokenizer = open_clip.get_tokenizer(model_name)
    except Exception as error:  # open_clip raises many kinds for an unknown name, a missing file, no network
        raise UserError(
            f"--clip-model {model_name} --clip-weights {weights}: cannot load them; give a name and a tag of "
            f"open_clip's, or a file ({str(error).splitlines()[0]})"
        ) from None
    model.eval()
    total = 0.0
    for samples, images in prompted.batches(batch_size):
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images]).to(device)
        tokens = tokenizer([prompted.text(sample) for sample in samples]).to(device)
        image_part, text_part = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        total += (image_part * text_part).sum(1).clamp(min=0).double().sum().item()
    return 100 * total / prompted.images.count


def run_clip(args: argparse.Namespace) -> None:
    if args.json:
        require_replaceable("--json", args.json, "a score of this command", lambda path: read_json(path)["clip_score"])
    prompted = Prompted(args.samples, args.captions)
    score = clip_score(prompted, args.clip_model, args.clip_weights, distributed.setup(args.device).device)
    found = {"clip_score": score, "clip_model": args.clip_model, "clip_weights": args.clip_weights}
    found |= {"count": prompted.images.count, "samples": read_provenance(args.samples)}
    print(f"CLIP score ({args.clip_model}, {args.clip_weights}) of {prompted.images.count} samples: {score:.6g}")
    if args.json:
        write_text(args.json, json.dumps(found, indent=2) + "\n")


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        __doc__, prog="evaluations.prompts", description="Judge, or hand on, samples with their prompts."
    )
    commands = parser.add_subparsers(required=True, metavar="compbench|geneval|clip", parser_class=cli.Parser)
    found = {}
    for name, what in (
        ("compbench", "Write PNGs as T2I-CompBench reads them."),
        ("geneval", "Write PNGs as GenEval reads them."),
        ("clip", "Compute the CLIP score."),
    ):
        found[name] = command = commands.add_parser(name, help=what)
        command.add_argument(
            "samples", metavar="SAMPLES", type=cli.file, help="Samples of sample.py or sample_ARD.py, an .npz."
        )
        add_captions_option(command)
        if name != "clip":
            command.add_argument("--out", type=cli.folder, required=True, help="Write the images into this folder.")
    found["compbench"].set_defaults(run=run_compbench)
    found["geneval"].add_argument(
        "--metadata",
        type=cli.file,
        required=True,
        help="Read GenEval's file, which has a line of JSON for each prompt.",
    )
    found["geneval"].set_defaults(run=run_geneval)
    found["clip"].add_argument("--clip-model", type=cli.name, default="ViT-L-14", help="Use this model of open_clip.")
    found["clip"].add_argument(
        "--clip-weights", type=cli.name, required=True, help="Use the weights of this tag of open_clip, or this file."
    )
    found["clip"].add_argument("--json", type=cli.file, help="Write the score and its provenance there.")
    distributed.add_device_option(found["clip"])
    found["clip"].set_defaults(run=run_clip)
    return parser


run = cli.run_command

if __name__ == "__main__":
    cli.main(build_parser(), run)
