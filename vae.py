"""Between pixels and latents: Stable Diffusion's autoencoder through diffusers, or nothing for pixel-space models."""

import torch

from cli import UserError

NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


class Pixels:
    """The latent space of a model that works on pixels: images in [-1, 1] as they are."""

    name, scale, factor, channels = None, 1.0, 1, None

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images: (B, C, H, W) in [-1, 1] -> mean and standard deviation of the latent: the image, and zero."""
        return images, torch.zeros_like(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents: (B, C, H, W) -> images of the same shape, in [-1, 1] where the model is right."""
        return latents


class VAE:
    """diffusers' AutoencoderKL with latents scaled to unit variance by the factor in its own config."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32):
        from diffusers import AutoencoderKL  # seconds to import, not needed for pixels

        path = NAMES.get(name, name)
        try:
            self.model = AutoencoderKL.from_pretrained(path, torch_dtype=dtype)
        except Exception as error:  # diffusers raises many kinds for a missing file, a bad config, no network
            raise UserError(
                f"--vae {name}: cannot load the autoencoder {path}; give ema, mse, none or a folder in diffusers' "
                f"layout (config.json and diffusion_pytorch_model.safetensors), or fetch it where there is a network: "
                f"hf download {path} --local-dir FOLDER ({str(error).splitlines()[0]})"
            ) from None
        self.model = self.model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.name, self.dtype = path, dtype
        self.scale = self.model.config.scaling_factor
        self.factor = 2 ** (len(self.model.config.block_out_channels) - 1)
        self.channels = self.model.config.latent_channels

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images: (B, 3, H, W) in [-1, 1] -> mean and deviation of the scaled latents, (B, C, H/f, W/f) each."""
        posterior = self.model.encode(images.to(self.dtype)).latent_dist
        return posterior.mean.float() * self.scale, posterior.std.float() * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents: (B, C, h, w) scaled -> images (B, 3, h * f, w * f), about [-1, 1], float32."""
        return self.model.decode((latents / self.scale).to(self.dtype)).sample.float()


def load_vae(name: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> VAE | Pixels:
    """The autoencoder of that name ("ema", "mse", a hub id or a folder); None or "none" is pixel space."""
    return Pixels() if name in (None, "none") else VAE(name, device, dtype)
