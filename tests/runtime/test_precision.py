"""Means of speed change no result: compiled blocks, recomputed activations."""

import copy
import re

import pytest
import torch
from helpers import random_teacher

from models_ard import ARD
from runtime.precision import CUDAGraph, autocast, compile_each, prepare_blocks


def student(mask: str = "M4") -> ARD:
    return ARD.from_teacher(random_teacher(), mask=mask, history_layers=2)


def gradients(model: ARD, batch: int = 3) -> list[torch.Tensor]:
    """Predictions and all gradients of a fixed loss."""
    torch.manual_seed(0)
    model.zero_grad()
    predictions = model(torch.randn(batch, model.steps, 1, 8, 8), torch.arange(batch))
    predictions.square().mean().backward()
    return [predictions.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_recomputed_activations_give_the_same_gradients():
    plain = student()
    saving = copy.deepcopy(plain)
    prepare_blocks(saving, compile=False, checkpoint_activations=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        wanted, few = gradients(plain), len(kept)
        found = gradients(saving)
    assert len(kept) - few < few / 2
    assert len(wanted) == len(found) and all(torch.equal(a, b) for a, b in zip(wanted, found))


def test_compiled_blocks_give_the_same_gradients_without_recompiling(quick_compiler):
    plain = student()
    compiled = copy.deepcopy(plain)
    compile_each(compiled.blocks)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert copy.deepcopy(compiled).blocks[0]._compiled_call_impl is None  # as the EMA is made
    wanted = gradients(plain)
    gradients(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for a, b in zip(wanted, gradients(compiled), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert quick_compiler() == 2  # blocks with history and without


@torch.no_grad()
@pytest.mark.parametrize("mask", ["M2", "M4"])
def test_compiled_sampling_is_the_same(mask, quick_compiler):
    plain = student(mask)
    compiled = copy.deepcopy(plain)
    compile_each(compiled.blocks)
    noise, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    compiled.sample(noise, y)
    assert quick_compiler() >= 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled.sample(noise, y), plain.sample(noise, y), rtol=0, atol=1e-6)


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(capsys):
    """With a GPU, because the function waits for it; without one, because there is none."""
    x = torch.ones(3, device="cuda" if torch.cuda.is_available() else "cpu")
    draw = CUDAGraph(lambda x: x * x.sum().item(), torch.device("cuda"))
    assert draw(x).tolist() == draw(x).tolist() == [3, 3, 3]
    assert re.fullmatch(r"--cuda-graph: nothing is recorded, .* \(.+\)\n", capsys.readouterr().err)


def test_autocast_computes_products_in_bf16_and_fp32_as_they_are():
    x = torch.randn(4, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(precision, torch.device("cpu")):
            assert (x @ x).dtype == dtype
