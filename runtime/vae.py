"""Between pixels and latents: Stable Diffusion's autoencoder through diffusers, or nothing for pixel-space models."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.cli import FETCHING, AbsentError, UserError, shortened
from runtime.files import DIFFUSERS_STEM, cached_model
from runtime.paths import is_hub_id, missing
from runtime.precision import DTYPES, own_products
from runtime.provenance import weights_hash

NAMES = {
    "ema": "stabilityai/sd-vae-ft-ema",
    "mse": "stabilityai/sd-vae-ft-mse",
    "sdxl": "stabilityai/sdxl-vae",  # PixArt-Sigma's
}
SDXL_SCALE = 0.13025  # of the autoencoders that overflow in fp16, unless their config says that they are mended
WEIGHTS = (f"{DIFFUSERS_STEM}.safetensors", f"{DIFFUSERS_STEM}.bin")
EXPECTED = f"give {', '.join(NAMES)}, none or a folder in diffusers' layout (config.json and {WEIGHTS[0]})"
VAE_BYTES = 4 * 83_653_863  # of the weights of each of these
IMAGES_AT_ONCE = 16  # the largest batch of an encoder or decoder: 16 images of 512 pixels need about 10 GB in fp32


class Pixels:
    """The latent space of a model that works on pixels: images in [-1, 1] as they are."""

    name, hash, scale, factor, channels, image_channels = None, None, 1.0, 1, None, None
    weights_bytes, downloaded = 0, True

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images: (B, C, H, W) in [-1, 1] -> mean and standard deviation of the latent: the image, and zero."""
        return images, torch.zeros_like(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents: (B, C, H, W) -> images of the same shape, in [-1, 1] where the model is right."""
        return latents


@dataclass(frozen=True)
class Outline:
    """By an autoencoder's config: how many times smaller latents are than images, and their channels."""

    name: str
    scale: float
    factor: int
    channels: int
    image_channels: int
    weights_bytes: int
    downloaded: bool = True  # False: it would be fetched
    hash: str | None = None


def outline_vae(name: str | None, option: str = "--vae") -> Outline | Pixels:
    """The outline of the autoencoder of that name; nothing is loaded or fetched. None or "none" is pixel space.

    ``AbsentError`` where it is to be fetched, and not one of ``NAMES``; ``UserError`` where there is none.
    """
    path = resolve_name(name)
    if path is None:
        return Pixels()
    config, here = Path(path) / "config.json", True
    if (Path(path) / "vae" / "config.json").is_file():  # a whole pipeline's folder
        config = Path(path) / "vae" / "config.json"
    elif not Path(path).is_dir():
        require_hub_id(path, option)
        from huggingface_hub import try_to_load_from_cache

        places = "", "vae/"  # at the top, or in a pipeline's repository
        cached = [[try_to_load_from_cache(path, at + file) for file in ("config.json", WEIGHTS[0])] for at in places]
        found = next((files for files in cached if isinstance(files[0], str)), [None])
        here = all(isinstance(file, str) for file in found)
        if found[0]:
            config = Path(str(found[0]))
        elif path in NAMES.values():
            scale = SDXL_SCALE if path == NAMES["sdxl"] else 0.18215
            return Outline(path, scale, 8, 4, 3, VAE_BYTES, downloaded=False)
        else:
            raise AbsentError(f"{option} {name}: would be fetched from the Hugging Face hub")
    try:
        about = json.loads(config.read_text())
        factor = 2 ** (len(about["block_out_channels"]) - 1)
        sizes = [file.stat().st_size for file in (config.with_name(name) for name in WEIGHTS) if file.is_file()]
        if here and not sizes:
            raise FileNotFoundError(f"{config.parent} has no {WEIGHTS[0]}")
        size = sizes[0] if sizes else VAE_BYTES
        channels = int(about["latent_channels"]), int(about["in_channels"])
        return Outline(path, float(about.get("scaling_factor", 0.18215)), factor, *channels, size, here)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"its config lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{option} {name}: cannot load the autoencoder; {EXPECTED} ({reason})") from None


def require_hub_id(path: str, option: str) -> None:
    """``UserError`` where a name that is no folder is no hub id either."""
    if path not in NAMES.values() and not is_hub_id(path):
        known = f"give {', '.join(NAMES)}, none, a hub id or a folder"
        raise UserError(f"{option} {path}: {missing(path, 'folder')}; {known}")


