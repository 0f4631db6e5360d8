"""Images in, features out: Inception-v3 of 2015, with which ADM's figures are made, DINOv2, our small classifiers,
and, without a network, coarse pixels.

All answer the same call, so that the evaluator does not know which one it holds.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from evaluations import dinov2
from evaluations.classifier import Yardstick
from evaluations.digits import DIGITS
from evaluations.emoji import EMOJI
from runtime.cli import UserError, existing_file
from runtime.files import cached_download, file_sha256
from stores.images import from_uint8

YARDSTICKS = {yardstick.name: yardstick for yardstick in (DIGITS, EMOJI)}
NAMES = ("inception", "dinov2", *YARDSTICKS, "pixels")
# Names of the Frechet distance in a network's features, as a key and in print.
FRECHET = {"fid": "FID", "fd_dinov2": "FD-DINOv2", "fd_pixels": "FD-pixels"}


class Extractor:
    """Features of images: loaded and called with (B, H, W, 3) uint8 it returns a dict of float32 arrays on the CPU.

    pool: (B, D) for the Frechet distance, one of ``FRECHET``, for KID, precision and recall; spatial: (B, D2) for sFID
    or None; probs: (B, K) for Inception Score or None. ``widths`` has the widths of those that are not None. ``name``
    and ``weights_sha256`` identify the network; ``adm`` says whether figures made with it may be set beside those of
    papers that use ADM's evaluator, ``remark`` why a distance may not that looks as if it might.
    """

    name: str
    widths: dict[str, int]
    weights_sha256: str | None = None
    frechet = "fid"
    adm = False
    remark = ""
    tf32 = False  # on GPUs, take products in TF32

    def check_size(self, width: int, height: int) -> None:
        """Raise ``UserError`` if the network does not read images of this size (pixels)."""

    def load(self) -> "Extractor":
        """Load the weights, and fetch them first where no file was given. ``UserError`` on wrong ones."""
        raise NotImplementedError

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray | None]:
        raise NotImplementedError


class ClassifierFeatures(Extractor):
    """The repository's own classifier of bundled images (evaluations/classifier.py), which reads digits in grey."""

    def __init__(self, yardstick: Yardstick, device: torch.device | str = "cpu"):
        self.name = yardstick.name
        self.weights_sha256 = file_sha256(existing_file(f"{yardstick.name} classifier", yardstick.weights))
        self.model, self.device = yardstick.load().to(device), device
        self.widths = dict(pool=self.model.head.in_features, probs=self.model.config["num_classes"])

    def load(self) -> "Extractor":
        return self  # its weights lie in assets/

    def check_size(self, width: int, height: int) -> None:
        side = self.model.size
        if (width, height) != (side, side):
            raise UserError(
                f"--features {self.name}: reads {side}x{side} images, these are {width}x{height}, choose inception"
            )

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray | None]:
        x = from_uint8(torch.from_numpy(images).to(self.device)).permute(0, 3, 1, 2)  # (B, 3, H, W)
        if self.model.channels == 1:
            x = x.mean(dim=1, keepdim=True)
        pool, logits = self.model(x)
        return dict(pool=pool.cpu().numpy(), spatial=None, probs=logits.softmax(dim=1).cpu().numpy())


