"""Files from elsewhere run no code, take no memory beyond their size and write nothing outside, whatever they claim.

Pickles; headers of .npy, archives and safetensors that claim more than there is; names that lead outside.
Limits on memory are set for the process (``memory_limit``).
"""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHIPPED_TEACHER, call, draw_digits, memory_limit, refused, state_of, write_images
from safetensors.torch import save_file

from runtime.cli import UserError
from stores import checkpoints
from stores.image_arrays import npz_member


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def npy(header: str, content: bytes = b"") -> bytes:
    """An .npy with any header."""
    padded = (header + " " * (-(len(header) + 11) % 64) + "\n").encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + content


def npz(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_pickles_are_never_run(tmp_path, digit_files, capsys):
    proof = tmp_path / "proof"
    touch = Touch(proof)
    pickle.loads(pickle.dumps(touch))
    assert proof.exists()  # so it would be
    proof.unlink()
    bad = tmp_path / "bad"
    bad.mkdir()
    torch.save({"ema": {"x": touch}, "config": touch}, bad / "new.pt")
    torch.save({"ema": touch}, bad / "old.pt", _use_new_zipfile_serialization=False)
    (bad / "bare.pt").write_bytes(pickle.dumps(touch))
    (bad / "renamed.safetensors").write_bytes(pickle.dumps(touch))
    good = draw_digits(100)
    write_images(bad / "objects.npz", np.array([touch] * 100, object))
    write_images(bad / "mu.npz", good, mu=np.array(touch, object), sigma=np.array(touch, object))
    write_images(bad / "note.npz", good, provenance=np.array(touch, object))
    write_images(bad / "samples.npz", good)
    np.savez(bad / "samples.digits.features.npz", key=np.array(touch, object), pool=np.array(touch, object))

    dump = ("sample_trajectory.py", "--num-trajectories", 2, "--out", tmp_path / "out", "--teacher")
    for name in ("new.pt", "old.pt", "bare.pt", "renamed.safetensors"):
        assert f"--teacher {bad}/{name}: not a readable checkpoint" in refused(capsys, *dump, bad / name)
        student = ("sample_ARD.py", "--num-samples", 2, "--out", tmp_path / "out.npz", "--ckpt-path", bad / name)
        assert f"--ckpt-path {bad}/{name}" in refused(capsys, *student)
        assert "SOURCE" in refused(capsys, "stores.checkpoints", "slim", bad / name, tmp_path / "out.pt")
        weights = ("evaluations.evaluator", *digit_files, "--allow-few", "--inception-weights", bad / name)
        assert "not the weights of torch-fidelity" in refused(capsys, *weights)
    evaluator = ("evaluations.evaluator", "--features", "digits", "--device", "cpu")
    for name in ("objects.npz", "note.npz"):
        assert f"SAMPLES {bad}/{name}: " in refused(capsys, *evaluator, digit_files[0], bad / name)
    with pytest.raises(ValueError, match="claims|allow_pickle"):
        npz_member(bad / "mu.npz", "mu")
    call(*evaluator, digit_files[0], bad / "samples.npz")
    sample = ("sample.py", "--teacher", SHIPPED_TEACHER, "--num-samples", 2, "--out", bad / "note.npz")
    assert "not a complete .npz file" in refused(capsys, *sample)
    assert not proof.exists() and [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("rows", [10**12, 10**9, -1])
@pytest.mark.parametrize("member", ["arr_0", "mu", "provenance"])
def test_an_npy_header_that_lies_takes_no_memory(rows, member, digit_files, tmp_path, capsys):
    buffer = io.BytesIO()
    np.save(buffer, draw_digits(100))
    text, kind = "[1]", "|u1" if member == "arr_0" else "<f8"
    if member == "provenance":
        header = f"{{'descr': '<U{max(rows, 1)}', 'fortran_order': False, 'shape': ({rows},), }}"
    else:
        shape = f"({rows}, 8, 8, 3)" if member == "arr_0" else f"({rows},)"
        header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    path = npz(tmp_path / "a.npz", {"arr_0.npy": buffer.getvalue()} | {f"{member}.npy": npy(header, text.encode())})
    with memory_limit(200):
        if member == "mu":
            with pytest.raises(ValueError, match="claims|negative|shape"):
                npz_member(path, "mu")
        else:
            error = refused(capsys, "evaluations.evaluator", digit_files[0], path, "--features", "digits")
            assert f"SAMPLES {path}: " in error
        if member != "mu":
            sample = ("sample.py", "--teacher", SHIPPED_TEACHER, "--num-samples", 2, "--out", path)
            refused(capsys, *sample)


def test_an_npz_that_grows_when_it_is_unpacked_takes_no_memory(tmp_path, capsys):
    """128 megabytes of zeros in 128 kilobytes, and as honest a header."""
    header = npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({1 << 24},), }}")
    path = npz(tmp_path / "bomb.npz", {"mu.npy": header + bytes(1 << 27)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with memory_limit(100), pytest.raises(ValueError, match="mu claims"):
        npz_member(path, "mu", most=1 << 24)


def test_a_checkpoint_of_packed_parts_is_refused_unread(tmp_path, capsys):
    """PyTorch packs nothing; what is packed may be of any size."""
    torch.save({"ema": {}}, tmp_path / "good.pt")
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in good.infolist():
            archive.writestr(info.filename, good.read(info) + bytes(1 << 27) * info.filename.endswith(".pkl"))
    with memory_limit(100), pytest.raises(UserError, match="--teacher .*: not a readable checkpoint .*is packed"):
        checkpoints.load(bomb, "--teacher")


def test_a_safetensors_header_that_lies_takes_no_memory(tmp_path, capsys):
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    claim = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "tensor.safetensors").write_bytes(struct.pack("<Q", len(claim)) + claim)
    with memory_limit(200):
        for name in ("huge", "tensor"):
            with pytest.raises(UserError, match="not a readable checkpoint"):
                checkpoints.load(tmp_path / f"{name}.safetensors", "--teacher")
            folder = tmp_path / f"{name}-store"
            folder.mkdir()
            content = (tmp_path / f"{name}.safetensors").read_bytes()
            (folder / "shard-00000.safetensors").write_bytes(content)
            shard = {"file": "shard-00000.safetensors", "rows": 1, "bytes": len(content), "sha256": ""}
            (folder / "manifest.json").write_text(json.dumps({"provenance": {}, "shards": [shard]}))
            assert "damaged or not a shard" in refused(capsys, "stores.trajectories", "verify", folder)


def test_names_that_lead_outside_are_never_followed(tmp_path, digit_files, capsys):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "mine.safetensors").write_text("mine")
    buffer = io.BytesIO()
    np.save(buffer, draw_digits(100))
    npz(inside / "a.npz", {"arr_0.npy": buffer.getvalue(), "../evil.npy": buffer.getvalue(), "/tmp/evil.npy": b""})
    call("evaluations.evaluator", digit_files[0], inside / "a.npz", "--features", "digits", "--device", "cpu",
         "--no-cache")  # fmt: skip
    save_file({"x": torch.zeros(1)}, inside / "shard-00000.safetensors")
    for name in ("../mine.safetensors", str(tmp_path / "mine.safetensors"), "."):
        shard = {"file": name, "rows": 1, "bytes": 4, "sha256": ""}
        (inside / "manifest.json").write_text(json.dumps({"provenance": {}, "shards": [shard]}))
        before = state_of(tmp_path)
        for command in ("verify", "repair"):
            assert "manifest" in refused(capsys, "stores.trajectories", command, inside)
        assert state_of(tmp_path) == before
