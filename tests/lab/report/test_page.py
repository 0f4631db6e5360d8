"""The report: its numbers are those of the files, and its page needs nothing but itself."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, call, refused

from lab.report.page import SHOWN
from lab.report.results import Model, Results
from lab.report.table import table


@pytest.fixture(scope="module")
def runs(tmp_path_factory, store, teacher_file, digit_files) -> Path:
    """What somebody's own work leaves: a teacher, step distillation and ARD, samples of two seeds, their metrics."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(store, folder / "trajectories")
    call("stores.trajectories", "export", store, "--out", folder / "teacher.npz")
    call("sample.py", "--teacher", teacher_file, "--num-samples", 9, "--out", folder / "alike.npz")
    for mask in ("M1", "M4"):
        run = folder / "some" / mask
        call("train_ARD.py", "--data-path", store, *SMALL, "--mask", mask, "--iterations", 2, "--ckpt-every", 1,
             "--run-dir", run)  # fmt: skip
        for step, seed in ((2, 0), (2, 1), (1, 0)):
            call("sample_ARD.py", "--ckpt-path", run / f"checkpoints/{step:07d}.pt", "--num-samples", 50,
                 "--seed", seed, "--out", folder / f"{mask}-{step}-{seed}.npz")  # fmt: skip
    for samples in [*folder.glob("M*.npz"), folder / "teacher.npz"]:
        call("evaluations.evaluator", digit_files[0], samples, "--features", "digits", "--allow-few", "--no-cache",
             "--json", samples.with_suffix(".json"))  # fmt: skip
    (folder / "notes.json").write_text('["not a metric"]')
    (folder / "broken.npz").write_bytes(b"not an archive")
    latency = [{"model": "ARD", "steps": 4, "ms_per_sample": 1.25}, {"model": "teacher", "ms_per_sample": 30.5}]
    (folder / "table.json").write_text(json.dumps(latency))
    return folder


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    call("lab.report", runs, "--out", out, "--trajectories", 20, "--columns", 5)
    return out


def test_the_tables_numbers_are_those_of_the_metric_files(runs, report):
    rows = json.loads((report / "table.json").read_text())
    assert [(row["model"], row["mask"], row["iteration"]) for row in rows] == [
        ("teacher", "-", None), ("step distillation", "M1", 1), ("step distillation", "M1", 2),
        ("ARD", "M4", 1), ("ARD", "M4", 2),
    ]  # fmt: skip
    teacher = json.loads((runs / "teacher.json").read_text())
    markdown, latex = (report / "table.md").read_text(), (report / "table.tex").read_text()
    for row in rows[1:]:
        names = [f"{row['mask']}-{row['iteration']}-{seed}.json" for seed in (0, 1)]
        files = [json.loads((runs / name).read_text()) for name in names if (runs / name).exists()]
        for figure in ("fid", "inception_score", "precision", "recall"):
            assert row[figure] == pytest.approx(np.mean([file[figure] for file in files]))
        assert row["degradation"] == pytest.approx(row["fid"] - teacher["fid"])
        spread = np.std([file["fid"] for file in files], ddof=1) if len(files) == 2 else None
        assert row["std"]["fid"] == (pytest.approx(spread) if spread else None)
        assert f"| {row['fid']:.2f}" in markdown and f"& {row['fid']:.2f}" in latex
    assert rows[4]["ms_per_sample"] == 1.25 and rows[0]["ms_per_sample"] == 30.5 and rows[2]["ms_per_sample"] is None
    assert (rows[4]["paper"]["name"], rows[4]["paper"]["fid"]) == ("ard-n6-m4-s4", 4.32)
    assert (rows[2]["paper"]["name"], rows[0]["paper"]["name"]) == ("step-s4", "teacher-25")
    assert rows[1]["paper"] is rows[3]["paper"] is None  # it stands once, below the longest training
    assert "| paper: ARD | R | x0 | M4 | 4 | 6 | - | 479.9 | 66.34 | 4.32 |" in markdown
    beside = (report / "beside.md").read_text().splitlines()
    assert len(beside) == 5 and beside[4].startswith("| ARD | R | 4 | M4 | 2 | 6 | ") and " | 4.32 | " in beside[4]
    assert rows[4]["ratio"] == pytest.approx(
        np.mean([a / b for a, b in zip(rows[2]["seeds"]["degradation"], rows[4]["seeds"]["degradation"], strict=True)])
    )
    assert 0 < rows[2]["gflops"] < rows[4]["gflops"] < rows[0]["gflops"] / 10


