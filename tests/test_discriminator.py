"""The discriminator: what its heads look at, the network that a head is, norms that do not mix groups."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal, random_teacher
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import PROCESSES
from discriminator import Discriminator, DiscriminatorHead, FrozenFeatures, GhostBatchNorm, kernels_of
from models import DiT


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 13), group=st.integers(1, 6), tokens=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_ghost_norm_equals_batch_norm_of_each_group(batch, group, tokens, seed):
    x = torch.randn(batch, 3, tokens, generator=torch.Generator().manual_seed(seed))
    norm = GhostBatchNorm(3, group)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    wanted = []
    for part in x.double().split(group):
        mean = part.mean(dim=(0, 2), keepdim=True)
        part = (part - mean) / ((part - mean).square().mean(dim=(0, 2), keepdim=True) + 1e-5).sqrt()
        wanted.append(part * norm.weight[:, None] + norm.bias[:, None])
    torch.testing.assert_close(norm(x), torch.cat(wanted).float(), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(whole_groups=st.integers(1, 3), rest=st.integers(0, 7), group=st.integers(1, 4), tokens=st.integers(1, 5))
def test_a_batch_split_at_the_borders_of_groups_gives_the_same_numbers(whole_groups, rest, group, tokens):
    x = torch.randn(whole_groups * group + rest, 3, tokens)
    norm, border = GhostBatchNorm(3, group), whole_groups * group
    parts = [norm(part) for part in (x[:border], x[border:]) if len(part)]
    torch.testing.assert_close(norm(x), torch.cat(parts), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 4, 16])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_head_has_a_logit_for_every_token_on_a_ring(batch, tokens):
    head = DiscriminatorHead(in_width=12, width=20, group=4).eval()
    x, label = torch.randn(batch, tokens, 12), torch.randn(batch, 12)
    logits = head(x, label)
    assert logits.shape == (batch, tokens) and logits.isfinite().all()
    torch.testing.assert_close(head(x.roll(1, dims=1), label), logits.roll(1, dims=1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_head_is_the_network_that_is_described():
    head = DiscriminatorHead(in_width=6, width=8, group=3).eval()
    x, label = torch.randn(3, 10, 6), torch.randn(3, 6)

    def conv(layer, h):  # kernels with the largest singular value 1, tokens on a ring
        weight, reach = layer.parametrizations.weight.original, layer.kernel_size[0] // 2
        weight = weight / torch.linalg.matrix_norm(weight.flatten(1), ord=2)
        return F.conv1d(F.pad(h, (reach, reach), mode="circular"), weight, layer.bias)

    def norm(h):
        var, mean = torch.var_mean(h, dim=(0, 2), correction=0, keepdim=True)
        return F.leaky_relu((h - mean) / (var + 1e-5).sqrt(), 0.2)

    for _ in range(200):  # the power iteration, until its estimate of the singular value is exact
        head.train()(x, label)
    h = norm(conv(head.enter.conv, x.mT))
    h = (h + norm(conv(head.residual.conv, h))) / math.sqrt(2)
    wanted = torch.einsum("bwt,bw->bt", conv(head.leave, h), head.classes(label)) / math.sqrt(64)
    torch.testing.assert_close(head.eval()(x, label), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_all_heads_spectral_norms_together_are_torchs_of_each_to_the_bit(training):
    """Kernels, the vectors of the power iteration, and gradients; torch's hang on the convolutions themselves."""
    heads = Discriminator(depth=3, in_width=20, width=64, group=2).heads.train(mode=training)
    alone, draw = copy.deepcopy(heads), torch.Generator().manual_seed(0)
    each = [(head.enter.conv.weight, head.residual.conv.weight, head.leave.weight) for head in alone]
    for mine, theirs in zip(kernels_of(heads), each, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one, other)
            grad = torch.randn(one.shape, generator=draw)
            one.backward(grad, retain_graph=True), other.backward(grad)
    assert_equal(dict(heads.state_dict()), dict(alone.state_dict()))
    gradients = [
        {name: p.grad for name, p in own.named_parameters() if "weight.original" in name} for own in (heads, alone)
    ]
    assert len(gradients[0]) == 9 and gradients[0]["2.leave.parametrizations.weight.original"] is not None
    assert_equal(*gradients)


@torch.no_grad()
def test_batches_do_not_mix_and_one_call_is_one_power_iteration():
    features = [([torch.randn(n, 4, 8) for _ in range(3)], torch.randn(n, 8)) for n in (5, 2)]
    heads = Discriminator(depth=3, in_width=8, group=2)
    alone = copy.deepcopy(heads)
    for one, both in zip((alone(features[0])[0], alone.eval()(features[1])[0]), heads(*features)):
        assert one.shape == (len(one), 3, 4)
        torch.testing.assert_close(one, both)
    before = copy.deepcopy(heads.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in alone.state_dict().items())
    heads(*features)
    moved = {name for name, value in heads.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.endswith(("_u", "_v")) for name in moved)


@torch.no_grad()
def test_features_are_the_tokens_that_the_teacher_goes_through():
    teacher, x, y = random_teacher(), torch.randn(2, 1, 8, 8), torch.tensor([3, 10])
    features, label = FrozenFeatures(teacher)(x, y)
    zero = torch.zeros(2, dtype=torch.int64)
    end = teacher.final_layer(features[-1], teacher.t_embedder(zero) + teacher.y_embedder(y))
    assert len(features) == len(teacher.blocks)
    torch.testing.assert_close(teacher.unpatchify(end), teacher(x, zero, y))
    torch.testing.assert_close(label.square().mean(1), torch.ones(2), rtol=0, atol=1e-2)
    eps, t = torch.randn_like(x), torch.full((2,), 300)
    noisy = PROCESSES["ddpm"].q_sample(x, t, eps)
    torch.testing.assert_close(FrozenFeatures(teacher, 300)(x, y, eps)[0], teacher.features(noisy, t, y))
    for process, t in (("sit", 0.7), ("repa", 0.3)):  # three tenths of noise in all of them
        flow = random_teacher(process=process)
        noisy = 0.7 * x + 0.3 * eps
        wanted = flow.features(noisy, torch.full((2,), t), y)
        torch.testing.assert_close(FrozenFeatures(flow, 300)(x, y, eps)[0], wanted)
        clean = flow.features(x, torch.full((2,), {"sit": 1.0, "repa": 0.0}[process]), y)
        torch.testing.assert_close(FrozenFeatures(flow)(x, y)[0], clean)
    bare = DiT(input_size=4, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=0, class_dropout_prob=0)
    features, label = FrozenFeatures(bare)(torch.randn(3, 2, 4, 4), torch.zeros(3, dtype=torch.int64))
    assert Discriminator(2, 16)((features, label))[0].shape == (3, 2, 4)
