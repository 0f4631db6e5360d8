"""DiT, the diffusion transformer that is the teacher (Peebles & Xie, "Scalable Diffusion Models with Transformers").

Parameter names, shapes and arithmetic are those of the official checkpoints.

    B batch   T tokens   D width   C channels of x   H = W size of x   p patch size   h attention heads
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Queries, keys and values (B, h, T, D/h) -> the values that the queries read (B, h, T, D/h).
AttentionFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# What a model is told is the time of noise, and of data, by the process that it was trained for (diffusion/).
PROCESS_TIMES = {"ddpm": (999, 0), "sit": (0, 1), "repa": (1, 0)}

#################################################################################
#                     Embeddings of patches, time and class                     #
#################################################################################


class PatchEmbed(nn.Module):
    """Makes a token of each patch: a linear map, written as a convolution."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W) -> (B, T, D), row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Embeds times into vectors: cosines and sines of 128 frequencies, then an MLP."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequency_embedding_size = frequency_embedding_size

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """t: (B,) times, those of ``PROCESS_TIMES`` and what lies between -> (B, D)."""
        half = self.frequency_embedding_size // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t[:, None].float() * frequencies  # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Embeds class labels; label ``num_classes`` is the null label of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        rows = num_classes + (dropout_prob > 0)  # official: no null row without dropout
        self.embedding_table = nn.Embedding(max(rows, 1), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """y: (B,) labels in 0..num_classes -> (B, D). In training, labels are replaced by null with the given rate."""
        if self.training and self.dropout_prob > 0:
            y = torch.where(torch.rand(y.shape, device=y.device) < self.dropout_prob, self.num_classes, y)
        return self.embedding_table(y)


#################################################################################
#                                 Transformer                                   #
#################################################################################


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Adaptive layer norm's affine part: x (B, T, D), shift and scale (B, D), the same for all tokens of a row."""
    return x * (1 + scale[:, None]) + shift[:, None]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention, q: (B, h, T, d), k and v: (B, h, T', d) -> (B, h, T, d).

    Trained on a CPU in bf16, few keys take plain products: the backward pass of PyTorch's fused kernel takes several
    times as long there. The two differ by rounding.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and k.shape[2] <= 256:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention. ``attention_fn`` decides which keys the queries meet; the student passes its own."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, attention_fn: AttentionFn = attend) -> torch.Tensor:
        """x: (B, T, D) tokens -> (B, T, D)."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, h, T, D/h) each
        return self.proj(attention_fn(q, k, v).transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    """Two linear maps with GELU in between."""

    def __init__(self, hidden_size: int, mlp_size: int, in_size: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(in_size or hidden_size, mlp_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, D) -> (B, T, D)."""
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor, attention_fn: AttentionFn = attend) -> torch.Tensor:
        """x: (B, T, D) tokens, c: (B, D) conditioning -> (B, T, D)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), attention_fn)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """The output head: adaptive norm and a linear map to the pixels of each patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x: (B, T, D), c: (B, D) -> (B, T, p * p * out_channels)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer that predicts the noise in x_t, and with ``learn_sigma`` the variance's interpolation.

    That of another ``process`` than ddpm predicts the velocity; what ``learn_sigma`` adds has no meaning then. Raises
    ``ValueError`` where sizes do not divide. ``config`` holds the constructor's arguments, enough to rebuild it.
    """

    checkpoint_activations = False  # True: keep no block's activations for the backward pass but compute them again
    block_type: type[nn.Module] = DiTBlock
    head_type: type[nn.Module] = FinalLayer

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        process: str = "ddpm",
    ):
        super().__init__()
        if process not in PROCESS_TIMES:
            raise ValueError(f"process {process!r} must be one of {', '.join(PROCESS_TIMES)}")
        if input_size % patch_size:
            raise ValueError(f"input size {input_size} is not divisible by patch size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden size {hidden_size} must be divisible by {num_heads} heads and by 4")
        self.config: dict[str, Any] = dict(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
        )
        if process != "ddpm":  # which a config without a process means
            self.config["process"] = process
        self.process = process
        self.input_size, self.patch_size, self.num_classes = input_size, patch_size, num_classes
        self.in_channels, self.out_channels = in_channels, in_channels * 2 if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        tokens = (input_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, hidden_size), requires_grad=False)  # fixed
        self.blocks = nn.ModuleList(self.block_type(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer: Any = self.head_type(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """DiT's recipe: Xavier for linear maps, N(0, 0.02) for embeddings, zero for all adaLN and the output."""
        self.pos_embed.data.copy_(sincos_positions(self.pos_embed.shape[2], self.input_size // self.patch_size))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches: Any = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.flatten(1))  # like a linear map, not a convolution
        nn.init.zeros_(patches.bias)
        small: list[Any] = [self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        for layer in small:
            nn.init.normal_(layer.weight, std=0.02)
        zeroed: list[Any] = [layer for name, layer in self.named_modules() if name.endswith("adaLN_modulation.1")]
        for layer in (*zeroed, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the model's input."""
        return self.in_channels, self.input_size, self.input_size

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, p * p * out_channels) -> (B, out_channels, H, W)."""
        p, side = self.patch_size, self.input_size // self.patch_size
        x = x.view(-1, side, side, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, side * p, side * p)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), t: (B,) times, y: (B,) labels -> (B, 2C, H, W): noise and sigma (C: noise only)."""
        x, c, given = self.embed(x, t, y)
        for block in self.blocks:
            x = self.run_block(block, x, given)
        return self.unpatchify(self.final_layer(x, c))

    def embed(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Tokens to start from (B, T, D), the conditioning on time and class (B, D), and the argument of all blocks."""
        e = self.y_embedder(y)
        c = self.condition(self.t_embedder(t), e)
        return self.embed_tokens(x), c, self.block_condition(c, e)

    def condition(self, t: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """The conditioning of embedded times and classes, (B, D) each or (B, S, D) where they broadcast to that."""
        return t + e

    def block_condition(self, c: torch.Tensor, e: torch.Tensor) -> Any:
        """The argument of all blocks, from the conditioning c (B, D) and the embedded y: c; a text model adds text."""
        return c

    def embed_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W) -> tokens with their positions (B, T, D), contiguous.

        The sum takes the memory layout of its first term. That of the patches is the convolution's, (B, D, T), and
        every block would inherit it, with strided reads all along.
        """
        return self.pos_embed + self.x_embedder(x)

    def features(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        """The tokens after each block, (B, T, D) each: a discriminator's input."""
        x, _, given = self.embed(x, t, y)
        return [x := self.run_block(block, x, given) for block in self.blocks]

    def run_block(self, block: nn.Module, x: torch.Tensor, c: Any, attention_fn: AttentionFn = attend) -> torch.Tensor:
        """A block on tokens (B, T, D) with its conditioning, recomputed in the backward pass if that is wanted."""
        if self.checkpoint_activations:  # nothing in a block is random
            return checkpoint(block, x, c, attention_fn, use_reentrant=False, preserve_rng_state=False)
        return block(x, c, attention_fn)

    def forward_with_cfg(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, cfg_scale: float, cfg_channels: int = 3
    ) -> torch.Tensor:
        """Classifier-free guidance on a doubled batch: the first half has the labels, the second the null label.

        x: (2B, C, H, W), of which the first half is used for both, t and y: (2B,) -> (2B, 2C, H, W). Only the first
        ``cfg_channels`` channels are guided: DiT's published samples used 3 for its 4-channel latents.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        cond, null = out[:, :cfg_channels].chunk(2)
        guided = null + cfg_scale * (cond - null)
        return torch.cat([torch.cat([guided, guided]), out[:, cfg_channels:]], dim=1)


def sincos_positions(hidden_size: int, side: int, scale: float = 1.0) -> torch.Tensor:
    """Fixed sine-cosine positions in two dimensions, over ``scale``: (side * side, D), the column's half of D first."""
    frequencies = 10000 ** -(np.arange(hidden_size // 4, dtype=np.float64) / (hidden_size / 4))
    angles = np.arange(side)[:, None] / scale * frequencies  # (side, D/4)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (side, D/2)
    columns, rows = np.tile(line, (side, 1)), np.repeat(line, side, axis=0)
    return torch.from_numpy(np.concatenate([columns, rows], axis=1)).float()


#################################################################################
#                                   Sizes                                       #
#################################################################################

SIZES: dict[str, dict[str, Any]] = {
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    # For 8x8 digits on a CPU: Micro is the demo's, Nano is for tests.
    "Micro": dict(depth=6, hidden_size=64, num_heads=4),
    "Nano": dict(depth=3, hidden_size=32, num_heads=2),
}

DiT_models = {
    f"DiT-{size}/{patch_size}": partial(DiT, patch_size=patch_size, **shape)
    for size, shape in SIZES.items()
    for patch_size in (2, 4, 8)
}
