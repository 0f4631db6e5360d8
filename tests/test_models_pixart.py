"""PixArt: diffusers' own model with the same weights gives the same numbers; the student of a text model.

Against diffusers: forward, guided ODE, number of parameters. Then counting with captions, the student's sampling,
independence of rows and padding, recomputation, gradients.
"""

import copy
from functools import partial

import pytest
import torch
from text_helpers import random_text_teacher, save_pixart

from costs.flops import count_by_blocks, meta_model, sampling_gflops, training_flops
from diffusion import PROCESSES
from models_ard import ARD, MASKS
from models_pixart import PixArt, PixArt_models, TextARD, model_name
from stores import checkpoints

LENGTHS = (7, 3, 1, 5)


def text(lengths=LENGTHS, channels: int = 12, longest: int = 0, seed: int = 0) -> torch.Tensor:
    """Random captions of these lengths, (B, L, C), padded with zeros."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randn(len(lengths), max(lengths), channels, generator=draw)
    for row, length in zip(y, lengths):
        row[length:] = 0
    return torch.cat([y, y.new_zeros(len(y), max(0, longest - y.shape[1]), channels)], dim=1)


def theirs(model, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What diffusers' model makes of captions, masked where ours are zero; garbage where they are masked."""
    mask = y.any(-1)
    y = torch.where(mask[..., None], y, 3.0)
    pixels = torch.full((len(x), 2), 8.0 * x.shape[-1])
    sizes = {"resolution": pixels, "aspect_ratio": torch.ones(len(x), 1)} if model.use_additional_conditions else None
    if sizes is None:
        sizes = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        return model(x, y, t, sizes, encoder_attention_mask=mask.long(), return_dict=False)[0]


@pytest.mark.parametrize(
    "shape",
    [
        dict(sample_size=8, num_layers=3, num_attention_heads=2, attention_head_dim=16),
        dict(sample_size=12, num_layers=2, num_attention_heads=4, attention_head_dim=8, interpolation_scale=2),
        dict(sample_size=16, num_layers=1, num_attention_heads=1, attention_head_dim=36, interpolation_scale=0.5),
        dict(sample_size=8, num_layers=2, num_attention_heads=3, attention_head_dim=8, patch_size=4),
        dict(sample_size=8, num_layers=2, num_attention_heads=3, attention_head_dim=16, use_additional_conditions=True),
    ],
)
def test_diffusers_model_with_the_same_weights_gives_the_same(tmp_path, shape):
    reference = save_pixart(tmp_path / "transformer", **shape)
    model, config = checkpoints.load_teacher(tmp_path, vae="sdxl")
    assert config["vae"] == "stabilityai/sdxl-vae" and isinstance(model, PixArt)
    x, t = torch.randn(4, 4, shape["sample_size"], shape["sample_size"]), torch.tensor([0, 3, 500, 999])
    y = text()
    with torch.no_grad():
        ours = model(x, t, y)
        padded = model(x, t, text(longest=20))
    wanted = theirs(reference, x, t, y)
    assert wanted.std() > 0.1 and ours.shape == (4, 8, *x.shape[2:])
    assert (ours - wanted).abs().max() < 1e-5
    assert (ours - padded).abs().max() < 1e-6
    other = text(seed=1)
    with torch.no_grad():
        assert (model(x, t, other) - ours).abs().max() > 1e-3  # the text does matter


@pytest.mark.parametrize("steps", [25, 48])
def test_the_guided_ode_is_diffusers_dpm_solver_of_first_order(tmp_path, steps):
    from diffusers import DPMSolverMultistepScheduler

    shape = dict(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=16)
    reference = save_pixart(tmp_path / "transformer", **shape)
    model, _ = checkpoints.load_teacher(tmp_path, vae="sdxl")
    torch.manual_seed(1)
    x, y, null = torch.randn(4, 4, 8, 8), text(), text((1,), longest=7, seed=2)
    ddpm = PROCESSES["ddpm"]
    ours = ddpm.trajectory(model, x, y, steps, 4.5, 4, null)[0][:, -1]

    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="linear", solver_order=1, final_sigmas_type="zero", beta_start=1e-4, beta_end=0.02
    )
    scheduler.set_timesteps(timesteps=ddpm.grid(steps)[:-1])
    both = torch.cat([null.expand(4, -1, -1), y])
    for t in scheduler.timesteps:
        out = theirs(reference, torch.cat([x, x]), t.expand(8), both)[:, :4]
        uncond, cond = out.chunk(2)
        x = scheduler.step(uncond + 4.5 * (cond - uncond), t, x).prev_sample
    assert ((ours - x).norm() / x.norm()) < 1e-6


