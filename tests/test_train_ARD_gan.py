"""ARD (R+D): the discriminator, one step against a hand-written one, ranks, resuming, the command line."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, call, random_teacher, save_teacher, spawn
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion import create_diffusion
from discriminator import Discriminator, DiscriminatorHead, FrozenFeatures, GhostBatchNorm
from losses import AdversarialLosses, adaptive_weight, generator_losses, hinge_losses, own_history
from models import DiT, DiT_models
from models_ard import ARD
from runtime.randomness import Shuffle, noise
from stores import checkpoints
from stores.images import DigitImages, from_uint8
from stores.trajectories import TrajectoryStore

#################################################################################
#                                The discriminator                              #
#################################################################################


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 13), group=st.integers(1, 6), tokens=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_local_norm_equals_batch_norm_of_each_group(batch, group, tokens, seed):
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
    noisy = create_diffusion().q_sample(x, t, eps)
    torch.testing.assert_close(FrozenFeatures(teacher, 300)(x, y, eps)[0], teacher.features(noisy, t, y))
    bare = DiT(input_size=4, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=0, class_dropout_prob=0)
    features, label = FrozenFeatures(bare)(torch.randn(3, 2, 4, 4), torch.zeros(3, dtype=torch.int64))
    assert Discriminator(2, 16)((features, label))[0].shape == (3, 2, 4)


def test_losses_are_the_hinge_and_the_weight_is_clamped():
    fake, real = torch.tensor([[[-3.0, 0.5]]]), torch.tensor([[[2.0, 0.0]]])
    assert hinge_losses(fake, real).tolist() == [0.75 + 0.5] and generator_losses(fake).tolist() == [1.25]
    norms = torch.tensor([[2.0, 1.0], [1e9, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(adaptive_weight(*norms.T), torch.tensor([2 / (1 + 1e-4), 1e4, 0.0]))


#################################################################################
#                                   The step                                    #
#################################################################################


def make_losses(rollout: bool = False, seed: int = 0):
    """A student that has moved away from its teacher, heads, and a batch of 4."""
    teacher = random_teacher()
    student = ARD.from_teacher(teacher, steps=3, history_layers=2).eval()
    torch.manual_seed(seed)
    for parameter in student.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    heads = Discriminator(len(teacher.blocks), 32, group=2)
    batch = {"trajectory": torch.randn(4, 4, 1, 8, 8), "y": torch.arange(4), "real": torch.randn(4, 1, 8, 8)}
    batch["real_y"] = torch.arange(4, 8)
    if rollout:
        batch["rollout"] = own_history(student, batch["trajectory"][:, 0], batch["y"])
    losses = AdversarialLosses(student, heads, FrozenFeatures(teacher), samples=4)
    return losses, teacher, student, heads, batch


@pytest.mark.parametrize("rollout", [False, True])
def test_the_students_gradient_is_that_of_both_losses_walked_back_apart(rollout):
    losses, teacher, student, heads, batch = make_losses(rollout)
    state = copy.deepcopy(heads.state_dict())
    out, fake = losses.student_losses(batch, gan_weight=10.0)
    out["loss"].mean().backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    predictions = student(batch["trajectory"][:, :-1], batch["y"])
    regression = F.mse_loss(predictions, batch["trajectory"][:, 1:])
    last = student(batch["rollout"], batch["y"])[:, -1] if rollout else predictions[:, -1]
    adversarial = -heads.eval()(FrozenFeatures(teacher)(last, batch["y"]))[0].mean()
    grads = [torch.autograd.grad(loss, list(student.parameters())[1:], retain_graph=True, allow_unused=True)
             for loss in (regression, adversarial)]  # [0] is the fixed table of positions  # fmt: skip
    names = [name for name, _ in student.named_parameters()][1:]
    at = names.index(f"heads.{student.steps - 1}.linear.weight")
    weight = 10 * grads[0][at].norm() / (grads[1][at].norm() + 1e-4)
    for name, r, d in zip(names, *grads):
        wanted = (0 if r is None else r) + weight * (0 if d is None else d)
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(out["loss"].mean(), regression + weight * adversarial, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["gan_weight"][0], weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fake, last)
    assert all(torch.equal(value, state[name]) for name, value in heads.state_dict().items())  # no power iteration


def test_rollout_judges_what_sampling_would_draw():
    losses, _, student, _, batch = make_losses(rollout=True)
    _, fake = losses.student_losses(batch, gan_weight=1.0)
    sample = student.sample(batch["trajectory"][:, 0], batch["y"])[:, -1]
    torch.testing.assert_close(fake, sample, rtol=1e-4, atol=1e-5)


def test_training_leaves_the_teacher_alone():
    losses, teacher, student, heads, batch = make_losses()
    before = copy.deepcopy(teacher.state_dict())
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2) for module in (student, heads)]
    for _ in range(3):
        out, fake = losses.student_losses(batch, gan_weight=10.0)
        out["loss"].mean().backward()
        losses.discriminator_losses(batch | {"fake": fake})["loss"].mean().backward()
        for optimizer in optimizers:
            assert all(p.grad is not None for group in optimizer.param_groups for p in group["params"][-4:])
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def options(store, student_file, **changes) -> list:
    """A short run's command line."""
    chosen = {"data_path": store, "real_data_path": "digits", "ckpt_path": student_file, "global_batch_size": 12,
              "gan_warmup": 0, "log_every": 1, "sample_every": 0, "ema_decay": 0.9, "bn_group": 3}  # fmt: skip
    chosen |= changes
    flags = [[f"--{name.replace('_', '-')}"] + ([] if value is True else [value]) for name, value in chosen.items()]
    return [part for flag in flags for part in flag]


