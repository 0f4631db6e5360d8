"""The teacher equals the official DiT code on the same weights and inputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN

from models import DiT_models, attend


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_forward_equals_the_official_code(official_model, official):
    close(official_model(official["x"], official["t"], official["y"]), official["out/forward"])


@torch.no_grad()
def test_guidance_equals_the_official_code(official_model, official):
    x, t, y = (official[k] for k in "xty")
    doubled = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 10)]))
    close(official_model.forward_with_cfg(*doubled, 1.5), official["out/cfg"])


def test_xl2_has_the_official_names_and_shapes():
    with torch.device("meta"):
        ours = {k: tuple(v.shape) for k, v in DiT_models["DiT-XL/2"]().state_dict().items()}
    official = dict(line.split(" ", 1) for line in (GOLDEN / "dit_xl2_state_dict.txt").read_text().splitlines())
    assert {k: str(v) for k, v in ours.items()} == official
    assert sum(int(np.prod(shape)) for shape in ours.values()) == 675_129_632


@pytest.mark.parametrize("side, tokens", [(32, 256), (64, 1024)])
def test_xl2_reads_latents_of_both_resolutions(side, tokens):
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"](input_size=side).to("meta")  # its positions come from numpy
        x, y = torch.empty(2, 4, side, side), torch.empty(2, dtype=torch.int64)
        out = model(x, torch.empty(2), y)
    assert model.pos_embed.shape == (1, tokens, 1152) and out.shape == (2, 8, side, side)


@pytest.mark.parametrize("keys", [16, 48, 300])
def test_attention_in_training_equals_the_fused_kernel(keys):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, count, 8) for count in (16, keys, keys))
    exact = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend(q, k, v), exact)
    half = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    plain, fused = (
        torch.autograd.grad((out := f(*half)).sum(), half) + (out,) for f in (attend, F.scaled_dot_product_attention)
    )
    for ours, theirs in zip(plain, fused, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0.02)
    torch.testing.assert_close(plain[-1].float(), exact, atol=0.02, rtol=0.02)
