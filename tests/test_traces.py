"""Means of speed, seen in traces: memory layouts, graphs, generated code. No clock is read here.

Layouts and graphs of blocks in training; compiled heads and cache; casts against autocast.
Traces are PyTorch's own: dynamo's counters, generated code, the profiler.
"""

import copy
import re
from functools import partial

import pytest
import torch
from helpers import random_teacher
from torch import distributed as dist
from torch._inductor.utils import run_and_get_code

from diffusion.teacher_ode import TeacherODE
from discriminator import Discriminator, FrozenFeatures
from models import DiT, DiTBlock, attend
from models_ard import ARD, MASKS, KVCache, TeacherForcedAttention
from runtime.distributed import DistributedContext, wrapped
from runtime.precision import CUDAGraph, autocast, cast_weights, compile_each, inference_copy

CPU = torch.device("cpu")
NOISE, Y = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 4])


def student(**options) -> ARD:
    return ARD.from_teacher(random_teacher(), **({"history_layers": 2} | options)).eval()


#################################################################################
#                                   Layouts                                     #
#################################################################################


@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_lie_one_after_another_before_and_after_every_block(compiled, quick_compiler):
    seen = []

    def look(block, inputs, output) -> None:
        seen.extend([inputs[0].is_contiguous(), output.is_contiguous()])

    teacher, ard = random_teacher(), student(level_embedding=True)
    for model in (teacher, ard):
        if compiled:
            compile_each(model.blocks)
        for block in model.blocks:
            block.register_forward_hook(look)
    teacher(NOISE, torch.tensor([5, 6]), Y)
    ard(torch.randn(2, 4, 1, 8, 8), Y).sum().backward()
    ard.sample(NOISE, Y)
    assert len(seen) == 2 * 3 * (1 + 1 + 4) and all(seen)


#################################################################################
#                                    Graphs                                     #
#################################################################################


@pytest.fixture
def alone():
    """A process group of this process only, so that DDP is the real one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("cut_by_ddp", [False, True])
def test_a_block_in_ddp_is_one_graph_at_the_papers_width(cut_by_ddp, alone, monkeypatch):
    """Dynamo's own optimiser for DDP would cut a block of this width into three graphs: 6 instead of 2."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    teacher = DiT(input_size=4, depth=3, num_classes=10)  # DiT-XL/2's width and heads
    model = ARD.from_teacher(teacher, history_layers=2)
    compile_each(model.blocks)
    in_ddp = wrapped(model, DistributedContext(world_size=2))
    with torch._dynamo.config.patch(optimize_ddp=cut_by_ddp or torch._dynamo.config.optimize_ddp):
        in_ddp(torch.randn(1, 4, 4, 4, 4), torch.tensor([3])).sum().backward()
    assert len(graphs) == (6 if cut_by_ddp else 2)  # blocks with history and without


def test_buffers_that_never_change_are_not_sent(alone):
    assert not wrapped(student(), DistributedContext(world_size=2)).broadcast_buffers
    heads = Discriminator(depth=1, in_width=8)  # whose power iteration moves its buffers
    assert wrapped(heads, DistributedContext(world_size=2)).broadcast_buffers


def test_no_stage_compiles_again_once_it_has_run(quick_compiler):
    teacher, ard = random_teacher(), student()
    heads = Discriminator(3, 32, group=2)
    for model in (teacher, ard):
        compile_each(model.blocks)
    compile_each(heads.heads)
    ode, features = TeacherODE(teacher, solver_steps=3), FrozenFeatures(teacher)

    def all_stages() -> None:
        ode(NOISE, Y)
        ard(torch.randn(2, 4, 1, 8, 8), Y).square().mean().backward()
        with torch.no_grad():
            ard.sample(NOISE, Y)
            judged = [features(x, Y) for x in (NOISE, NOISE + 1)]
        x = NOISE.clone().requires_grad_()
        heads.eval()(features(x, Y))[0].sum().backward()
        sum(logits.square().mean() for logits in heads.train()(*judged)).backward()

    all_stages()
    with torch._dynamo.config.patch(error_on_recompile=True):
        all_stages()


