"""The student as it is usually written, to compare with: one long sequence under a mask, adaLN for each token."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from models import AttentionFn
from models_ard import ARD, TeacherForcedAttention, visible_steps


@cache
def dense_mask(mask: str, steps: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Which of S * T tokens sees which, (S * T, S * T); on the device once, not at each call."""
    seen = torch.zeros(steps, steps, dtype=torch.bool)
    for step in range(steps):
        seen[step, visible_steps(mask, step)] = True
    return seen.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(device)


def of_rows(attend: AttentionFn, length: int) -> AttentionFn:
    """Attention within sequences of this length, for blocks in which each token is a row, (B * length, h, 1, d)."""

    def attention(*qkv: torch.Tensor) -> torch.Tensor:
        out = attend(*(x.squeeze(2).unflatten(0, (-1, length)).transpose(1, 2) for x in qkv))  # (B, h, length, d)
        return out.transpose(1, 2).flatten(0, 1)[:, :, None]

    return attention


def masked(mask: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Attention under a mask (L, L)."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class DenseARD(ARD):
    """Weights and results of ``ARD``. Sampling keeps the cache; without history, points stay apart in training too."""

    def run_blocks(
        self, x: torch.Tensor, c: Any, level: torch.Tensor | None, attention_fns: Sequence[AttentionFn]
    ) -> torch.Tensor:
        """As ``ARD.run_blocks``, each token with a row of its own, so that it is modulated by itself."""
        x = self.embed_tokens(x) if level is None else self.embed_tokens(x) + level
        points, tokens, _ = x.shape
        length, within = tokens, F.scaled_dot_product_attention
        if attention_fns and isinstance(attention_fns[0], TeacherForcedAttention):
            length = self.steps * tokens
            attention_fns = [masked(dense_mask(self.mask, self.steps, tokens, x.device))] * self.history_layers
            within = masked(dense_mask("M1", self.steps, tokens, x.device))
        x, c = x.flatten(0, 1)[:, None], c.repeat_interleave(tokens, 0)
        for i, block in enumerate(self.blocks):
            attend = attention_fns[i] if i < self.history_layers else within
            x = self.run_block(block, x, c, of_rows(attend, length))
        return x.view(points, tokens, -1)
