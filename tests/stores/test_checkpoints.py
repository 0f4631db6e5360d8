"""Checkpoints: shipped files, slim copies, strict loading, students of any version."""

import errno
from pathlib import Path

import pytest
import torch
from helpers import SHIPPED_TEACHER, SMALL, assert_equal, call, random_teacher, refused, save_teacher

from models import DiT
from runtime.cli import UserError
from stores import checkpoints


def test_the_shipped_teacher_says_how_it_was_made():
    content = checkpoints.load(SHIPPED_TEACHER, "")
    assert set(content) == {"config", "step", "ema"} and content["step"] == 12_000
    assert SHIPPED_TEACHER.stat().st_size < 5e6
    assert content["config"]["training"]["lr"] == 5e-4 and content["config"]["provenance"]["data"] == "digits"


def test_a_teacher_survives_the_file_with_its_hash(tmp_path):
    teacher = random_teacher()
    save_teacher(tmp_path / "teacher.pt", teacher)
    loaded, config = checkpoints.load_teacher(tmp_path / "teacher.pt")
    assert_equal(loaded.state_dict(), teacher.state_dict())
    assert loaded.config == teacher.config and not loaded.training
    other, _ = checkpoints.load_teacher(save_teacher(tmp_path / "other.pt", random_teacher(seed=1)))
    hashes = [checkpoints.weights_hash(model.state_dict()) for model in (teacher, other)]
    assert config["provenance"]["teacher_hash"] == hashes[0] != hashes[1]


def test_a_slim_copy_is_the_same_student_and_nothing_is_overwritten(student_file, tmp_path, capsys):
    slim = tmp_path / "slim.pt"
    call("stores.checkpoints", "slim", student_file, slim)
    whole, small = checkpoints.load(student_file, ""), checkpoints.load(slim, "")
    assert_equal(small, {name: whole[name] for name in ("config", "step", "ema")})
    assert slim.stat().st_size < student_file.stat().st_size / 3
    ours, theirs = (checkpoints.load_student(file)[0].state_dict() for file in (student_file, slim))
    assert_equal(ours, theirs)
    with pytest.raises(UserError, match="has no raw weights"):
        checkpoints.load_student(slim, weights="raw")
    half = tmp_path / "half.pt"
    call("stores.checkpoints", "slim", student_file, half, "--precision", "fp16")
    assert half.stat().st_size < 0.6 * slim.stat().st_size
    halved = checkpoints.load_student(half)[0].state_dict()
    assert all(halved[name].dtype == ours[name].dtype for name in ours)
    assert all(torch.equal(halved[name], ours[name].half().float()) for name in ours if "times" not in name)
    before = slim.read_bytes()
    assert "the file exists already" in refused(capsys, "stores.checkpoints", "slim", student_file, slim)
    assert f"OUT {slim}: is a file" in refused(capsys, "stores.checkpoints", "slim", student_file, slim / "x")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.pt")
    foreign = ("slim", tmp_path / "foreign.pt", tmp_path / "new.pt")
    assert "no checkpoint of this project's trainers" in refused(capsys, "stores.checkpoints", *foreign)
    assert slim.read_bytes() == before and not (tmp_path / "new.pt").exists()


def test_weights_must_fit_exactly_and_be_finite():
    model, state = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3).state_dict()
    broken = {
        "missing: bias": {"weight": state["weight"]},
        "unexpected: extra": state | {"extra": torch.zeros(1)},
        r"misshapen: weight \(3, 1\) instead of \(3, 2\)": state | {"weight": torch.zeros(3, 1)},
        r"NaN or infinite values \(first in bias\)": state | {"bias": torch.full((3,), torch.inf)},
    }
    before = model.weight.clone()
    for message, content in broken.items():
        with pytest.raises(UserError, match=rf"^--ckpt-path x.pt: .*{message}"):
            checkpoints.load_weights(model, content, "--ckpt-path x.pt")
    assert torch.equal(model.weight, before)
    checkpoints.load_weights(model, state, "")
    assert torch.equal(model.weight, state["weight"])


def test_a_checkpoint_that_is_empty_cut_short_or_flipped_is_refused(tmp_path):
    path = save_teacher(tmp_path / "teacher.pt", random_teacher())
    whole = path.read_bytes()
    assert checkpoints.damaged_member(path) is None
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 16]) + whole[half + 1 :]
    for content in (b"", whole[:100], whole[:half], whole[:-1], flipped, b"PK\x03\x04" + whole):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^--teacher {path}: not a readable checkpoint \(.+\)$"):
            checkpoints.load_teacher(path)
    path.write_bytes(flipped)
    assert "/data/" in checkpoints.damaged_member(path)
    torch.save({"ema": torch.ones(2)}, path, _use_new_zipfile_serialization=False)  # as torch wrote before 1.6
    assert checkpoints.damaged_member(path) is None and checkpoints.load(path, "")["ema"].tolist() == [1, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has such a device")
def test_a_full_disk_is_an_error_of_the_system_and_leaves_what_was_there(tmp_path):
    path = save_teacher(tmp_path / "teacher.pt", random_teacher())
    before = path.read_bytes()
    (tmp_path / "teacher.pt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError) as full:
        save_teacher(path, random_teacher(seed=1))
    assert full.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["teacher.pt"]


def test_weights_of_any_shape_are_loaded_where_an_option_says_their_heads(tmp_path, capsys):
    """Bare weights from the dump to the fine-tuned student; the store remembers the heads, and others are refused."""
    shape = dict(input_size=6, patch_size=3, in_channels=1, hidden_size=36, depth=2, num_heads=3, mlp_ratio=101 / 36)
    torch.manual_seed(0)
    teacher = DiT(**shape, num_classes=10).eval()
    path, store = tmp_path / "bare.pt", tmp_path / "store"
    torch.save(teacher.state_dict(), path)
    dump = ("--teacher", path, "--out", store, "--num-trajectories", 12, "--solver-steps", 4)
    dump += ("--teacher-process", "ddpm")
    assert "give it by --teacher-heads" in refused(capsys, "sample_trajectory.py", *dump)
    assert "divisible by 5 heads" in refused(capsys, "sample_trajectory.py", *dump, "--teacher-heads", 5)
    call("sample_trajectory.py", *dump, "--teacher-heads", 3)
    loaded, config = checkpoints.load_teacher(path, heads=3, process="ddpm")
    assert loaded.config == teacher.config and config["provenance"]["teacher_heads"] == 3
    train = ("--data-path", store, *SMALL, "--iterations", 1, "--run-dir", tmp_path / "run")
    assert "teacher_heads is 3 there and 2 here" in refused(capsys, "train_ARD.py", *train, "--teacher-heads", 2)
    call("train_ARD.py", *train)
    student, config = checkpoints.load_student(tmp_path / "run/checkpoints/0000001.pt")
    assert student.config["num_heads"] == config["provenance"]["teacher_heads"] == 3
    ours = save_teacher(tmp_path / "ours.pt", teacher)
    assert "--teacher-heads 2: " in refused(capsys, "train_ARD.py", *train, "--teacher", ours, "--teacher-heads", 2)
    call("train_ARD.py", *train, "--teacher", ours)  # the same weights, whose file says it
