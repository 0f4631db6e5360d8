"""The student: cached sampling equals the teacher-forced forward, which equals plain masked attention.

Sampling against the forward, the forward against a dense mask written here; how a student starts from its teacher.
Then masks and cache, given predictions, batch sizes, refusals, gradients.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import random_teacher
from hypothesis import given, settings
from hypothesis import strategies as st

from models import DiT
from models_ard import (
    ARD,
    MASKS,
    STUDENTS,
    KVCache,
    TeacherForcedAttention,
    cache_slots,
    default_history,
    visible_steps,
)

TEACHER = random_teacher(std=0.1, input_size=4, in_channels=2, num_classes=5)
DEPTH = len(TEACHER.blocks)


def random_student(**options) -> ARD:
    """A student whose heads differ from each other."""
    student = ARD.from_teacher(TEACHER, **options).eval()
    torch.manual_seed(1)
    for parameter in [*student.heads.parameters(), *([student.level] if student.level is not None else [])]:
        torch.nn.init.normal_(parameter, std=0.1)
    return student


def inputs(batch: int = 3):
    torch.manual_seed(2)
    return torch.randn(batch, 2, 4, 4), torch.arange(batch) % 5


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("history_layers", [0, 2, DEPTH])
@pytest.mark.parametrize("mask", MASKS)
def test_sampling_fed_through_forward_reproduces_itself(mask, history_layers, steps):
    student = random_student(steps=steps, mask=mask, history_layers=history_layers, level_embedding=True)
    noise, y = inputs()
    predictions = student.sample(noise, y)
    history = torch.cat([noise[:, None], predictions[:, :-1]], dim=1)
    torch.testing.assert_close(student(history, y), predictions, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mask", MASKS)
def test_forward_equals_attention_under_a_dense_mask(mask, monkeypatch):
    """The definition, written out: one long sequence, one boolean mask, conditioning repeated for each token."""
    steps, tokens = 4, 4
    student = random_student(steps=steps, mask=mask, history_layers=2)
    noise, y = inputs()
    history = torch.randn(len(noise), steps, 2, 4, 4)
    dense = torch.zeros(steps * tokens, steps * tokens, dtype=torch.bool)
    for k in range(steps):
        for seen in visible_steps(mask, k):
            dense[k * tokens : (k + 1) * tokens, seen * tokens : (seen + 1) * tokens] = True

    class Masked:
        def __init__(self, *_):
            pass

        def __call__(self, q, k, v):
            q, k, v = (x.unflatten(0, (-1, steps)).transpose(1, 2).flatten(2, 3) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
            return out.unflatten(2, (steps, tokens)).transpose(1, 2).flatten(0, 1)

    ours = student(history, y)
    monkeypatch.setattr("models_ard.TeacherForcedAttention", Masked)
    torch.testing.assert_close(ours, student(history, y), rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_step_student_is_the_teacher_at_the_last_time():
    noise, y = inputs()
    student = ARD.from_teacher(TEACHER, steps=1, history_layers=0)
    wanted = TEACHER(noise, torch.full_like(y, 999), y)[:, :2]
    torch.testing.assert_close(student.sample(noise, y)[:, 0], wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(student(noise[:, None], y)[:, 0], wanted, rtol=0, atol=1e-6)


def test_every_head_starts_as_the_teachers_and_labels_are_kept():
    student = ARD.from_teacher(TEACHER, steps=4, history_layers=2).train()
    for head in student.heads:
        for name, value in TEACHER.final_layer.state_dict().items():
            assert torch.equal(head.state_dict()[name], value)
    _, y = inputs(64)
    assert torch.equal(student.y_embedder(y), student.y_embedder(y))
    rebuilt = ARD(**student.config)
    rebuilt.load_state_dict(student.state_dict())


def test_what_the_four_masks_show():
    assert [visible_steps("M1", k) for k in range(4)] == [[0], [1], [2], [3]]
    assert [visible_steps("M2", k) for k in range(4)] == [[0], [0, 1], [1, 2], [2, 3]]
    assert [visible_steps("M3", k) for k in range(4)] == [[0], [0, 1], [0, 2], [0, 3]]
    assert [visible_steps("M4", k) for k in range(4)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


@given(mask=st.sampled_from(MASKS), steps=st.integers(1, 12))
def test_cache_holds_what_a_step_sees_and_no_more(mask, steps):
    owners = {}
    for step, slot in enumerate(cache_slots(mask, steps)):
        owners[slot] = step
        assert sorted(owners.values()) == visible_steps(mask, step)
        assert sorted(owners) == list(range(len(owners)))


def test_a_mask_that_the_cache_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr("models_ard.visible_steps", lambda mask, step: [step] if step < 2 else [0, step])
    with pytest.raises(ValueError, match=r"mask M9 cannot be cached: step 1 would see the points \[0, 1\]"):
        cache_slots("M9", 3)


@settings(max_examples=25, deadline=None)
@given(mask=st.sampled_from(MASKS), steps=st.integers(1, 6), batch=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_cached_attention_equals_teacher_forced_attention(mask, steps, batch, seed):
    q, k, v = torch.randn(3, batch, steps, 2, 3, 8, generator=torch.Generator().manual_seed(seed))
    together = TeacherForcedAttention(mask, steps)(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, (batch, steps))
    cache = KVCache(mask, steps)
    for i in range(steps):
        torch.testing.assert_close(cache(q[:, i], k[:, i], v[:, i]), together[:, i], rtol=0, atol=1e-6)


@torch.no_grad()
def test_no_history_makes_all_masks_equal():
    noise, y = inputs()
    samples = [random_student(mask=mask, history_layers=0).sample(noise, y) for mask in MASKS]
    for sample in samples[1:]:
        assert torch.equal(sample, samples[0])


@torch.no_grad()
def test_given_predictions_replace_the_students_own():
    student = random_student(history_layers=2)
    noise, y = inputs()
    own = student.sample(noise, y)
    source = torch.randn_like(noise)
    edited = student.sample(noise, y, given={0: source})
    assert torch.equal(edited[:, 0], source) and not torch.allclose(edited[:, 1:], own[:, 1:])
    torch.testing.assert_close(student.sample(noise, y, given={1: own[:, 1]}), own)


@torch.no_grad()
@pytest.mark.parametrize("mask", MASKS)
def test_sampling_with_a_given_history_is_teacher_forcing(mask):
    student = random_student(history_layers=2, mask=mask, level_embedding=True)
    noise, y = inputs()
    points = torch.randn(3, *noise.shape)
    forced = student(torch.stack([noise, *points], dim=1), y)
    for k in range(student.steps):
        predictions = student.sample(noise, y, dict(enumerate(points[:k])))
        assert torch.equal(predictions[:, :k], points[:k].transpose(0, 1))
        torch.testing.assert_close(predictions[:, k], forced[:, k], rtol=0, atol=1e-5)
    assert torch.equal(student.sample(noise, y, {}), student.sample(noise, y))


@torch.no_grad()
def test_samples_do_not_depend_on_the_batch_size():
    student = random_student(history_layers=2)
    noise, y = inputs(7)
    apart = torch.cat([student.sample(noise[i : i + 1], y[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(student.sample(noise, y), apart, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(mask="M5"), dict(history_layers=DEPTH + 1)])
def test_impossible_students_are_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        ARD.from_teacher(TEACHER, **(dict(history_layers=0) | wrong))


def test_history_without_a_number_is_the_papers_share_of_the_depth():
    assert [default_history(depth) for depth in (1, 3, 6, 12, 24, 28)] == [1, 1, 1, 3, 5, 6]
    assert ARD.from_teacher(TEACHER).config["history_layers"] == default_history(DEPTH) == 1


class Variant(DiT):
    """A teacher whose changes a student on plain DiT would not have."""


@pytest.mark.parametrize("teacher", [Variant(**TEACHER.config), torch.nn.Linear(2, 2)])
def test_a_teacher_without_a_student_of_its_own_is_refused_and_taken_once_it_has_one(teacher, monkeypatch):
    with pytest.raises(
        TypeError, match=rf"a teacher of class {type(teacher).__name__}, only for DiT.*; add one to STUDENTS"
    ):
        ARD.from_teacher(teacher, history_layers=2)
    if isinstance(teacher, Variant):
        monkeypatch.setitem(STUDENTS, Variant, type("VariantARD", (ARD, Variant), {}))
        assert isinstance(ARD.from_teacher(teacher, history_layers=2), Variant)


def rows_without_gradient(student: ARD, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which rows of which parameters cannot matter to a loss of predictions for labels y (B,): name -> (rows,) bool."""
    labels = torch.arange(len(student.y_embedder.embedding_table.weight))
    outputs = torch.arange(student.heads[0].linear.out_features)
    sigma = outputs % student.out_channels >= student.in_channels  # the half that no prediction holds
    dead = {"y_embedder.embedding_table.weight": ~torch.isin(labels, y)}
    for step in range(student.steps):
        dead |= {f"heads.{step}.linear.{kind}": sigma for kind in ("weight", "bias")}
    for i, block in enumerate(student.blocks):  # a bias of all keys moves all logits of a query alike
        parts = torch.arange(3).repeat_interleave(block.attn.proj.in_features)
        dead[f"blocks.{i}.attn.qkv.bias"] = parts == 1
    return dead


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_reach_all_that_can_matter_and_nothing_else(mask):
    student = random_student(history_layers=2, mask=mask, level_embedding=True).double()
    _, y = inputs()
    student(torch.randn(3, 4, 2, 4, 4, dtype=torch.float64), y).square().mean().backward()
    dead, trained = rows_without_gradient(student, y), {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert dead.keys() <= trained.keys()
    for name, parameter in trained.items():
        reached = parameter.grad.flatten(1).norm(dim=1) if parameter.ndim > 1 else parameter.grad.abs()
        cannot = dead.get(name, torch.zeros(len(reached), dtype=torch.bool))
        assert reached[cannot].le(1e-15).all() and reached[~cannot].gt(1e-10).all(), name


def test_changing_a_student_leaves_its_teacher_alone():
    teacher = copy.deepcopy(TEACHER)
    student = ARD.from_teacher(teacher, history_layers=1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), TEACHER.state_dict().values()))
    assert type(teacher) is DiT and teacher.config == TEACHER.config