def test_compiled_heads_give_the_gradients_and_iterations_of_plain_ones(quick_compiler):
    torch.manual_seed(0)
    plain = Discriminator(3, 32, group=2)
    compiled = copy.deepcopy(plain)
    compile_each(compiled.heads)
    batches = [([torch.randn(4, 5, 32) for _ in range(3)], torch.randn(4, 32)) for _ in range(2)]
    for heads in (plain, compiled):
        fake, real = heads(*batches)
        (fake.mean() - real.square().mean()).backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)
    for a, b in zip(plain.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


#################################################################################
#                                Generated code                                 #
#################################################################################


@torch.no_grad()
@pytest.mark.parametrize("mask", MASKS)
def test_compiled_code_writes_the_cache_in_place(mask):
    torch._dynamo.reset()
    steps, shape = 4, (3, 2, 16, 8)  # (B, h, T, d)
    plain, compiled = KVCache(mask, steps), KVCache(mask, steps)
    step = torch.compile(lambda q, k, v: compiled(q, k, v), fullgraph=True, dynamic=False)
    for i in range(steps):
        q, k, v = torch.randn(3, *shape)
        wanted = plain(q, k, v)
        found, codes = run_and_get_code(step, q, k, v)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        if i == 0:
            continue  # which makes the cache
        made = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", "".join(codes))
        sizes = [torch.Size(map(int, size.split(", "))).numel() for size in made if size.strip(", ")]
        assert sizes and max(sizes) <= 2 * q.numel() < compiled.kv.numel() or max(compiled.slots) == 0


@torch.no_grad()
@pytest.mark.parametrize("level_embedding", [False, True])
def test_weights_cast_once_give_what_autocast_gives_to_the_bit(level_embedding):
    ard, teacher = student(level_embedding=level_embedding), random_teacher()
    with autocast("bf16", CPU):
        wanted = ard.sample(NOISE, Y), *TeacherODE(teacher, solver_steps=5)(NOISE, Y)
        cast = inference_copy(ard, "bf16")
        cast_weights(teacher, "bf16")
        found = cast.sample(NOISE, Y), *TeacherODE(teacher, solver_steps=5)(NOISE, Y)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert cast.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16 and cast.pos_embed.dtype == torch.float32
    assert {p.dtype for p in ard.parameters()} == {torch.float32} and inference_copy(ard, "fp32") is ard


def test_gradients_through_a_frozen_teacher_with_cast_weights_are_those_of_autocast():
    teacher = random_teacher()
    gradients = []
    for precision in ("fp32", "bf16"):  # of the weights; autocast is on in both
        cast_weights(teacher, precision)
        x = NOISE.clone().requires_grad_()
        with autocast("bf16", CPU):
            features, _ = FrozenFeatures(teacher)(x, Y)
            sum(tokens.float().square().mean() for tokens in features).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_the_power_iteration_stays_float32_under_autocast():
    torch.manual_seed(0)
    plain = Discriminator(2, 16, group=2)
    under = copy.deepcopy(plain)
    batch = [torch.randn(4, 5, 16) for _ in range(2)], torch.randn(4, 16)
    plain(batch)
    with autocast("bf16", CPU):
        under(batch)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, under.state_dict()[name]), name


def test_a_graph_falls_back_where_there_is_no_gpu():
    ard = student()
    recorded = CUDAGraph(lambda noise, y: ard.sample(noise, y), CPU)
    with torch.no_grad():
        assert torch.equal(recorded(NOISE, Y), ard.sample(NOISE, Y)) and recorded.graph is None


def test_attention_functions_are_what_the_blocks_are_given():
    """The names above are those that training and sampling really use."""
    used = set()
    ard = student()
    for block in ard.blocks:
        block.attn.register_forward_pre_hook(lambda attention, inputs: used.add(inputs[1]))
    ard(torch.randn(2, 4, 1, 8, 8), Y)
    ard.sample(NOISE, Y)
    used.remove(attend)
    assert {type(each) for each in used} == {TeacherForcedAttention, KVCache}
    assert all(isinstance(block, DiTBlock) for block in ard.blocks)
