"""train_ARD_gan.py: one step against a hand-written one, ranks, resuming, its data, its command line.

The step written out by hand stands first; then resuming, the authors' command on ranks, kinds of real data,
the plan, refusals, number formats.
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SMALL,
    arrays,
    assert_equal,
    call,
    checkpoint,
    gan_options,
    random_teacher,
    refused,
    save_teacher,
    scalars,
    spawn,
)
from PIL import Image

from discriminator import Discriminator, FrozenFeatures
from models_ard import ARD
from runtime.randomness import Shuffle
from stores import checkpoints
from stores.digits import DigitImages
from stores.images import from_uint8
from stores.trajectories import TrajectoryStore


def test_one_step_of_the_script_equals_a_handwritten_one(store, student_file, tmp_path):
    changes = {"lr": 1e-4, "d_lr": 1e-3, "hflip": True, "clip": 0.1}
    call("train_ARD_gan.py", *gan_options(store, student_file, iterations=1, run_dir=tmp_path / "run", **changes))
    after = checkpoint(tmp_path / "run", 1)

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

    def check(module, loss, lr, suffix, clip):
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert norm > 0.1  # the student's limit, which is not the heads'
        gradients = [g * min(1, clip / (norm.item() + 1e-6)) for g in gradients]
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
    norm = check(student, regression + weight * adversarial, 1e-4, "", clip=0.1)
    heads.train()
    logits_fake, logits_real = heads(
        features(predictions[:, -1].detach(), y), features(from_uint8(images), digits.labels[rows])
    )
    d_loss = F.relu(1 + logits_fake).mean() + F.relu(1 - logits_real).mean()
    check(heads, d_loss, 1e-3, "_d", clip=math.inf)
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


@pytest.mark.parametrize("changes", [{}, {"rollout": True, "d_time": 100}])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(store, student_file, tmp_path, changes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = changes | {"gan_warmup": 2}
    call("train_ARD_gan.py", *gan_options(store, student_file, iterations=6, run_dir=whole, **changes))
    for iterations in (3, 6):
        call("train_ARD_gan.py", *gan_options(store, student_file, iterations=iterations, run_dir=parts, **changes))
    assert {"model", "ema", "opt", "model_d", "opt_d", "step", "config"} == checkpoint(whole, 6).keys()
    assert_equal(checkpoint(whole, 6), checkpoint(parts, 6))
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
    found = arrays(tmp_path / "samples.npz")
    assert found["arr_0"].shape == (5, 8, 8, 3)
    assert json.loads(str(found["provenance"]))["training"]["gan_weight"] == 10.0


def test_an_image_folder_and_its_latents_are_the_same_real_data(autoencoder, tmp_path):
    teacher = random_teacher(input_size=4, in_channels=4, num_classes=2)
    save_teacher(tmp_path / "teacher.pt", teacher, autoencoder)
    pixels = np.random.default_rng(0).integers(256, size=(6, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / f"images/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"images/{i % 2}/{i}.png")
    call("encode_latents.py", "--data-path", tmp_path / "images", "--image-size", 8, "--vae", autoencoder,
         "--out", tmp_path / "latents", "--num-workers", 0, "--dtype", "fp32")  # fmt: skip
    call("sample_trajectory.py", "--teacher", tmp_path / "teacher.pt", "--out", tmp_path / "store",
         "--num-trajectories", 8)  # fmt: skip
    call("train_ARD.py", "--data-path", tmp_path / "store", *SMALL, "--iterations", 1, "--run-dir", tmp_path / "R")
    student = tmp_path / "R/checkpoints/0000001.pt"
    for name in ("images", "latents"):
        call("train_ARD_gan.py", *gan_options(tmp_path / "store", student, real_data_path=tmp_path / name, iterations=3,
             run_dir=tmp_path / f"D-{name}"))  # fmt: skip
    for a, b in zip(scalars(tmp_path / "D-images"), scalars(tmp_path / "D-latents"), strict=True):
        assert a["logit_real"] == pytest.approx(b["logit_real"], rel=0, abs=1e-4)


def test_dry_run_counts_the_cost_of_a_step_and_writes_nothing(store, student_file, tmp_path, capsys):
    call("train_ARD_gan.py", *gan_options(store, student_file, run_dir=tmp_path / "run", dry_run=True))
    plan = json.loads(capsys.readouterr().out)
    assert plan["discriminator_parameters"] == sum(p.numel() for p in Discriminator(3, 32).parameters())
    assert 1.5 < plan["flops_over_regression"] < 2.5 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": 3}, "history_layers"),
        ({"model": "DiT-Micro/2"}, "depth"),
        ({"ckpt_path": "absent.pt"}, "--ckpt-path absent.pt: no such file"),
        ({"real_data_path": "IMAGES"}, "these images do not suit the teacher: classes is 2 there and 10 here"),
        ({"eval_every": 5}, "--eval-reference"),
        ({"accumulation": 8}, "give a multiple of 24, or smaller groups"),
        ({"global_batch_size": 1, "accumulation": 2}, "--global-batch-size 1"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(store, student_file, tmp_path, capsys, changes, words):
    for name in ("images/a", "images/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    changes = {name: tmp_path / "images" if value == "IMAGES" else value for name, value in changes.items()}
    given = gan_options(store, student_file, run_dir=tmp_path / "run", **changes)
    assert words in refused(capsys, "train_ARD_gan.py", *given) and not (tmp_path / "run").exists()


def test_another_teachers_trajectories_are_refused(student_file, tmp_path, capsys):
    other = save_teacher(tmp_path / "other.pt", random_teacher(seed=1))
    call("sample_trajectory.py", "--teacher", other, "--out", tmp_path / "store", "--num-trajectories", 4)
    given = gan_options(tmp_path / "store", student_file, run_dir=tmp_path / "run")
    assert "teacher_hash" in refused(capsys, "train_ARD_gan.py", *given)


def test_bf16_and_a_time_above_zero_stay_finite_and_other_than_fp32_of_clean_images(store, student_file, tmp_path):
    changes = {"precision": "bf16", "d_time": 250, "rollout": True, "iterations": 3}
    call("train_ARD_gan.py", *gan_options(store, student_file, run_dir=tmp_path / "run", **changes))
    call("train_ARD_gan.py", *gan_options(store, student_file, run_dir=tmp_path / "plain", rollout=True, iterations=1))
    found, plain = scalars(tmp_path / "run"), scalars(tmp_path / "plain")
    assert all(math.isfinite(value) for step in found for value in step.values())
    assert found[0]["regression"] == pytest.approx(plain[0]["regression"], rel=0.05)  # bf16 has eight bits
    assert found[0]["regression"] != plain[0]["regression"] and found[0]["logit_real"] != plain[0]["logit_real"]