class VAE:
    """diffusers' AutoencoderKL with latents scaled to unit variance by the factor in its own config."""

    def __init__(self, name: str, device: torch.device, precision: str = "fp32", compile: bool = False):
        """``compile``: the decoder, at the first call; from then on it takes ``IMAGES_AT_ONCE`` latents at a time."""
        model = load_autoencoder(name)
        if precision == "fp16" and model.config.scaling_factor == SDXL_SCALE and model.config.force_upcast:
            raise UserError(f"--vae {name}: SDXL's autoencoder overflows in fp16, give --vae-precision bf16 or fp32")
        self.hash: str | None = latent_space_hash(model)
        self.name, self.compiled = NAMES.get(name, name), compile
        model = model.to(device, DTYPES[precision], memory_format=torch.channels_last)
        self.model, self.dtype, self.precision = model.eval().requires_grad_(False), model.dtype, precision
        if compile:
            self.model.decoder.compile(dynamic=False)
        self.scale = self.model.config.scaling_factor
        self.factor = 2 ** (len(self.model.config.block_out_channels) - 1)
        self.channels, self.image_channels = self.model.config.latent_channels, self.model.config.in_channels
        self.weights_bytes, self.downloaded = sum(p.nbytes for p in self.model.parameters()), True

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images: (B, 3, H, W) in [-1, 1] -> mean and deviation of the scaled latents, (B, C, H/f, W/f) float32."""
        with own_products(self.precision, images.device):  # a trainer's --precision is not the autoencoder's
            parts = [self.model.encode(x).latent_dist for x in images.to(self.dtype).split(IMAGES_AT_ONCE)]
        mean, std = torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])
        return mean.float() * self.scale, std.float() * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents: (B, C, h, w) scaled -> images (B, 3, h * f, w * f), about [-1, 1], float32."""
        filled = latents
        if self.compiled:  # made for one size: the last part is filled up
            filled = torch.cat([latents, latents.new_zeros(-len(latents) % IMAGES_AT_ONCE, *latents.shape[1:])])
        with own_products(self.precision, latents.device):
            return decode_latents(self.model, filled)[: len(latents)]


def decode_latents(autoencoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """latents: (B, C, h, w) scaled -> images (B, 3, h * f, w * f), about [-1, 1], float32, by an AutoencoderKL."""
    z = (latents / autoencoder.config.scaling_factor).to(autoencoder.dtype)
    return torch.cat([autoencoder.decode(part).sample.float() for part in z.split(IMAGES_AT_ONCE)])


def load_autoencoder(name: str) -> Any:
    """diffusers' AutoencoderKL of that name (of ``NAMES``, a hub id or a folder), in float32; ``UserError`` if not."""
    path, fetch = NAMES.get(name, name), ""
    if not Path(path).is_dir():
        require_hub_id(path, "--vae")
        fetch = f", or fetch it where there is a network: hf download {path} --local-dir FOLDER"
    from diffusers import AutoencoderKL  # seconds to import, not needed for pixels
    from diffusers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # our sentence below names the failure
    try:
        folder = cached_model(path, "vae") if fetch else Path(path)
        within = "vae" if (folder / "vae" / "config.json").is_file() else None  # a whole pipeline's folder
        model, found = AutoencoderKL.from_pretrained(
            folder,
            subfolder=within,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,  # True, the default, only warns that it needs the package accelerate
            output_loading_info=True,
        )
        if absent := sorted(found["missing_keys"]):  # diffusers would leave these random
            raise ValueError(f"its weights lack {shortened(absent, 3)}")
    except Exception as error:  # diffusers raises many kinds for a missing file, a bad config, no network
        raise UserError(
            f"--vae {name}: cannot load the autoencoder; {EXPECTED}{fetch} ({str(error).splitlines()[0]})"
        ) from None
    return model


def latent_space_hash(model: Any) -> str:
    """16 hex digits that name the latents of an AutoencoderKL in float32: a hash of its encoder and its scale.

    The decoder has no part in them: "ema" and "mse" differ in nothing else, and each may decode what the other encodes.
    """
    encoder = {k: v for k, v in model.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    return weights_hash(encoder | {"scaling_factor": torch.tensor(model.config.scaling_factor)})


def resolve_name(name: str | None) -> str | None:
    """The hub id or folder that ``--vae`` means; None for pixel space ("none")."""
    return None if name in (None, "none") else NAMES.get(name, name)


def decoder_precision(given: str, device: torch.device) -> str:
    """The number format of ``--vae-precision``: "auto" is bf16 on GPUs, where decoding costs most, or fp32."""
    return given if given != "auto" else "bf16" if device.type == "cuda" else "fp32"


def load_vae(name: str | None, device: torch.device, precision: str = "fp32", compile: bool = False) -> Any:
    """The autoencoder of that name (one of ``NAMES``, a hub id or a folder); None or "none" is pixel space.

    A ``VAE`` or ``Pixels``; in a dry run, which loads and fetches nothing, an ``Outline``.
    """
    if not FETCHING.get():
        return outline_vae(name)
    return Pixels() if name is None or resolve_name(name) is None else VAE(name, device, precision, compile)


def load_same_vae(
    name: str | None,
    hash: str | None,
    device: torch.device,
    given: str | None = None,
    precision: str = "fp32",
    compile: bool = False,
) -> Any:
    """The autoencoder of this name and hash, loaded from ``given`` (``--vae``) if there is one; ``UserError`` if not.

    Where no hash is known, as with others' weights and those of earlier versions, the given one is taken unchecked.
    """
    if given and (resolve_name(given) is None) != (name is None):
        space = "pixels" if name is None else f"latents of {name}"
        raise UserError(f"--vae {given}: this model works on {space}, leave the option out")
    vae = load_vae(given or name, device, precision, compile)
    if vae.hash and hash not in (None, vae.hash):
        raise UserError(
            f"--vae {given or name}: this autoencoder ({vae.hash}) is not {name} ({hash}), whose latents these "
            "are; give the folder that holds that one"
        )
    return vae
