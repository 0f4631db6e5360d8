"""PixArt, the public text-to-image teacher (Chen et al. 2023, "PixArt-alpha"; 2024, "PixArt-Sigma"): DiT plus a diff.

All blocks share one modulation by time, to which each adds a table of its own (adaLN-single); between self-attention
and MLP each block's tokens read the caption by cross-attention. Parameter names and shapes are those of the release.

    B batch   n points (B, or B * S of a student)   T tokens   D width   L text tokens, at most   h heads

``y`` is text, (B, L, C): an encoder's output for the captions' tokens; rows of zeros are padding, which nothing reads.
"""

from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from models import SIZES, Attention, AttentionFn, DiT, DiT_models, Mlp, attend, modulate, sincos_positions
from models_ard import ARD, STUDENTS


class CaptionEmbedder(nn.Module):
    """Maps text tokens to the model's width."""

    def __init__(self, caption_channels: int, hidden_size: int):
        super().__init__()
        self.y_proj = Mlp(hidden_size, hidden_size, caption_channels)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """y: (B, L, C) -> (B, L, D); padding stays zero."""
        return self.y_proj(y.to(self.y_proj.fc1.weight.dtype)) * y.any(-1, keepdim=True)


class CrossAttention(nn.Module):
    """Multi-head attention of image tokens to text. The points of one trajectory read the same text."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x: (n, T, D) tokens, text: (B, L, D), mask: (B, 1, 1, L) True where there is text -> (n, T, D)."""
        B, L, D = text.shape
        q = self.q_linear(x).reshape(B, -1, self.num_heads, D // self.num_heads).transpose(1, 2)  # points as one row
        k, v = self.kv_linear(text).view(B, L, 2, self.num_heads, D // self.num_heads).transpose(1, 3).unbind(2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class PixArtBlock(nn.Module):
    """A transformer block that reads text, conditioned on time by adaLN-single."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def forward(
        self, x: torch.Tensor, c: tuple[torch.Tensor, torch.Tensor, torch.Tensor], attention_fn: AttentionFn = attend
    ) -> torch.Tensor:
        """x: (n, T, D) tokens, c: the result of ``PixArt.block_condition`` -> (n, T, D)."""
        time, text, mask = c
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (self.scale_shift_table + time).unbind(1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), attention_fn)
        x = x + self.cross_attn(x, text, mask)  # not normalised
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class PixArtFinalLayer(nn.Module):
    """The output head: adaptive norm by the time itself, and a linear map to the pixels of each patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x: (n, T, D), c: (n, D) -> (n, T, p * p * out_channels)."""
        shift, scale = (self.scale_shift_table + c[:, None]).unbind(1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PixArt(DiT):
    """Text-to-image diffusion transformer. ``config`` holds the constructor's arguments, enough to rebuild it.

    ``position_scale`` divides the positions: 0.5, 1, 2, 4 in Sigma's models of 256, 512, 1024, 2048 pixels.
    ``class_dropout_prob`` is the rate of the null caption, that of "", in training.
    """

    block_type, head_type = PixArtBlock, PixArtFinalLayer

    def __init__(self, caption_channels: int = 4096, position_scale: float = 1.0, **shape: Any):
        super().__init__(num_classes=0, **shape)  # without classes: y is replaced below
        self.config |= dict(caption_channels=caption_channels, position_scale=position_scale)
        del self.config["num_classes"]
        hidden_size = self.config["hidden_size"]
        self.y_embedder: Any = CaptionEmbedder(caption_channels, hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.initialize_text_weights()

    def initialize_text_weights(self) -> None:
        """DiT's recipe, and PixArt's for the caption: Xavier for the caption: for 4096 channels that is N(0, 0.02)."""
        side, scale = self.input_size // self.patch_size, self.config["position_scale"]
        self.pos_embed.data.copy_(sincos_positions(self.pos_embed.shape[2], side, scale))
        for layer in (self.y_embedder.y_proj.fc1, self.y_embedder.y_proj.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        time: Any = self.t_block[1]
        nn.init.normal_(time.weight, std=0.02)
        nn.init.zeros_(time.bias)
        blocks: Any = self.blocks
        for block in blocks:
            nn.init.zeros_(block.cross_attn.proj.weight)

    def condition(self, t: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """The head is conditioned on time alone."""
        return t.expand(len(e), *t.shape[1:])

    def block_condition(self, c: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The times' modulation (n, 6, D), the text (B, L, D), and where there is text (B, 1, 1, L)."""
        return self.t_block(c).unflatten(1, (6, -1)), e, e.any(-1)[:, None, None]


class TextARD(ARD, PixArt):
    """The student of a text-to-image teacher. The points of a trajectory read one caption, which is never repeated."""


STUDENTS[PixArt] = TextARD

PixArt_models = {
    f"PixArt-{size}/{patch_size}": partial(PixArt, patch_size=patch_size, **shape)
    for size, shape in SIZES.items()
    for patch_size in (2, 4, 8)
}
MODELS = DiT_models | PixArt_models


def named_shape(name: str) -> dict[str, Any]:
    """The arguments of a named size, of ``MODELS``, with the public models' text for one that reads text."""
    return MODELS[name].keywords | ({"caption_channels": 4096} if name in PixArt_models else {})


SIZE_OPTIONS = {"depth": "depth", "width": "hidden_size", "heads": "num_heads", "patch": "patch_size"}  # -> arguments


def sized_shape(name: str | None, **sizes: int | None) -> dict[str, Any]:
    """The arguments of a named size, if any, with those of ``SIZE_OPTIONS`` that are given in place of its own."""
    named = MODELS[name].keywords if name else {}
    return named | {SIZE_OPTIONS[option]: value for option, value in sizes.items() if value is not None}


def teacher_type(config: dict) -> type[DiT]:
    """The class of a teacher with this config."""
    return PixArt if "caption_channels" in config else DiT


def model_name(config: dict) -> str:
    """The name of a model with this config, "DiT-XL/2" or "PixArt-XL/2"; "DiT" or "PixArt" for sizes without a name."""
    kind = "PixArt" if "caption_channels" in config else "DiT"
    for name, build in DiT_models.items():
        if build.keywords.items() <= config.items():
            return name.replace("DiT", kind)
    return kind


def student_type(config: dict) -> type[ARD]:
    """The class of a student, or of a teacher's student, with this config."""
    return TextARD if "caption_channels" in config else ARD