def test_the_public_teacher_has_610_million_parameters():
    with torch.device("meta"):
        model = PixArt_models["PixArt-XL/2"](input_size=64)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 610_856_096
    assert model_name(model.config) == "PixArt-XL/2"


def test_work_is_counted_with_the_captions_that_are_read():
    student = ARD.from_teacher(random_text_teacher(), steps=3, mask="M4", history_layers=1).config
    teacher, width = random_text_teacher().config, 32
    for config, count in ((student, training_flops), (teacher, partial(sampling_gflops, steps=5))):
        few, many = (count_by_blocks(config, partial(count, text_tokens=tokens)) for tokens in (5, 10))
        assert many == pytest.approx(count(meta_model(config), text_tokens=10), rel=1e-12) and few < many
    # The embedding of a token, and in each of three blocks its keys and values, and the queries of 16 tokens at both.
    token = width * (12 + width) + 3 * (2 * width * width + 2 * 16 * width)
    assert 1e9 * (many - few) == pytest.approx(5 * 2 * 5 * token)  # five steps on two halves, five tokens more


#################################################################################
#                                  The student                                  #
#################################################################################

TEACHER = random_text_teacher()
DEPTH = len(TEACHER.blocks)


def random_student(**options) -> ARD:
    """A student whose heads differ from each other."""
    student = ARD.from_teacher(TEACHER, **options).eval()
    torch.manual_seed(1)
    for parameter in student.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return student


@torch.no_grad()
def test_sampling_fed_through_forward_reproduces_itself():
    torch.manual_seed(2)
    noise, y = torch.randn(4, 4, 8, 8), text()
    for mask in MASKS:
        for layers in (0, 1, DEPTH):
            for steps in (1, 3):
                student = random_student(steps=steps, mask=mask, history_layers=layers)
                assert isinstance(student, TextARD)
                out = student.sample(noise, y)
                again = student(torch.cat([noise[:, None], out[:, :-1]], dim=1), y)
                assert (out - again).abs().max() < 1e-5 * out.abs().max(), (mask, layers, steps)


@torch.no_grad()
def test_rows_are_independent_and_padding_adds_nothing():
    torch.manual_seed(2)
    student, history, y = random_student(steps=3, history_layers=1), torch.randn(4, 3, 4, 8, 8), text()
    out = student(history, y)
    assert (out - student(history, text(longest=11))).abs().max() < 1e-6 * out.abs().max()
    for row in range(4):
        alone = student(history[row : row + 1], y[row : row + 1, : LENGTHS[row]])
        assert (out[row : row + 1] - alone).abs().max() < 1e-6 * out.abs().max()
    moved = student(history, torch.cat([text(seed=3)[:1], y[1:]]))
    assert (moved[0] - out[0]).abs().max() > 1e-3 and torch.equal(moved[1:], out[1:])


@torch.no_grad()
def test_without_history_a_step_is_the_teacher_at_its_time():
    student, y = ARD.from_teacher(TEACHER, steps=3, mask="M1", history_layers=1), text()
    history = torch.randn(4, 3, 4, 8, 8)
    out = student(history, y)
    for k, time in enumerate((999, 666, 333)):
        wanted = TEACHER(history[:, k], torch.full((4,), time), y)[:, :4]
        assert (out[:, k] - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_compiled_and_recomputed_blocks_give_the_same_gradients(quick_compiler):
    from runtime.precision import prepare_blocks

    torch.manual_seed(2)
    history, y = torch.randn(4, 3, 4, 8, 8), text()
    found = []
    for options in ({}, {"checkpoint_activations": True}, {"compile": True}):
        student = random_student(steps=3, history_layers=1)
        prepare_blocks(student, **({"compile": False, "checkpoint_activations": False} | options))
        out = student(history, y)
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad for p in student.parameters() if p.requires_grad)])
    assert quick_compiler() == 2  # with history and without
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert (one - other).abs().max() <= 1e-5 * one.abs().max().clamp(min=1e-3)


def test_all_that_is_trained_has_a_gradient_and_copies_rebuild_it(tmp_path):
    student = random_student(steps=3, history_layers=1)
    student(torch.randn(4, 3, 4, 8, 8), text()).square().mean().backward()
    without = [name for name, p in student.named_parameters() if p.requires_grad and not p.grad.any()]
    assert not without
    config = {"kind": "student", "model": student.config, "vae": None, "provenance": {}, "training": {}}
    checkpoints.save(tmp_path / "s.pt", {"config": config, "step": 1, "ema": student.state_dict()})
    again, _ = checkpoints.load_student(tmp_path / "s.pt")
    assert isinstance(again, TextARD) and again.config == student.config
    assert copy.deepcopy(again).y_embedder.y_proj.fc1.weight.equal(student.y_embedder.y_proj.fc1.weight)
