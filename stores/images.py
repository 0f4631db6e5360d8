"""Real images: digits (digits.py), emoji (emoji.py), folders (image_folder.py), stores of latents (latents.py).

Pixels are uint8 outside the models and float32 in [-1, 1] inside; ``from_uint8`` and ``to_uint8`` are the only two ways
between them, and a uint8 image survives the round trip exactly.

A source, whichever it is, has
    count, num_classes   how many images and classes there are (0: unconditional)
    labels               (count,) int64, all 0 without classes
    size, channels       pixels of a side and colour channels of its images
    vae, vae_hash        the autoencoder whose latents it holds, None for pixels; its hash where it is known
    fingerprint          plain dict that says which data they are, part of a run's config; "class_names" in it where
                         classes have names
    read(rows, flips)    rows (B,) and which of them to mirror (B,) bool -> {"y": (B,) labels} and either
                         {"images": (B, channels, size, size) uint8} or {"mean", "std": (B, C, h, w) float32}
so that trainers say ``real_latents(batch, vae)`` and need not know which it is.
"""

from collections.abc import Callable
from typing import Any

import torch

from models import DiT
from runtime.cli import UserError, shortened
from runtime.distributed import DistributedContext
from runtime.files import require_outside
from runtime.provenance import require_same
from runtime.vae import VAE, Outline, Pixels, load_same_vae, load_vae, resolve_name
from stores.digits import DigitImages, DigitScenes
from stores.emoji import EmojiImages
from stores.image_folder import ImageFolder
from stores.latents import LatentStore, is_store


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1], any shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float in [-1, 1] -> uint8, rounded to nearest as DiT's sampling script does, any shape."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


Source = DigitImages | DigitScenes | EmojiImages | ImageFolder | LatentStore
# The meaning of the word in place of a path.
BUNDLED: dict[str, Callable[[], Source]] = {"digits": DigitImages, "emoji": EmojiImages, "digit-scenes": DigitScenes}


def open_source(
    data_path: str,
    image_size: int | None = None,
    unconditional: bool = False,
    option: str = "--data-path",
    *,
    channels: int | None = None,
    skip_bad: int = 0,
    verify: bool = False,
    context: DistributedContext | None = None,
) -> Source:
    """The source that an option names: a word of ``BUNDLED``, a store of latents, a folder of images.

    ``image_size`` is needed for images; a latent store knows its own and a contradiction is refused. ``unconditional``
    leaves out the classes. ``channels``: 3 for folders unless told otherwise; the others know their own. ``skip_bad``
    is for folders; ``verify`` compares the checksums of a latent store when it is read.
    """
    source: Source
    if data_path in BUNDLED:
        source = BUNDLED[data_path]()
    elif is_store(data_path):
        source = LatentStore(data_path, option, verify)
    elif image_size is None:
        raise UserError(f"{option} {data_path}: an image folder needs --image-size (256 for DiT-XL/2)")
    else:
        source = ImageFolder(
            data_path, image_size, unconditional, option, channels=channels or 3, skip_bad=skip_bad, context=context
        )
    if image_size not in (None, source.size):
        raise UserError(f"--image-size {image_size}: the images of {option} {data_path} have {source.size} pixels")
    if channels not in (None, source.channels):
        raise UserError(f"--channels {channels}: the images of {option} {data_path} have {source.channels}")
    if skip_bad and not isinstance(source, ImageFolder):
        raise UserError(f"--skip-bad {skip_bad}: {option} {data_path} is no image folder, leave the option out")
    if unconditional:
        source.num_classes, source.labels = 0, torch.zeros_like(source.labels)
        source.fingerprint.pop("class_names", None)
    return source


def summary(source: Source, vae: Any = None) -> str:
    """The content of a source, in a line: "303 images, 3 classes: a, b, c".

    With the autoencoder that encodes it in every step of a training, if one does, that as well.
    """
    text, names = f"{source.count} images", source.fingerprint.get("class_names")
    if source.num_classes:
        text += f", {source.num_classes} classes" + (f": {shortened(names, 8)}" if names else "")
    notes = [text, *getattr(source, "notes", [])]
    if vae is not None and vae.name and not isinstance(source, LatentStore):
        notes.append("encoded in every step, for about as long as it trains; encode_latents.py does it once")
    return "; ".join(notes)