def test_one_step_of_the_script_equals_a_handwritten_one(store, student_file, tmp_path):
    changes = {"lr": 1e-4, "d_lr": 1e-3, "hflip": True}
    call("train_ARD_gan.py", *options(store, student_file, iterations=1, run_dir=tmp_path / "run", **changes))
    after = checkpoints.load(tmp_path / "run" / "checkpoints" / "0000001.pt", "")

    student, config = checkpoints.load_student(student_file)
    opened = TrajectoryStore(store)
    teacher, _ = opened.load_teacher()
    points = opened.point_columns(config["provenance"]["solver_indices"], "x0")
    trajectory, y = opened.read(Shuffle(len(opened), 0).rows(0, 12), "x0", points)
    digits, rows = DigitImages(), Shuffle(1797, 0, "real").rows(0, 12)
    flipped = [
        np.random.Generator(np.random.Philox(key=[0, 5], counter=[0, 0, 0, i])).random() < 0.5 for i in range(12)
    ]
    images = torch.where(torch.tensor(flipped)[:, None, None, None], digits.images[rows].flip(-1), digits.images[rows])
    torch.manual_seed(0)
    heads = Discriminator(3, 32, group=3)
    features = FrozenFeatures(teacher)

    def adamw(parameter, gradient, lr):  # the first step of Adam moves by lr times the gradient's sign, but for epsilon
        return parameter - lr * gradient / (gradient.abs() + 1e-8)

    def check(module, loss, lr, suffix):
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        gradients = [g * min(1, 1 / (norm.item() + 1e-6)) for g in gradients]
        for i, ((name, p), g) in enumerate(zip(parameters.items(), gradients)):
            moment = after[f"opt{suffix}"]["state"][i]["exp_avg"]
            torch.testing.assert_close(moment, 0.1 * g, rtol=1e-4, atol=1e-5, msg=f"gradient of {name}")
            sure = g.abs() > 1e-5  # where rounding does not decide on the sign
            wanted = adamw(p.detach(), g, lr)
            torch.testing.assert_close(after[f"model{suffix}"][name][sure], wanted[sure], rtol=0, atol=1e-5, msg=name)
        return norm

    predictions = student(trajectory[:, :-1], y)
    regression = (predictions - trajectory[:, 1:]).square().mean()
    adversarial = -heads.eval()(features(predictions[:, -1], y))[0].mean()
    last_layer = student.heads[-1].linear.weight
    norms = [torch.autograd.grad(x, last_layer, retain_graph=True)[0].norm() for x in (regression, adversarial)]
    weight = 10 * norms[0] / (norms[1] + 1e-4)
    norm = check(student, regression + weight * adversarial, 1e-4, "")
    heads.train()
    logits_fake, logits_real = heads(
        features(predictions[:, -1].detach(), y), features(from_uint8(images), digits.labels[rows])
    )
    d_loss = F.relu(1 + logits_fake).mean() + F.relu(1 - logits_real).mean()
    check(heads, d_loss, 1e-3, "_d")
    for name, value in student.state_dict().items():  # the EMA starts at the student it is given
        torch.testing.assert_close(after["ema"][name], value.lerp(after["model"][name], 0.1), rtol=0, atol=1e-6)

    logged = scalars(tmp_path / "run")[0]
    right = (logits_fake < 0).float().mean() + (logits_real > 0).float().mean()
    wanted = {"regression": regression, "g_loss": adversarial, "loss": regression + weight * adversarial,
              "gan_weight": weight, "regression_grad": norms[0], "adversarial_grad": norms[1], "grad_norm": norm,
              "d_loss": d_loss, "d_accuracy": right / 2,
              "logit_fake": logits_fake.mean(), "logit_real": logits_real.mean()}  # fmt: skip
    for name, value in wanted.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


