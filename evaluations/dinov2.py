"""DINOv2's ViT-L/14, in whose features FD-DINOv2 is measured (Stein et al. 2023), and how images are given to it.

As EDM2 does it (Karras et al. 2024): an image goes to 224 x 224 pixels by a bicubic filter with antialiasing, is not
rounded again, and is normalised by ImageNet's means and deviations; its features are the class token behind the last
norm, 1024 numbers. The network is timm's, the weights are Meta's, without registers. Their positions are those of 37 x
37 patches and come to 16 x 16 as in Meta's own code, without antialiasing and at a scale of 16.1 / 37; timm would do it
otherwise and give other features.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from runtime.cli import UserError
from runtime.precision import on_meta_device
from stores.checkpoints import explain_load_error

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
PUBLISHED = "d5383ea8"  # its SHA-256 starts so
SIDE, PATCH = 224, 14
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of red, green and blue in 0..1


def load(path: Path, width: int = 1024, depth: int = 24, heads: int = 16) -> Any:
    """The network with the weights of Meta's file, in evaluation mode. ``UserError`` on any other file."""
    from timm.models.vision_transformer import VisionTransformer  # seconds to import

    wrong = f"--dinov2-weights {path}: not the weights of DINOv2's ViT-L/14 without registers"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the ways in which a wrong file fails to unpickle are not a closed list
        raise UserError(f"{wrong} ({explain_load_error(path, error)})") from None
    with on_meta_device():
        model = VisionTransformer(
            img_size=SIDE,
            patch_size=PATCH,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            init_values=1e-5,  # any value makes timm add layer scales
            num_classes=0,
            global_pool="token",
        )
    try:
        state.pop("mask_token", None)  # is for Meta's training
        state["pos_embed"] = positions(state["pos_embed"])
        model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    except (RuntimeError, TypeError, AttributeError, KeyError):
        raise UserError(f"{wrong} (names or shapes differ)") from None
    return model.eval().requires_grad_(False)


def positions(learned: torch.Tensor) -> torch.Tensor:
    """The positions of the class token and of all patches at ``SIDE`` pixels, (1, 1 + n * n, D), from learned ones."""
    own, patches = learned.float().split([1, learned.shape[1] - 1], dim=1)
    before, after = round(patches.shape[1] ** 0.5), SIDE // PATCH
    if before != after:
        grid = patches.unflatten(1, (before, before)).permute(0, 3, 1, 2)
        patches = F.interpolate(grid, scale_factor=(after + 0.1) / before, mode="bicubic").flatten(2).mT
    return torch.cat([own, patches], dim=1)


def prepared(images: torch.Tensor) -> torch.Tensor:
    """Images (B, H, W, 3) uint8 -> the network's input (B, 3, 224, 224) float32."""
    x = images.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True) / 255
    mean, deviation = (x.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (x - mean) / deviation
