"""A text model goes the way of a class model through the scripts: dump, distil, sample, and refusals.

A room of a random text teacher, two stores of captions, trajectories and a student serves all.
Dump, distil (also online, killed, on ranks), sample, report; then what does not go together.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import arrays, assert_equal, call, call_on_ranks, checkpoint, losses, refused, save_teacher
from text_helpers import encode_captions, random_text_teacher, save_pixart

import app
import train
from costs.flops import meta_model, sampling_gflops
from diffusion.teacher_ode import TeacherODE
from models_pixart import PixArt, TextARD
from runtime.cli import UserError
from runtime.distributed import DistributedContext
from runtime.randomness import noise
from stores import checkpoints
from stores.captions import CaptionStore
from stores.digits import SCENES, SEEN_SCENES, DigitScenes, digits_images, scene_caption, scene_places
from stores.samples import read_provenance
from stores.trajectories import TrajectoryStore

RUN = ("--global-batch-size", 8, "--log-every", 1, "--sample-every", 0, "--lr", 1e-3, "--iterations", 3)
STUDENT = ("--steps", 3, "--stack", 1, "--target", "xt", *RUN)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Captions and others, a text teacher of 8x8 pixels, its trajectories, a student of three steps."""
    folder = tmp_path_factory.mktemp("text")
    encode_captions(folder, "captions", [scene_caption(i) for i in range(5)])
    encode_captions(folder, "others", [scene_caption(i) for i in range(5, 12)])
    encode_captions(folder, "short", [scene_caption(i) for i in range(5)], "--max-tokens", 4)
    save_teacher(folder / "teacher.pt", random_text_teacher(std=0.05, in_channels=1, caption_channels=64))
    call("sample_trajectory.py", "--teacher", folder / "teacher.pt", "--captions", folder / "captions", "--out",
         folder / "store", "--num-trajectories", 12, "--steps", 3, "--solver-steps", 6, "--store", "xt",
         "--dtype", "fp32")  # fmt: skip
    call("train_ARD.py", "--data-path", folder / "store", "--captions", folder / "captions", *STUDENT, "--run-dir",
         folder / "run")  # fmt: skip
    return folder


def test_trajectories_and_students_know_their_captions(room):
    store = TrajectoryStore(room / "store")
    about = store.provenance["captions"]
    assert about["count"] == store.provenance["num_classes"] == 5 and about["max_tokens"] == 16
    assert store.provenance["cfg_channels"] == 1 and about["encoder"] == "words"
    student, config = checkpoints.load_student(room / "run/checkpoints/0000003.pt")
    assert isinstance(student, TextARD) and config["provenance"]["captions"] == about
    # Trajectory 7 is what the teacher makes of noise 7 and caption 7 % 5.
    points, labels = store.read(np.array([7]), "xt", [0, 1, 2])
    assert labels.tolist() == [2]
    captions = CaptionStore(room / "captions")
    teacher = checkpoints.load_teacher(room / "teacher.pt")[0]
    ode = TeacherODE(teacher, solver_steps=6, conditions=captions)
    states, _ = ode(points[:, 0], captions(labels))
    scale = points.abs().max()
    assert (states[:, 2::2] - points[:, 1:]).abs().max() < 1e-6 * scale
    assert (ode(points[:, 0], captions(labels + 1))[0][:, -1] - points[:, -1]).abs().max() > 1e-5 * scale


def test_trajectories_are_made_online_too(room, tmp_path):
    call("train_ARD.py", "--online", "--teacher", room / "teacher.pt", "--captions", room / "captions", *STUDENT,
         "--solver-steps", 6, "--precision", "bf16", "--checkpoint-activations", "--num-workers", 1, "--run-dir",
         tmp_path / "run")  # fmt: skip
    assert len(losses(tmp_path / "run")) == 3 and losses(tmp_path / "run")[0] > 0
    config = checkpoints.load(tmp_path / "run/checkpoints/0000003.pt", "")["config"]
    assert config["provenance"]["online"] and config["provenance"]["captions"]["count"] == 5


