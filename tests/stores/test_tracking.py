"""A run's logs for tensorboard and for Weights & Biases, read from their own files.

Tensorboard's event files and W&B's offline runs are read by their own readers: numbers, previews, config, resuming.
Then what fails: once said, or refused before anything is written.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import NANO_TEACHER, SMALL, call, gan_options, refused, scalars
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stores.tracking import Wandb

SCRIPTS = ["train.py", "train_ARD.py", "train_ARD_gan.py"]


@pytest.fixture(scope="module")
def command(store, student_file, tmp_path_factory):
    """A function that gives the command line of a short run of a trainer, with previews and evaluations."""
    reference = tmp_path_factory.mktemp("reference") / "reference.npz"
    np.savez(reference, arr_0=np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8))

    def of(script: str, run: Path, iterations: int = 2) -> tuple:
        options = {
            "train.py": (*NANO_TEACHER, "--data-path", "digits", "--no-hflip"),
            "train_ARD.py": (*SMALL, "--data-path", store),
            "train_ARD_gan.py": gan_options(store, student_file),
        }[script]
        return (script, *options, "--sample-every", 1, "--eval-every", 2, "--eval-reference", reference,
                "--eval-features", "digits", "--eval-samples", 64, "--iterations", iterations,
                "--run-dir", run)  # fmt: skip

    return of


def lines(run: Path) -> list[tuple[int, dict[str, float]]]:
    """The step and the numbers of each line of the log."""
    found = [line.split() for line in (run / "log.txt").read_text().splitlines() if line.startswith(("step ", "eval "))]
    return [(int(line[1]), dict(zip(line[2::2], map(float, line[3::2])))) for line in found]


#################################################################################
#                                  Tensorboard                                  #
#################################################################################


@pytest.mark.parametrize("script", SCRIPTS)
def test_tensorboard_has_the_numbers_of_the_log_the_previews_and_the_config(script, command, tmp_path):
    run = tmp_path / "run"
    call(*command(script, run))
    whole = (run / "log.txt").read_text()
    without_the_last = [line for line in whole.splitlines(keepends=True) if not line.startswith("eval ")]
    (run / "log.txt").write_text("".join(without_the_last))
    for path in run.glob("events.*"):
        seen = EventAccumulator(str(path), {"images": 0})
        seen.Reload()
        path.unlink()
    assert {"loss", "grad_norm", "fid", "precision", "recall"} <= set(seen.Tags()["scalars"])
    (run / "log.txt").write_text(whole)
    for step, numbers in lines(run):
        for name, value in numbers.items():
            points = {point.step: point.value for point in seen.Scalars(name)}
            assert points[step] == pytest.approx(value, rel=1e-5)
    assert [image.step for image in seen.Images("samples")] == [1, 2]
    (run / "picture.png").write_bytes(seen.Images("samples")[-1].encoded_image_string)
    shown, kept = (np.asarray(Image.open(run / name)) for name in ("picture.png", "samples/0000002.png"))
    assert np.array_equal(shown, kept)
    text = seen.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    about = json.loads(text.strip("`\n"))
    assert about.pop("options")["eval_samples"] == 64 and about == json.loads((run / "config.json").read_text())

    # An evaluation that a kill has cut off is made up for, there as well.
    (run / "log.txt").write_text("".join(without_the_last))
    call(*command(script, run))
    (path,) = run.glob("events.*")
    seen = EventAccumulator(str(path))
    seen.Reload()
    assert [(point.step, pytest.approx(point.value, rel=1e-5)) for point in seen.Scalars("fid")] == [
        (2, scalars(run, "eval")[0]["fid"])
    ]


#################################################################################
#                               Weights & Biases                                #
#################################################################################


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """wandb without a network, with all that it writes below a folder; its process ends with the test."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def records(run: Path) -> list:
    """wandb's records in all parts of a run, in order: its log of records is LevelDB's, in blocks of 32 KiB."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # offline, a run's end does not wait for its process to write; this does
    found, part = [], b""
    for file in sorted(run.glob("wandb/*run-*/*.wandb")):
        content, at = file.read_bytes(), 7  # behind its header
        while at < len(content):
            if 32768 - at % 32768 < 7:  # no room for a record's own header: zeros
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
            part += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole one, or the last part
                found.append(Record.FromString(part))
                part = b""
    return found


def rows(run: Path) -> list[dict]:
    """The logged values, a dict for each call."""
    histories = [record.history for record in records(run) if record.WhichOneof("record_type") == "history"]
    items = [{"/".join(item.nested_key) or item.key: item.value_json for item in each.item} for each in histories]
    return [{name: json.loads(value) for name, value in each.items() if value} for each in items]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_wandb_has_the_same_and_a_resumed_run_goes_on_in_it(script, command, offline, tmp_path):
    run = tmp_path / "run"
    call(*command(script, run), "--wandb")
    name = (run / "wandb-id").read_text()
    call(*command(script, run, 3), "--wandb")
    begun = [record.run for record in records(run) if record.WhichOneof("record_type") == "run"]
    assert [(each.run_id, each.project, each.display_name) for each in begun] == [(name, "ard", "run")] * 2
    configs = [{item.key: json.loads(item.value_json) for item in each.config.update} for each in begun]
    assert [config["options"]["iterations"] for config in configs] == [2, 3]
    assert configs[0].items() >= json.loads((run / "config.json").read_text()).items()
    logged = rows(run)
    numbers = [row for row in logged if "samples/path" not in row]
    assert len(numbers) == len(lines(run)) == 5  # three steps, two evaluations
    for (step, wanted), row in zip(lines(run), numbers, strict=True):
        found = {key: value for key, value in row.items() if not key.startswith("_")}
        assert found.pop("step") == step and found == pytest.approx(wanted, rel=1e-5)
    pictures = [row for row in logged if "samples/path" in row]
    assert [row["step"] for row in pictures] == [1, 2, 3]
    for row in pictures:
        copies = [path.read_bytes() for path in run.glob(f"wandb/*run-*/files/{row['samples/path']}")]
        assert (run / f"samples/{row['step']:07d}.png").read_bytes() in copies
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "cache"}


@pytest.mark.slow
def test_a_failure_of_wandb_is_said_once_and_ends_nothing(offline, tmp_path, monkeypatch):
    said: list[str] = []
    tracker = Wandb(tmp_path, "ard", {}, said.append)
    tracker.scalars(1, {"loss": 1.0})
    assert not said
    tracker._run.finish()  # as if its process had ended
    for _ in range(2):
        tracker.scalars(2, {"loss": 0.5})
    tracker.close()
    assert len(said) == 1 and said[0].startswith("warning: --wandb: ") and "the run goes on without it" in said[0]
    assert [row["loss"] for row in rows(tmp_path)] == [1.0]

    # A server that does not know us: the run is kept.
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "no key")
    other = Wandb(tmp_path, "ard", {}, said.append)
    other.scalars(2, {"loss": 0.25})
    other.close()
    assert len(said) == 2 and f"it is kept in {tmp_path}/wandb, for `wandb sync`" in said[1]
    assert [row["loss"] for row in rows(tmp_path)] == [1.0, 0.25]


@pytest.mark.parametrize("script", SCRIPTS)
def test_wandb_is_refused_before_anything_is_written(script, command, tmp_path, capsys, monkeypatch):
    given = (*command(script, tmp_path / "run"), "--wandb")
    assert "--wandb a/b: Invalid project name 'a/b'" in refused(capsys, *given, "a/b")
    assert "--wandb: must not be empty" in refused(capsys, *given, "")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert "--wandb ard: needs a package: pip install -r requirements-extra.txt" in refused(capsys, *given)
    assert not list(tmp_path.iterdir())
