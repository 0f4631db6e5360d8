"""The whole chain with a flow teacher: train, dump, R, R+D, sample, evaluate, pipeline, resume."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import (
    NANO_TEACHER,
    SMALL,
    arrays,
    assert_equal,
    call,
    checkpoint,
    gan_options,
    losses,
    random_teacher,
    refused,
    save_teacher,
    scalars,
)

from diffusion import process_of
from diffusion.teacher_ode import TeacherODE, pick_points
from models_ard import ARD
from pipeline_ard import ARDPipeline
from runtime.randomness import labels, noise
from stores import checkpoints
from stores.samples import read_provenance
from stores.trajectories import TrajectoryStore

PROCESSES = ("sit", "repa")
GUIDED = ("--cfg-scale", 2, "--guidance-interval", 0.1, 0.8)


def teach(run, process, iterations, *more):
    model = (*NANO_TEACHER, "--process", process) if process else NANO_TEACHER[2:]
    call("train.py", *model, "--data-path", "digits", "--global-batch-size", 32, "--ema-decay", 0.9,
         "--iterations", iterations, "--run-dir", run, *more)  # fmt: skip
    return run / f"checkpoints/{iterations:07d}.pt"


@pytest.fixture(scope="module", params=PROCESSES)
def chain(request, tmp_path_factory):
    """A teacher of forty steps, a store of its trajectories, a student of four, and that student after R+D."""
    folder, files = tmp_path_factory.mktemp(request.param), {"process": request.param}
    files["teacher"] = teach(folder / "teacher", request.param, 40)
    files["store"] = folder / "store"
    call("sample_trajectory.py", "--teacher", files["teacher"], "--out", files["store"], "--num-trajectories", 24,
         "--solver-steps", 8, "--dtype", "fp32", *GUIDED)  # fmt: skip
    call("train_ARD.py", "--data-path", files["store"], *SMALL, "--iterations", 4, "--run-dir", folder / "R")
    files["student"] = folder / "R/checkpoints/0000004.pt"
    call("train_ARD_gan.py", *gan_options(files["store"], files["student"], iterations=4, run_dir=folder / "RD",
                                          d_time=200, rollout=True))  # fmt: skip
    files["tuned"] = folder / "RD/checkpoints/0000004.pt"
    return files


def test_the_teacher_learns_velocities_and_says_so(chain):
    teacher, config = checkpoints.load_teacher(chain["teacher"])
    assert teacher.process == config["provenance"]["process"] == chain["process"]
    assert teacher.out_channels == 1  # no variance, which nothing would train
    logged = losses(chain["teacher"].parent.parent)
    assert np.mean(logged[-5:]) < 0.8 * logged[0]
    assert scalars(chain["teacher"].parent.parent)[0].keys().isdisjoint({"vb", "mse"})


def test_a_store_holds_the_eulers_steps(chain):
    teacher, _ = checkpoints.load_teacher(chain["teacher"])
    opened = TrajectoryStore(chain["store"])
    about = opened.provenance
    assert (about["process"], about["solver"], about["solver_steps"]) == (chain["process"], "euler", 8)
    assert about["guidance_interval"] == [0.1, 0.8] and about["cfg_channels"] == 1
    z, y = noise(0, "trajectory", range(24), (1, 8, 8)), labels(0, range(24), 10)
    ode = TeacherODE(teacher, solver_steps=8, cfg_scale=2, guidance_interval=(0.1, 0.8))
    points = pick_points(*ode(z, y), opened.solver_indices)
    for target in ("x0", "xt"):
        found, _ = opened.read(np.arange(24), target, [0, 1, 2, 3])
        torch.testing.assert_close(found[:, 1:], points[target], rtol=0, atol=1e-4)


def test_a_student_is_told_its_teachers_times(chain):
    times = {"sit": [0, 0.25, 0.5, 0.75], "repa": [1, 0.75, 0.5, 0.25]}[chain["process"]]
    for path in (chain["student"], chain["tuned"]):
        student, config = checkpoints.load_student(path)
        assert student.times.tolist() == times and student.config["process"] == chain["process"]
        assert config["provenance"]["process"] == chain["process"]
    assert scalars(chain["tuned"].parent.parent)[-1]["gan_weight"] > 0


def test_a_students_first_prediction_begins_as_the_teachers_output(chain):
    teacher, _ = checkpoints.load_teacher(chain["teacher"])
    z, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 4, 9])
    student = ARD.from_teacher(teacher, steps=4, history_layers=2).eval()
    start = {"sit": 0.0, "repa": 1.0}[chain["process"]]
    with torch.no_grad():
        torch.testing.assert_close(student.sample(z, y)[:, 0], teacher(z, torch.full((3,), start), y))


@pytest.mark.parametrize("target", ["x0", "xt"])
def test_a_student_of_residuals_begins_as_its_teachers_solver(chain, target, tmp_path):
    teacher, _ = checkpoints.load_teacher(chain["teacher"])
    history, y = torch.randn(3, 4, 1, 8, 8), torch.tensor([0, 4, 9])
    student = ARD.from_teacher(teacher, mask="M1", residual=target).eval()
    process, times = process_of(teacher), [*student.times.tolist(), {"sit": 1.0, "repa": 0.0}[chain["process"]]]
    with torch.no_grad():
        for k, (t, then) in enumerate(pairwise(times)):
            xt, x0 = process.step(history[:, k], teacher(history[:, k], torch.full((3,), t), y), t, then)
            torch.testing.assert_close(student(history, y)[:, k], {"xt": xt, "x0": x0}[target], rtol=0, atol=1e-5)
    call("train_ARD.py", "--data-path", chain["store"], *SMALL, "--iterations", 2, "--run-dir", tmp_path,
         "--target", target, "--parametrization", "residual")  # fmt: skip
    trained, _ = checkpoints.load_student(tmp_path / "checkpoints/0000002.pt")
    assert trained.config["residual"] == target and trained.strides == student.strides
    with torch.no_grad():
        own = trained.sample(history[:, 0], y)
        seen = torch.cat([history[:, :1], own[:, :-1]], dim=1)
        torch.testing.assert_close(trained(seen, y), own, rtol=0, atol=1e-5)  # cached = masked


def test_residuals_of_noise_prediction_are_refused(store, tmp_path, capsys):
    said = refused(capsys, "train_ARD.py", "--data-path", store, "--parametrization", "residual", "--run-dir", tmp_path)
    assert "--parametrization residual" in said and "ddpm" in said and not list(tmp_path.iterdir())


def test_samples_figures_and_pipeline_of_the_student(chain, digit_files, tmp_path):
    out = tmp_path / "s.npz"
    sample = ("--num-samples", 64, "--device", "cpu", "--save-latents")
    call("sample_ARD.py", "--ckpt-path", chain["tuned"], *sample, "--out", out)
    provenance = read_provenance(out)
    assert provenance["process"] == chain["process"] and provenance["guidance_interval"] == [0.1, 0.8]
    call("evaluations.evaluator", digit_files[0], out, "--features", "digits", "--json", tmp_path / "s.json",
         "--allow-few")  # fmt: skip
    assert json.loads((tmp_path / "s.json").read_text())["fid"] > 0
    pipe = ARDPipeline.from_checkpoint(chain["tuned"])
    pipe.save_pretrained(tmp_path / "saved")
    assert f"| process | {chain['process']} |" in (tmp_path / "saved/README.md").read_text()
    wanted = arrays(out)
    for loaded in (pipe, ARDPipeline.from_pretrained(tmp_path / "saved")):
        loaded.set_progress_bar_config(disable=True)
        given = {"class_labels": wanted["arr_1"].tolist(), "latents": loaded.noise(0, range(64))}
        assert np.array_equal(loaded(**given, output_type="latent").images.numpy(), wanted["latents"])
    # All points from the teacher are the teacher's own samples, solved as in the dump.
    call("sample_ARD.py", "--ckpt-path", chain["tuned"], *sample, "--teacher-steps", 4, "--out", tmp_path / "t.npz")
    call("sample.py", "--teacher", chain["teacher"], *sample, "--solver-steps", 8, *GUIDED, "--out", tmp_path / "o.npz")
    assert np.array_equal(arrays(tmp_path / "t.npz")["latents"], arrays(tmp_path / "o.npz")["latents"])
    pixels = ("--source-images", digit_files[0], "--num-samples", 4, "--class-labels", 8, "--out", tmp_path / "m.npz")
    call("sample_ARD.py", "--ckpt-path", chain["tuned"], *pixels)
    assert arrays(tmp_path / "m.npz")["arr_0"].shape == (4, 8, 8, 3)


def test_resumed_runs_equal_uninterrupted_ones_bit_for_bit(chain, tmp_path):
    teacher = [teach(tmp_path / "teacher", chain["process"], n) for n in (17, 40)][-1].parent.parent
    assert_equal(checkpoint(teacher, 40), checkpoint(chain["teacher"].parent.parent, 40))
    for iterations in (1, 4):
        call("train_ARD.py", "--data-path", chain["store"], *SMALL, "--iterations", iterations,
             "--run-dir", tmp_path / "R")  # fmt: skip
        call("train_ARD_gan.py", *gan_options(chain["store"], chain["student"], iterations=iterations,
                                              run_dir=tmp_path / "RD", d_time=200, rollout=True))  # fmt: skip
    assert_equal(checkpoint(tmp_path / "R", 4), checkpoint(chain["student"].parent.parent, 4))
    assert_equal(checkpoint(tmp_path / "RD", 4), checkpoint(chain["tuned"].parent.parent, 4))


def test_online_training_solves_the_same_ode(chain, tmp_path):
    ode = ("--online", "--teacher", chain["teacher"], "--solver-steps", 8, *GUIDED)
    call("train_ARD.py", *ode, *SMALL, "--iterations", 1, "--target", "xt", "--run-dir", tmp_path / "run")
    provenance = checkpoint(tmp_path / "run", 1)["config"]["provenance"]
    stored = TrajectoryStore(chain["store"]).provenance
    for name in ("process", "solver", "solver_steps", "cfg_scale", "cfg_channels", "guidance_interval"):
        assert provenance[name] == stored[name], name


def test_what_does_not_agree_is_refused(chain, tmp_path, capsys):
    other = {"sit": "repa", "repa": "sit"}[chain["process"]]
    train = ("--data-path", chain["store"], *SMALL, "--iterations", 1, "--run-dir", tmp_path / "run")
    said = refused(capsys, "train_ARD.py", *train, "--teacher-process", other)
    assert f"--teacher-process {other}: the trajectories of" in said and chain["process"] in said
    strange = save_teacher(tmp_path / "strange.pt", random_teacher(process=other))
    assert f"is of the process {other}" in refused(capsys, "train_ARD.py", *train, "--teacher", strange)
    draw = ("sample.py", "--teacher", chain["teacher"], "--num-samples", 2, "--out", tmp_path / "s.npz")
    for options, message in (
        (("--guidance-interval", 0.7, 0.2), "--guidance-interval 0.7 0.2: the first must not be above the second"),
        (("--guidance-interval", 0, 0.7, "--cfg-scale", 1), "--guidance-interval 0 0.7: guidance of scale 1 is none"),
        (("--guidance-interval", 0, 7), "--guidance-interval: 7 must be between 0 and 1"),
        (("--teacher-process", "ddpm"), f"is of the process {chain['process']}, not of ddpm"),
    ):
        assert message in refused(capsys, *draw, *options)
    assert not list(tmp_path.glob("s.*"))


def test_a_teacher_begins_with_another_of_its_process(chain, tmp_path, capsys):
    begun = teach(tmp_path / "run", None, 1, "--init", chain["teacher"], "--keep-labels", "--lr", 1e-30)
    loaded, config = checkpoints.load_teacher(begun)
    assert loaded.process == chain["process"] and config["provenance"]["process"] == chain["process"]
    wanted = checkpoints.load_teacher(chain["teacher"])[0].state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    other = ("--data-path", "digits", "--init", chain["teacher"], "--run-dir", tmp_path / "other", "--process", "ddpm")
    assert f"is of the process {chain['process']}, not of ddpm" in refused(capsys, "train.py", *other)
    bare = tmp_path / "bare.pt"
    torch.save(checkpoints.load_teacher(chain["teacher"])[0].state_dict(), bare)
    said = refused(capsys, "train.py", "--data-path", "digits", "--init", bare, "--run-dir", tmp_path / "other")
    assert said.endswith("give --process: ddpm, sit or repa\n")


def test_a_run_of_r_and_d_refuses_trajectories_of_another_interval(chain, tmp_path, capsys):
    call("sample_trajectory.py", "--teacher", chain["teacher"], "--out", tmp_path / "store", "--num-trajectories", 12,
         "--solver-steps", 8, "--cfg-scale", 2)  # fmt: skip
    said = refused(capsys, "train_ARD_gan.py", *gan_options(tmp_path / "store", chain["student"], iterations=1,
                                                            run_dir=tmp_path / "run"))  # fmt: skip
    assert "guidance_interval is None there and [0.1, 0.8] here" in said


@pytest.mark.parametrize("process", ("ddpm", *PROCESSES))
def test_flops_of_an_interval_lie_between_no_guidance_and_guidance_everywhere(process, tmp_path, capsys):
    teacher = save_teacher(tmp_path / "teacher.pt", random_teacher(process=process))
    counts = []
    for options in (("--cfg-scale", 1), ("--guidance-interval", 0.2, 0.7), ("--guidance-interval", 0, 1), ()):
        call("sample.py", "--teacher", teacher, "--num-samples", 2, "--solver-steps", 20, "--out", tmp_path / "s.npz",
             "--dry-run", *options)  # fmt: skip
        counts.append(json.loads(capsys.readouterr().out)["flops"])
    assert all(a < b for a, b in pairwise(counts[:3])) and counts[2] == counts[3]
    guided = sum(TeacherODE(random_teacher(process=process)).process.guided_steps(20, (0.2, 0.7)))
    assert counts[1] == pytest.approx(counts[0] + guided / 20 * (counts[2] - counts[0]), rel=1e-6)