def test_a_killed_online_run_goes_on_as_if_nothing_had_been(room, tmp_path):
    run = ("train_ARD.py", "--online", "--teacher", room / "teacher.pt", "--captions", room / "captions", *STUDENT[:-1],
           4, "--solver-steps", 6, "--ckpt-every", 2, "--device", "cpu", "--run-dir")  # fmt: skip
    call(*run, tmp_path / "whole")
    assert call_on_ranks(1, *run, tmp_path / "killed", kill="0000004.pt") == [-9]
    assert [path.name for path in (tmp_path / "killed/checkpoints").glob("*.pt")] == ["0000002.pt"]
    call(*run, tmp_path / "killed")
    for name in ("model", "ema", "opt"):
        assert_equal(checkpoint(tmp_path / "killed", 4)[name], checkpoint(tmp_path / "whole", 4)[name])


def test_a_teachers_points_take_the_place_of_a_students(room, tmp_path):
    """Samples of the teacher's three points are the teacher's own, of captions that the student never met."""
    common = ("--num-samples", 6, "--captions", room / "others", "--save-latents", "--out")
    student = ("sample_ARD.py", "--ckpt-path", room / "run/checkpoints/0000003.pt", "--teacher-steps", 3)
    call(*student, *common, tmp_path / "a.npz")
    call("sample.py", "--teacher", room / "teacher.pt", "--solver-steps", 6, *common, tmp_path / "b.npz")
    a, b = (arrays(tmp_path / f"{name}.npz")["latents"] for name in "ab")
    assert abs(a - b).max() < 1e-5 * abs(b).max()


def test_a_report_has_the_rows_of_text_models(room, digit_files, tmp_path):
    """Table and samples; what is measured in the models themselves would need their captions and is left out."""
    folder = tmp_path / "results"
    shutil.copytree(room / "run", folder / "student")
    common = ("--num-samples", 70, "--captions", room / "captions", "--out")
    call("sample_ARD.py", "--ckpt-path", folder / "student/checkpoints/0000003.pt", *common, folder / "student.npz")
    for steps, name in ((6, "teacher"), (3, "teacher-3")):
        call("sample.py", "--teacher", room / "teacher.pt", "--solver-steps", steps, *common, folder / f"{name}.npz")
    for path in folder.glob("*.npz"):
        call("evaluations.evaluator", digit_files[0], path, "--features", "digits", "--no-cache", "--json",
             path.with_suffix(".json"))  # fmt: skip
    call("lab.report", folder, "--out", tmp_path / "report")
    rows = json.loads((tmp_path / "report/table.json").read_text())
    assert sorted((row["model"], row["steps"]) for row in rows) == [("ARD", 3), ("teacher", 3), ("teacher", 6)]
    student = next(row for row in rows if row["model"] == "ARD")
    teacher = next(row for row in rows if row["steps"] == 6)
    assert student["degradation"] == pytest.approx(student["fid"] - teacher["fid"]) and not student["paper"]
    config = checkpoints.load_student(folder / "student/checkpoints/0000003.pt")[1]["model"]
    assert student["gflops"] == sampling_gflops(meta_model(config), 3, text_tokens=6) < teacher["gflops"]
    assert not (tmp_path / "report/fig4_attention.png").exists()


def test_samples_are_of_their_captions_whichever_the_batch(room, tmp_path):
    common = ("--num-samples", 10, "--captions", room / "others", "--save-latents")
    student = ("sample_ARD.py", "--ckpt-path", room / "run/checkpoints/0000003.pt", *common)
    call(*student, "--out", tmp_path / "a.npz")
    call(*student, "--out", tmp_path / "b.npz", "--per-proc-batch-size", 3)
    a, b = arrays(tmp_path / "a.npz"), arrays(tmp_path / "b.npz")
    assert (a["arr_1"] == np.arange(10) % 7).all() and abs(a["latents"] - b["latents"]).max() < 1e-5
    about = read_provenance(tmp_path / "a.npz")
    assert about["captions"]["count"] == 5 and about["sample_captions"]["count"] == 7
    call("stores.trajectories", "export", room / "store", "--out", tmp_path / "e.npz", "--device", "cpu")
    call("evaluations.prompts", "compbench", tmp_path / "e.npz", "--captions", room / "captions", "--out",
         tmp_path / "named")  # fmt: skip
    assert (tmp_path / f"named/{scene_caption(1)}_000006.png").is_file()  # trajectory 6 of 5 captions
    teacher = ("sample.py", "--teacher", room / "teacher.pt", *common, "--solver-steps", 3, "--out")
    call(*teacher, tmp_path / "t.npz")
    call(*teacher, tmp_path / "bf16.npz", "--precision", "bf16")
    call(*student, "--precision", "bf16", "--out", tmp_path / "c.npz")
    for exact, rounded in (("t", "bf16"), ("a", "c")):
        exact, rounded = (arrays(tmp_path / f"{name}.npz")["latents"] for name in (exact, rounded))
        assert exact.shape == (10, 1, 8, 8) and 0 < np.abs(exact - rounded).mean() < 0.05 * np.abs(exact).mean()