def test_the_page_holds_every_figure_and_points_nowhere(runs, report):
    page = (report / "report.html").read_text()
    drawn = {path.stem for path in report.glob("*.png")}
    assert drawn == {"fig4_attention", "fig5_samples", "fig6a_training", "step_errors"}
    for name in drawn:
        assert (report / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    sources = re.findall(r"""(?:src|href|data)\s*=\s*["']([^"']*)""", page)
    assert len(sources) == len(drawn) and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    for name, (title, how) in SHOWN.items():
        assert (title in page) and (name in drawn or how.split(" ")[0] in page)
    behind = json.loads((report / "figures.json").read_text())
    assert behind.keys() == drawn and all(html.escape(figure["caption"]) in page for figure in behind.values())
    curves = {line["label"]: line["values"] for line in behind["fig6a_training"]["numbers"]}
    assert curves["ARD M4, N=2"][0] == [json.loads((runs / "M4-1-0.json").read_text())["fid"]]


def test_every_picture_fits_a_column(report):
    from PIL import Image

    for path in report.glob("*.png"):
        assert abs(Image.open(path).width - 3.3 * 300) <= 1


def test_the_same_input_gives_the_same_files(runs, report, tmp_path):
    call("lab.report", runs, "--out", tmp_path, "--trajectories", 20, "--columns", 5)
    for path in report.iterdir():
        if path.suffix in (".png", ".json", ".md", ".tex"):
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_folder_without_anything_of_ours_is_refused(tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/one.json").write_text("{}")
    error = refused(capsys, "lab.report", tmp_path / "letters", "--out", tmp_path / "out")
    assert f"FOLDER {tmp_path / 'letters'}: holds no metrics" in error and not (tmp_path / "out").exists()
    error = refused(capsys, "lab.report", tmp_path / "none", "--out", tmp_path / "out")
    assert f"FOLDER {tmp_path / 'none'}: no such folder" in error


def test_it_is_not_written_over_what_it_reads(runs, capsys):
    error = refused(capsys, "lab.report", runs, "--out", runs)
    assert f"--out {runs}: is a FOLDER to read" in error
    assert json.loads((runs / "table.json").read_text())[0] == {"model": "ARD", "steps": 4, "ms_per_sample": 1.25}


def invented(folder: Path, fid: float, seed: int = 0, steps: int = 4, mask: str = "M4", layers: int = 2,
             target: str = "x0", iteration: int = 1200, count: int = 1000, **more) -> None:  # fmt: skip
    """Metrics as the evaluator writes them, of a student that was never trained; of a teacher with steps 25."""
    about: dict = {"teacher_hash": "t", "solver": "ddim", "solver_steps": 25, "cfg_scale": 1.5, "cfg_channels": 1}
    if steps != 25:
        student = {"depth": 6, "steps": steps, "mask": mask, "history_layers": layers, "level_embedding": False}
        student |= dict(input_size=8, patch_size=2, in_channels=1, hidden_size=32, num_heads=2, num_classes=10)
        training = {"loss": "R", "seed": seed, "lr": 1e-3}
        about |= {"student": student, "target": target, "step": iteration, "training": training}
    about |= {"sample_seed": seed} | more
    seen = {"samples": about, "features": "digits", "weights_sha256": "w", "adm": False, "versions": {"torch": "2"}}
    seen["reference_file"] = {"name": "photos", "listing": "l", "count": 1797}
    content = {"fid": fid, "inception_score": 7.0, "precision": 0.8, "recall": 0.5, "count": count, "provenance": seen}
    (folder / f"{len(list(folder.iterdir())):03d}.json").write_text(json.dumps(content))


def test_every_figure_from_metrics_shows_their_numbers_and_mixes_nothing(tmp_path):
    from lab.report import evidence

    shapes = [("M1", 0), ("M2", 2), ("M3", 2), ("M4", 2), ("M4", 1), ("M4", 6)]
    values = {}
    for seed in (0, 1):
        invented(tmp_path, 2 + seed, seed, steps=25)
        for target in ("x0", "xt"):
            for mask, layers in shapes:
                value = values[target, mask, layers, seed] = 3 + len(values)
                invented(tmp_path, value, seed, mask=mask, layers=layers, target=target)
                invented(tmp_path, value + 10, seed, mask=mask, layers=layers, target=target, iteration=600)
            for k in (1, 2, 3):
                invented(tmp_path, 10 * k, seed, target=target, teacher_steps=k)
    for layers in (0, 2, 6):  # others, trained longer: fewer, so not those of the figures
        invented(tmp_path, 1.0, mask="M4" if layers else "M1", layers=layers, iteration=3000)
    invented(tmp_path, 99.0, seed=2, dtype="bf16")  # nor is this a third seed
    invented(tmp_path, 99.0, seed=2, trajectories=500)
    found = Results([tmp_path, tmp_path / ".." / tmp_path.name])

    def of(*names, target="x0"):
        return [values[(target, *names, seed)] for seed in (0, 1)]

    (first, second) = sorted(evidence.over_layers(found).numbers, key=lambda line: line["label"])
    assert first["x"] == second["x"] == [0, 1, 2, 6] and "1200 training steps" in evidence.over_layers(found).caption
    assert first["values"] == [of("M1", 0), of("M4", 1), of("M4", 2), of("M4", 6)]
    bars = evidence.noise_or_history(found).numbers
    lost = [value - 2.5 for value in of("M3", 2, target="xt")]  # the teacher's mean of this folder
    assert bars["target xt"]["M3: and the noise"] == lost and len(bars["target x0"]) == 4
    taken = {line["label"]: line for line in evidence.from_teachers_points(found).numbers}
    assert taken["ARD, x0"]["x"] == [0, 1, 2, 3] and taken["ARD, x0"]["values"][0] == of("M4", 2)
    assert taken["ARD, xt"]["values"][1:] == [[10, 10], [20, 20], [30, 30]]
    curves = {line["label"]: line for line in evidence.targets_over_training(found).numbers}
    assert curves["ARD, xt"]["x"] == [600, 1200]
    assert curves["ARD, xt"]["values"][1] == of("M4", 2, target="xt") and len(curves) == 4
    rows = table(found)
    (row,) = [r for r in rows if (r["target"], r["mask"], r["history_layers"], r["iteration"]) == ("xt", "M4", 2, 1200)]
    lost = [np.subtract(of(*shape, target="xt"), 2.5) for shape in (("M1", 0), ("M4", 2))]
    assert row["ratio"] == pytest.approx(np.mean(lost[0] / lost[1])) and row["std"]["ratio"] > 0
    invented(tmp_path, 1.0, steps=25, count=50_000)  # no teacher of so few samples
    (again,) = [r for r in table(Results([tmp_path])) if r["files"] == row["files"]]
    assert again["degradation"] == row["degradation"]


def test_a_models_place_in_the_papers_table():
    def student(steps: int, mask: str, layers: int, loss: str = "R", target: str = "x0") -> Model:
        shape = {"steps": steps, "mask": mask, "history_layers": layers, "depth": 6}
        return Model({"student": shape, "target": target, "training": {"loss": loss}, "teacher_hash": "a"})

    places = [
        (student(1, "M4", 2), "kd"),
        (student(2, "M4", 0), "step-s2"),
        (student(4, "M1", 3), "step-s4"),
        (student(4, "M4", 1), "ard-n6-m4-s4"),
        (student(4, "M4", 6), "ard-n28-m4-s4"),
        (student(4, "M2", 2), "ard-n6-m2-s4"),
        (student(4, "M4", 2, "R+D"), "ard-n6-m4-s4-gan"),
        (student(4, "M4", 2, target="xt"), None),
        (student(8, "M4", 2), None),
    ]
    for model, place in places:
        assert model.published() == place


def test_samples_that_began_at_the_teachers_points_are_no_rows_of_the_table(runs, tmp_path):
    content = json.loads((runs / "M4-2-0.json").read_text())
    (tmp_path / "plain.json").write_text(json.dumps(content))
    content["provenance"]["samples"]["teacher_steps"] = 2
    (tmp_path / "given.json").write_text(json.dumps(content))
    found = Results([tmp_path])
    assert len(found.metrics) == 2
    assert [[result.path.name for result in row.results] for row in found.table()] == [["plain.json"]]