class InceptionFeatures(Extractor):
    """Inception-v3 of 2015-12-05 with TensorFlow's weights and TensorFlow's resizing to 299x299, from torch-fidelity.

    pool: the 2048 pooled features. spatial: the first 7 channels of the 1x1 branch of block Mixed_6d, mixed_6/conv in
    TensorFlow's graph, 17 x 17 x 7 = 2023 numbers (sFID, Nash et al. 2021). probs: the softmax of the 1008 logits
    without their bias, as ADM takes it.
    """

    name, widths = "inception", dict(pool=2048, spatial=17 * 17 * 7, probs=1008)
    PUBLISHED = "6726825d"  # the published weights' SHA-256 starts so, and their file name ends so

    def __init__(self, device: torch.device | str = "cpu", weights: str | Path | None = None, tf32: bool = False):
        self.weights = existing_file("--inception-weights", weights) if weights else None
        self.device, self.tf32 = device, tf32

    def load(self) -> "Extractor":
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        weights = self.weights or cached_download(URL_INCEPTION_V3, "--inception-weights", self.PUBLISHED)
        wrong = f"--inception-weights {weights}: not the weights of torch-fidelity's Inception-v3"
        try:
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity itself would run any pickle
        except Exception:  # the ways in which a wrong file fails to unpickle are not a closed list
            raise UserError(wrong) from None
        try:
            model = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights))
        except (RuntimeError, TypeError, AttributeError):
            raise UserError(wrong + " (names or shapes differ)") from None
        self.model = model.to(self.device)
        self.weights_sha256 = file_sha256(weights)
        self.adm = self.weights_sha256.startswith(self.PUBLISHED) and not self.tf32
        self.remark = "" if self.adm else "not ADM: other Inception weights than the published ones, or TF32"
        self.model.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        return self

    def _keep_spatial(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 192, 17, 17) -> (B, 17 * 17 * 7)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray | None]:
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)  # (B, 3, H, W) uint8
        pool, logits = self.model(x)
        outputs = dict(pool=pool, spatial=self.spatial, probs=logits.softmax(dim=1))
        return {name: value.cpu().numpy() for name, value in outputs.items()}


class Dinov2Features(Extractor):
    """The class token of DINOv2's ViT-L/14, as EDM2 takes it (evaluations/dinov2.py)."""

    name, frechet = "dinov2", "fd_dinov2"

    def __init__(
        self, device: torch.device | str = "cpu", weights: str | Path | None = None, tf32: bool = False, **shape: int
    ):
        """``shape``: the arguments of ``dinov2.load`` for weights of another size."""
        self.weights = existing_file("--dinov2-weights", weights) if weights else None
        self.device, self.tf32, self.shape = device, tf32, shape
        self.widths = dict(pool=shape.get("width", 1024))

    def load(self) -> "Extractor":
        weights = self.weights or cached_download(dinov2.URL, "--dinov2-weights", dinov2.PUBLISHED)
        self.model = dinov2.load(weights, **self.shape).to(self.device)
        self.weights_sha256 = file_sha256(weights)
        if self.tf32 or not self.weights_sha256.startswith(dinov2.PUBLISHED):
            self.remark = "not as published: other DINOv2 weights than Meta's, or TF32"
        return self

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray | None]:
        pool = self.model(dinov2.prepared(torch.from_numpy(images).to(self.device)))
        return dict(pool=pool.cpu().numpy(), spatial=None, probs=None)


class PixelFeatures(Extractor):
    """Colours averaged over a grid of 8x8 fields, 192 numbers: no weights, so nothing to fetch.

    They see layout and colour and no detail: enough to compare runs on small pictures, and no FID.
    """

    name, frechet = "pixels", "fd_pixels"
    widths = dict(pool=8 * 8 * 3)

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device

    def load(self) -> "Extractor":
        return self

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray | None]:
        x = from_uint8(torch.from_numpy(images).to(self.device)).permute(0, 3, 1, 2)  # (B, 3, H, W)
        pool = F.adaptive_avg_pool2d(x, 8).flatten(1)
        return dict(pool=pool.cpu().numpy(), spatial=None, probs=None)


def extractor(
    name: str,
    device: torch.device | str = "cpu",
    inception_weights: str | Path | None = None,
    tf32: bool = False,
    dinov2_weights: str | Path | None = None,
) -> Extractor:
    """The extractor of that name, one of ``NAMES``, for the device, not loaded yet. ``UserError`` on wrong options."""
    for of, weights in (("inception", inception_weights), ("dinov2", dinov2_weights)):
        if weights and name != of:
            raise UserError(f"--{of}-weights {weights}: of no use with --features {name}, leave it out")
    if name == "inception":
        return InceptionFeatures(device, inception_weights, tf32)
    if name == "dinov2":
        return Dinov2Features(device, dinov2_weights, tf32)
    if tf32:
        raise UserError(f"--tf32: of no use with --features {name}, leave it out")
    if name in YARDSTICKS:
        return ClassifierFeatures(YARDSTICKS[name], device)
    if name == "pixels":
        return PixelFeatures(device)
    raise ValueError(f"features {name!r} are none of {', '.join(NAMES)}")