def test_what_does_not_go_together_is_one_sentence(room, tmp_path, capsys, teacher_file, store):
    student = ("sample_ARD.py", "--ckpt-path", room / "run/checkpoints/0000003.pt", "--num-samples", 2)
    out = ("--out", tmp_path / "out")
    train = ("train_ARD.py", *STUDENT, "--run-dir", tmp_path / "run", "--data-path")
    about = {"captions": {"encoder_hash": "0123456789abcdef", "max_tokens": 16}}
    for command, sentence in (
        (student, "--captions: this model reads text"),
        ((*student, "--captions", room / "short"), "max_tokens is 4 there and 16 here"),
        ((*student, "--captions", room / "store"), "this store holds no captions"),
        ((*student, "--captions", room / "absent"), "no such folder"),
        (
            ("train_ARD.py", "--preset", "t2i-sigma-512", "--dry-run", "--captions", room / "absent"),
            "absent: no such folder; encode_captions.py makes one",  # before its teacher is missed
        ),
        ((*train, room / "store"), "--captions: this model reads text"),
        ((*train, room / "store", "--captions", room / "others"), "text_sha256 is"),
        ((*train, store, "--captions", room / "captions"), "this model has classes and reads no text"),
        (("sample.py", "--teacher", teacher_file, "--captions", room / "captions"), "reads no text"),
        (("sample_trajectory.py", "--teacher", room / "teacher.pt", "--num-trajectories", 2, *out), "reads text"),
        (
            ("sample_trajectory.py", "--teacher", teacher_file, "--num-trajectories", 2, *out, "--vae", "sdxl"),
            "--vae sdxl: this teacher works on pixels, leave the option out",
        ),
        (
            ("train_ARD_gan.py", "--data-path", room / "store", "--real-data-path", "digits", "--ckpt-path",
             room / "run/checkpoints/0000003.pt", "--global-batch-size", 12),
            "of a text model, which R+D is not for",
        ),
    ):  # fmt: skip
        assert sentence in refused(capsys, *command), command
    page = ("app.py", "--ckpt-path", room / "run/checkpoints/0000003.pt", "--encoder", "absent")
    assert "--encoder absent: no such folder; give words, a hub id or a folder" in refused(capsys, *page)
    other = save_teacher(tmp_path / "other.pt", random_text_teacher(in_channels=1, caption_channels=64), about=about)
    dump = ("sample_trajectory.py", "--teacher", other, "--captions", room / "captions", "--num-trajectories", 2, *out)
    assert "encoder_hash is" in refused(capsys, *dump)
    save_teacher(tmp_path / "wide.pt", random_text_teacher(in_channels=1))
    wide = ("sample.py", "--teacher", tmp_path / "wide.pt", "--captions", room / "captions")
    assert "tokens of 64 channels, this model reads 12" in refused(capsys, *wide)
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


@torch.no_grad()
def test_the_page_draws_captions_as_they_are_typed(room):
    """As sample_ARD.py does from a store of them, in which padding is shorter."""
    options = app.build_parser().parse_args(["--device", "cpu"])
    models, editable = app.open_models(room / "run/checkpoints/0000003.pt", None, options)
    captions, store = [scene_caption(i) for i in range(3)], CaptionStore(room / "captions")
    z, y = models.inputs(captions, 4)
    assert y.shape == (3, 16, 64) and not y[:, 6:].any() and torch.equal(y[:, :6], store(torch.arange(3)))
    assert torch.equal(z, noise(4, "sample", range(3), (1, 8, 8)))
    ode = TeacherODE(models.ode.teacher, solver_steps=6, conditions=store)
    for found, wanted in ((models.ode.sample(z, y), ode.sample(z, store(torch.arange(3)))),
                          (models.student.sample(z, y), models.student.sample(z, store(torch.arange(3))))):  # fmt: skip
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    teacher, _, predictions, _ = models.draw(captions, 4)
    assert len(predictions) == 3 and teacher.height == 168 + 8 + 2 * 25 and not editable  # two lines a caption
    assert len(models.on_the_way(captions[:1], 4)) == 2
    with pytest.raises(UserError, match="does not know 'cat'"):
        models.draw(["a cat"], 0)


