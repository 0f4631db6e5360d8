"""Scenes of two digits, the real data of the text demo: their captions as a file, and what samples show of them.

Samples are drawn from a store of these captions, in this order, so a label is a scene. Each of the two places of a
scene holds an 8x8 digit: ``write_crops`` cuts them out, for the evaluator's digit features; ``accuracy`` reads them.
"""

import json
from pathlib import Path

import numpy as np
import torch

from evaluations.digits import DIGITS
from runtime.cli import UserError
from runtime.files import require_different, require_replaceable
from stores.digits import SCENES, SEEN_SCENES, scene_caption, scene_places
from stores.image_arrays import Images, write_whole
from stores.images import from_uint8
from stores.samples import read_provenance

SIDE = 16  # pixels of a scene


def read_samples(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Samples (N, 16, 16, 3) uint8 and their scenes (N,). ``UserError`` on a file of anything else."""
    images = Images("SAMPLES", path)
    scenes = images.member("arr_1")
    if (images.width, images.height) != (SIDE, SIDE) or scenes is None:
        raise UserError(f"{images.what}: not samples of scenes, which have {SIDE}x{SIDE} pixels and labels")
    if not ((scenes >= 0) & (scenes < len(SCENES))).all():
        raise UserError(f"{images.what}: labels beyond 0..{len(SCENES) - 1}; draw from the captions of all scenes")
    pixels = images.member("arr_0")
    assert pixels is not None
    return pixels, scenes


def crops(images: np.ndarray, scenes: np.ndarray) -> np.ndarray:
    """The places of scenes (N,) in images (N, 16, 16, 3) -> (N, 2, 8, 8, 3), first and second digit."""
    places = [scene_places(int(scene)) for scene in scenes]
    return np.stack([[image[place] for place in pair] for image, pair in zip(images, places, strict=True)])


@torch.no_grad()
def accuracy(path: str | Path) -> dict[str, float]:
    """The share of samples that show both digits, each in its place: of captions that were trained on, and of others.

    By the shipped digit classifier, which is right about 99 of 100 real digits.
    """
    images, scenes = read_samples(path)
    parts = torch.from_numpy(crops(images, scenes))[..., :1].flatten(0, 1).permute(0, 3, 1, 2)
    found = DIGITS.load()(from_uint8(parts))[1].argmax(1).view(-1, 2)
    wanted = torch.tensor([SCENES[int(scene)][1:] for scene in scenes])
    right = (found == wanted).all(1).double()
    seen = torch.from_numpy(scenes < SEEN_SCENES)
    return {"seen": right[seen].mean().item(), "unseen": right[~seen].mean().item()}


def write_captions(out: str | Path, count: int) -> None:
    """The captions of the first so many scenes, one a line."""
    text = "".join(f"{scene_caption(scene)}\n" for scene in range(count))
    known = {scene_caption(scene) for scene in range(len(SCENES))}
    require_replaceable("--out", out, "captions", lambda path: set(path.read_text("utf-8").splitlines()) <= known)
    write_whole("--out", out, lambda file: file.write(text.encode()))
    print(f"{out}: {count} captions")


def write_crops(samples: str | Path, out: str | Path) -> None:
    """The digits of samples of scenes, as samples by themselves of the same provenance."""
    images, scenes = read_samples(samples)
    found = crops(images, scenes).reshape(-1, 8, 8, 3)
    require_different("--out", out, {"SAMPLES": samples})
    require_replaceable("--out", out, "digits", lambda path: Images("--out", path).shape[1:] == found.shape[1:])
    origin = read_provenance(samples) | {"count": len(found), "cropped": "digits"}
    write_whole("--out", out, lambda file: np.savez(file, arr_0=found, provenance=np.array(json.dumps(origin))))
    print(f"{out}: {len(found)} digits")