#################################################################################
#                                     Runs                                      #
#################################################################################


def scalars(folder) -> list[dict[str, float]]:
    """What a run logged at each step."""
    lines = [line.split() for line in (folder / "log.txt").read_text().splitlines() if line.startswith("step ")]
    return [dict(zip(words[2::2], map(float, words[3::2]))) for words in lines]


def equal(a, b) -> bool:
    """Whether two checkpoints' contents are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("changes", [{}, {"rollout": True, "d_time": 100}])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(store, student_file, tmp_path, changes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = changes | {"gan_warmup": 2}
    call("train_ARD_gan.py", *options(store, student_file, iterations=6, run_dir=whole, **changes))
    for iterations in (3, 6):
        call("train_ARD_gan.py", *options(store, student_file, iterations=iterations, run_dir=parts, **changes))
    contents = [checkpoints.load(folder / "checkpoints" / "0000006.pt", "") for folder in (whole, parts)]
    assert {"model", "ema", "opt", "model_d", "opt_d", "step", "config"} == contents[0].keys()
    assert equal(*contents)
    assert "gan_weight" not in scalars(whole)[1] and scalars(whole)[2]["gan_weight"] > 0


@pytest.mark.slow
def test_the_authors_command_on_two_ranks_agrees_with_one_and_makes_a_student(store, student_file, tmp_path):
    command = ["--model", "DiT-Nano/2", "--global-batch-size=48", "--stack=2", f"--ckpt_path={student_file}",
               "--data-path", store, "--real-data-path", "digits", "--device", "cpu",
               "--iterations", 20, "--gan-warmup", 5, "--log-every", 1]  # fmt: skip
    call("train_ARD_gan.py", *command, "--results-dir", tmp_path / "one", "--sample-every", 0)
    done = spawn("train_ARD_gan.py", *command, "--results-dir", tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr
    runs = [tmp_path / name / "000-DiT-Nano-2" for name in ("one", "two")]
    for mine, theirs in zip(*map(scalars, runs), strict=True):
        for name in ("regression", "d_loss", "logit_fake", "logit_real"):
            assert mine[name] == pytest.approx(theirs[name], rel=0, abs=1e-4), name
        for name in mine.keys() & {"g_loss", "gan_weight"}:  # slopes show an activation that rounds across a kink
            assert mine[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-4), name

    made = runs[1] / "checkpoints" / "0000020.pt"
    assert (runs[1] / "samples" / "0000020.png").is_file()
    student, config = checkpoints.load_student(made)
    assert isinstance(student, ARD) and config["training"]["loss"] == "R+D"
    call("sample_ARD.py", "--ckpt_path", made, "--stack=2", "--num-samples", 5, "--out", tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (5, 8, 8, 3)
        assert json.loads(str(file["provenance"]))["training"]["gan_weight"] == 10.0


def test_an_image_folder_and_its_latents_are_the_same_real_data(tmp_path):
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    teacher = DiT_models["DiT-Nano/2"](input_size=4, in_channels=4, num_classes=2)
    config = {"kind": "teacher", "model": teacher.config, "vae": str(tmp_path / "vae"), "training": {}}
    content = {"config": config | {"provenance": {}}, "step": 0, "ema": teacher.state_dict()}
    checkpoints.save(tmp_path / "teacher.pt", content)
    pixels = np.random.default_rng(0).integers(256, size=(6, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / f"images/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"images/{i % 2}/{i}.png")
    call("encode_latents.py", "--data-path", tmp_path / "images", "--image-size", 8, "--vae", tmp_path / "vae",
         "--out", tmp_path / "latents", "--num-workers", 0, "--dtype", "fp32")  # fmt: skip
    call("sample_trajectory.py", "--teacher", tmp_path / "teacher.pt", "--out", tmp_path / "store",
         "--num-trajectories", 8)  # fmt: skip
    call("train_ARD.py", "--data-path", tmp_path / "store", *SMALL, "--iterations", 1, "--run-dir", tmp_path / "R")
    student = tmp_path / "R/checkpoints/0000001.pt"
    for name in ("images", "latents"):
        call("train_ARD_gan.py", *options(tmp_path / "store", student, real_data_path=tmp_path / name, iterations=3,
             run_dir=tmp_path / f"D-{name}"))  # fmt: skip
    for a, b in zip(scalars(tmp_path / "D-images"), scalars(tmp_path / "D-latents"), strict=True):
        assert a["logit_real"] == pytest.approx(b["logit_real"], rel=0, abs=1e-4)


def test_quality_is_logged_and_leaves_nothing_behind(store, student_file, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    quality = {"eval_every": 2, "eval_reference": tmp_path / "reference.npz", "eval_features": "digits",
               "eval_samples": 64}  # fmt: skip
    run = tmp_path / "run"
    call("train_ARD_gan.py", *options(store, student_file, iterations=3, run_dir=run, accumulation=2, **quality))
    lines = [line.split() for line in (run / "log.txt").read_text().splitlines() if line.startswith("eval ")]
    assert [line[1] for line in lines] == ["0000002", "0000003"] and not (run / "eval").exists()
    assert all(line[2::2] == ["fid", "precision", "recall"] for line in lines)


def test_dry_run_counts_and_writes_nothing(store, student_file, tmp_path, capsys):
    call("train_ARD_gan.py", *options(store, student_file, run_dir=tmp_path / "run", dry_run=True))
    plan = json.loads(capsys.readouterr().out)
    assert plan["discriminator_parameters"] == sum(p.numel() for p in Discriminator(3, 32).parameters())
    assert 1.5 < plan["flops_over_regression"] < 2.5 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": 3}, "history_layers"),
        ({"model": "DiT-Micro/2"}, "depth"),
        ({"ckpt_path": "absent.pt"}, "--ckpt-path absent.pt: no such file"),
        ({"real_data_path": "absent"}, "--real-data-path absent: no such folder"),
        ({"real_data_path": "IMAGES"}, "these images do not suit the teacher: classes is 2 there and 10 here"),
        ({"data_path": "absent"}, "--data-path absent"),
        ({"d_time": 1000}, "--d-time 1000: must be between 0 (clean) and 999"),
        ({"eval_every": 5}, "--eval-reference"),
        ({"global_batch_size": 1, "accumulation": 2}, "--global-batch-size 1"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(store, student_file, tmp_path, capsys, changes, words):
    for name in ("images/a", "images/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    changes = {name: tmp_path / "images" if value == "IMAGES" else value for name, value in changes.items()}
    with pytest.raises(SystemExit) as stop:
        call("train_ARD_gan.py", *options(store, student_file, run_dir=tmp_path / "run", **changes))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_teachers_trajectories_are_refused(student_file, tmp_path, capsys):
    other = save_teacher(tmp_path / "other.pt", random_teacher(seed=1))
    call("sample_trajectory.py", "--teacher", other, "--out", tmp_path / "store", "--num-trajectories", 4)
    with pytest.raises(SystemExit) as stop:
        call("train_ARD_gan.py", *options(tmp_path / "store", student_file, run_dir=tmp_path / "run"))
    assert stop.value.code == 2 and "teacher_hash" in capsys.readouterr().err


def test_bf16_and_a_time_above_zero_stay_finite(store, student_file, tmp_path):
    changes = {"precision": "bf16", "d_time": 250, "rollout": True, "iterations": 3}
    call("train_ARD_gan.py", *options(store, student_file, run_dir=tmp_path / "run", **changes))
    assert all(math.isfinite(value) for step in scalars(tmp_path / "run") for value in step.values())
    assert noise(0, "discriminator", [0], (2,)).ne(noise(0, "training", [0], (2,))).all()