def test_a_foreign_teacher_is_distilled_online_into_its_autoencoders_latents(tmp_path, autoencoder, capsys):
    """PixArt in diffusers' layout, --vae beside it, no word about the encoder in its files."""
    shape = dict(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, caption_channels=64)
    save_pixart(tmp_path / "pixart", **shape)
    captions = encode_captions(tmp_path, "captions", [scene_caption(i) for i in range(4)])
    run = ("train_ARD.py", "--online", "--teacher", tmp_path / "pixart", "--captions", captions, *STUDENT,
           "--solver-steps", 6, "--run-dir", tmp_path / "run")  # fmt: skip
    assert "--vae sdxl" in refused(capsys, *run)
    call(*run, "--vae", autoencoder)
    call("sample_ARD.py", "--ckpt-path", tmp_path / "run/checkpoints/0000003.pt", "--captions", captions,
         "--num-samples", 4, "--out", tmp_path / "a.npz")  # fmt: skip
    about = read_provenance(tmp_path / "a.npz")
    assert about["cfg_channels"] == 4 and about["vae"] == str(autoencoder)
    assert arrays(tmp_path / "a.npz")["arr_0"].shape == (4, 16, 16, 3)


def test_the_demos_teacher_is_trained_on_captions_with_some_dropped(tmp_path, capsys):
    captions = encode_captions(tmp_path, "seen", [scene_caption(i) for i in range(SEEN_SCENES)])
    run = ("train.py", "--model", "PixArt-Nano/4", "--data-path", "digit-scenes", "--no-hflip", *RUN)
    assert "a PixArt needs --captions" in refused(capsys, *run)
    few = encode_captions(tmp_path, "few", ["a three"])
    assert "1 captions for the 160 labels" in refused(capsys, *run, "--captions", few)
    call(*run, "--captions", captions, "--run-dir", tmp_path / "run", "--sample-every", 3)
    teacher, config = checkpoints.load_teacher(tmp_path / "run/checkpoints/0000003.pt")
    assert isinstance(teacher, PixArt) and config["provenance"]["captions"]["count"] == SEEN_SCENES
    assert list((tmp_path / "run").rglob("*.png"))
    batches = train.TeacherBatches(
        DigitScenes(), (1, 16, 16), global_batch_size=256, seed=0, label_dropout=0.25, hflip=False,
        context=DistributedContext(), conditions=CaptionStore(captions),
    )  # fmt: skip
    lengths = batches[0]["y"].any(-1).sum(1)
    assert 0.15 < (lengths == 1).float().mean() < 0.35 and set(lengths.tolist()) == {1, 6}


@pytest.mark.parametrize("online", [False, True], ids=["store", "online"])
def test_two_ranks_train_as_one(online, room, tmp_path):
    source = (
        ("--online", "--teacher", room / "teacher.pt", "--solver-steps", 6)
        if online
        else ("--data-path", room / "store")
    )
    run = ("train_ARD.py", *source, "--captions", room / "captions", *STUDENT, "--device", "cpu", "--run-dir")
    assert call_on_ranks(2, *run, tmp_path / "two") == [0, 0]
    call(*run, tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_scenes_show_what_their_captions_say():
    source, digits = DigitScenes(), digits_images()
    assert len(set(SCENES)) == 200 and len({scene_caption(i) for i in range(200)}) == 200
    assert scene_caption(SCENES.index(("beside", 6, 8))) == "a six beside an eight"
    rows = np.arange(40, 60)
    batch = source.read(rows, np.zeros(20, bool))
    again = source.read(rows[::-1].copy(), np.zeros(20, bool))
    assert torch.equal(batch["images"].flip(0), again["images"])
    for image, scene in zip(batch["images"][:, 0], batch["y"].tolist()):
        for place, number in zip(scene_places(scene), SCENES[scene][1:]):
            same = (digits[0][:, 0] == image[place]).flatten(1).all(1)
            assert number in digits[1][same].tolist()
            image[place] = 0
        assert not image.any()