def require_outside_source(source: Source, outputs: dict[str, str | None]) -> None:
    """``UserError`` where one of the paths to be written, by their options, lies in the folder that a source reads."""
    for option, path in outputs.items():
        if path and isinstance(source, ImageFolder):
            require_outside(option, path, source.option, source.root)


def open_vae(
    source: Source, given: str | None, device: torch.device, needs_decoder: bool
) -> tuple[Any, str | None, str | None]:
    """The autoencoder to use, its full name and hash: ``--vae`` as given, else the source's own; None is pixel space.

    Latents need one for pictures only: else none is loaded. ``UserError`` when they are another one's.
    """
    if not isinstance(source, LatentStore):
        vae = load_vae(given, device)
        return vae, vae.name, vae.hash
    name = resolve_name(given) if given else source.vae
    other, what = name != source.vae, f"--vae {given}: "
    if other and (name is None or source.vae_hash is None):
        raise UserError(f"{what}{source.folder} holds latents of {source.vae}; leave the option out")
    try:
        loads = needs_decoder or other  # another name may be another place of the same
        vae = load_same_vae(source.vae, source.vae_hash, device, name) if loads else Pixels()
    except UserError as error:
        if not other:
            raise
        reason = str(error).removeprefix(what)
        raise UserError(f"{what}{source.folder} holds latents of {source.vae}; {reason}") from None
    return vae, name, source.vae_hash


def open_suitable(
    path: str,
    teacher: DiT,
    provenance: dict,
    context: DistributedContext,
    *,
    given: str | None,
    needs_decoder: bool,
    **how: Any,
) -> tuple[Source, Any]:
    """The source of real images and the autoencoder; ``UserError`` where they do not suit the teacher.

    ``provenance``, the teacher's, names its autoencoder, and ``given`` is where to load that from instead. A teacher of
    grey images sees folders in grey. ``how`` is for ``open_source``: "skip_bad" and "verify".
    """
    encoded = is_store(path)  # then the autoencoder is needed for pictures only, and to see that it is the one given
    name, vae_hash = provenance["vae"], provenance.get("vae_hash")
    loads = given or needs_decoder or not encoded
    vae = load_same_vae(name, vae_hash, context.device, given) if loads else Pixels()
    image_size = None if encoded or path in BUNDLED else teacher.input_size * vae.factor
    channels = 1 if image_size and (vae.image_channels or teacher.in_channels) == 1 else None
    how |= {"channels": channels, "context": context}
    source = open_source(path, image_size, teacher.num_classes == 0, "--real-data-path", **how)
    found = {"classes": source.num_classes, "latent shape": latent_shape(source, vae)}
    wanted = {"classes": teacher.num_classes, "latent shape": teacher.latent_shape}
    if encoded:
        found |= {"vae": source.vae, "vae_hash": source.vae_hash}
        wanted |= {"vae": name, "vae_hash": vae_hash or vae.hash}
    hint = " (or give its autoencoder by --vae, if that lies elsewhere)" if encoded and not given else ""
    require_same(f"--real-data-path {path}: these images do not suit the teacher{hint}", found, wanted)
    return source, vae


def latent_shape(source: Source, vae: VAE | Outline | Pixels) -> tuple[int, ...]:
    """(C, h, w) of a source's latents. ``UserError`` when its images do not suit the autoencoder."""
    if isinstance(source, LatentStore):
        return source.latent_shape
    if source.size % vae.factor:
        raise UserError(f"--image-size {source.size}: must be a multiple of {vae.factor} for --vae {vae.name}")
    if vae.image_channels not in (None, source.channels):
        channels = f"{vae.image_channels} channels, these have {source.channels}"
        raise UserError(f"--vae {vae.name}: takes images of {channels}")
    side = source.size // vae.factor
    return vae.channels or source.channels, side, side


def real_latents(batch: dict[str, torch.Tensor], vae: VAE | Pixels) -> torch.Tensor:
    """x_0 of a batch: (B, C, h, w), drawn from the encoder's posterior with the noise ``batch["posterior_noise"]``.

    ``batch`` is the result of ``read``. Pixels have no deviation, so they are x_0 themselves.
    """
    if "images" in batch:
        mean, std = vae.encode(from_uint8(batch["images"]))
    else:
        mean, std = batch["mean"], batch["std"]
    return mean + std * batch["posterior_noise"]
