"""Sample files: finished ones are left alone, others refused, broken-off ones continued, whoever began them."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from helpers import arrays, call, flip, refused, start
from PIL import Image

from runtime.cli import UserError
from runtime.distributed import DistributedContext
from stores.samples import SampleWriter, range_of, save_grid

PROVENANCE = {"seed": 3, "teacher": {"solver_indices": [6, 25]}}


def fill(path, count: int, stop_after: int | None = None, provenance: dict = PROVENANCE) -> list[int]:
    """Write grey samples, of which number i has the grey i, four at a time; the indices that were asked for."""
    asked = []
    with SampleWriter(path, count, provenance, DistributedContext(), keep_latents=True) as writer:
        for indices in writer.missing_batches(4):
            if stop_after is not None and len(asked) >= stop_after:
                raise RuntimeError("power cut")
            grey = torch.tensor(indices) / 127.5 - 1
            images, latents = grey.view(-1, 1, 1, 1).expand(-1, 1, 4, 4), grey.view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
            writer.write(indices, latents, images, torch.tensor(indices) % 10)
            asked += indices
    return asked


def finished(path) -> list[int]:
    """The samples that an unfinished file holds."""
    return [i for part in sorted(path.with_suffix(".partial").glob("*-*.npz")) for i in range_of(part)]


def test_a_file_that_broke_off_is_continued_and_nothing_is_drawn_twice(tmp_path):
    path = tmp_path / "new" / "samples.npz"
    with pytest.raises(RuntimeError, match="power cut"):
        fill(path, 10, stop_after=8)
    assert not path.exists()
    done = finished(path)
    assert done in ([0, 1, 2, 3], list(range(8)))  # the write under way may or may not have ended
    assert fill(path, 10) == [i for i in range(10) if i not in done]
    found = arrays(path)
    assert (found["arr_0"] == np.arange(10)[:, None, None, None]).all() and found["arr_0"].shape == (10, 4, 4, 3)
    assert found["arr_1"].tolist() == list(range(10)) and found["latents"].shape == (10, 1, 2, 2)
    assert sorted(file.name for file in path.parent.iterdir()) == ["samples.npz", "samples.png"]
    assert fill(path, 10) == []


def test_a_damaged_part_is_drawn_again_and_one_of_unknown_origin_refused(tmp_path):
    path = tmp_path / "samples.npz"
    with pytest.raises(RuntimeError, match="power cut"):
        fill(path, 10, stop_after=8)
    part = path.with_suffix(".partial") / "00000000-00000004.npz"
    flip(part, 300)
    with pytest.raises(UserError, match="was damaged and is removed"):
        fill(path, 10)
    assert fill(path, 10) == [0, 1, 2, 3] and (arrays(path)["arr_0"][:, 0, 0, 0] == np.arange(10)).all()
    with pytest.raises(RuntimeError, match="power cut"):
        fill(tmp_path / "other.npz", 10, stop_after=8)
    (tmp_path / "other.partial/provenance.json").write_text("")
    with pytest.raises(UserError, match="does not say whose samples it holds"):
        fill(tmp_path / "other.npz", 10)


def test_ranks_share_what_is_missing_in_consecutive_batches(tmp_path):
    writers = [SampleWriter(tmp_path / "s.npz", 10, {}, DistributedContext(rank, 3)) for rank in range(3)]
    for writer in writers:
        writer._missing = [0, 1, 2, 5, 6, 7, 8, 9]
    batches = [list(writer.missing_batches(2)) for writer in writers]
    assert batches == [[[0, 1]], [[2], [5, 6]], [[7, 8], [9]]]


def test_small_images_are_enlarged_by_whole_factors(tmp_path):
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(-1, 1, 8, 8) * 40
    save_grid(tmp_path / "grid.png", images, columns=3)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (6 * (3 * 9 + 1), 6 * (2 * 9 + 1))
        assert [picture.getpixel((6 * (9 * i + 5), 6 * 5))[0] for i in range(3)] == [0, 40, 80]


def test_finished_samples_are_left_alone_and_others_refused(student_file, tmp_path, capsys):
    command = ("sample_ARD.py", "--ckpt-path", student_file, "--out", tmp_path / "s.npz", "--num-samples")
    call(*command, 4)
    before = (tmp_path / "s.npz").stat().st_mtime_ns
    call(*command, 4)
    assert (tmp_path / "s.npz").stat().st_mtime_ns == before
    assert "count is 4 there and 5 here" in refused(capsys, *command, 5)


@pytest.mark.slow
def test_killed_sampling_is_continued_and_loses_nothing(teacher_file, tmp_path):
    common = ["--teacher", teacher_file, "--num-samples", 600, "--per-proc-batch-size", 20]
    common += ["--solver-steps", 10, "--out"]
    process = start("sample.py", *common, tmp_path / "killed.npz")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not finished(tmp_path / "killed.npz"):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert 20 <= len(finished(tmp_path / "killed.npz")) < 600 and not (tmp_path / "killed.npz").exists()
    call("sample.py", *common, tmp_path / "killed.npz")
    call("sample.py", *common, tmp_path / "whole.npz")
    killed, whole = arrays(tmp_path / "killed.npz"), arrays(tmp_path / "whole.npz")
    assert np.abs(killed["arr_0"].astype(int) - whole["arr_0"]).max() <= 1
    assert (killed["arr_1"] == whole["arr_1"]).all()


def test_a_picture_of_somebody_else_is_not_replaced_by_the_grid(tmp_path):
    path, mine = tmp_path / "samples.npz", tmp_path / "samples.png"
    for content in (b"my letter", b""):
        mine.write_bytes(content)
        with pytest.raises(UserError, match="samples.png: exists already and is not a grid of samples; give"):
            fill(path, 4)
        assert mine.read_bytes() == content and not path.exists()
    Image.new("RGB", (3, 3)).save(mine)
    with pytest.raises(UserError, match="is not a grid of samples"):
        fill(path, 4)
    mine.unlink()
    fill(path, 4)
    path.unlink()  # its grid stays, and may be drawn anew
    fill(path, 5)
    with Image.open(mine) as picture:
        assert picture.width > 3
