"""The report: its numbers are those of the files, and its page needs nothing but itself."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, call, refused

from evaluations.report import SHOWN
from evaluations.results import Model, Results


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
            call("sample_ARD.py", "--ckpt-path", run / f"checkpoints/{step:07d}.pt", "--num-samples", 66,
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
    call("evaluations.report", runs, "--out", out, "--trajectories", 20, "--columns", 5)
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
    assert (rows[4]["published"], rows[4]["published_fid"]) == ("ard-n6-m4-s4", 4.32)
    assert (rows[2]["published"], rows[0]["published"]) == ("step-s4", "teacher-25")
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
    call("evaluations.report", runs, "--out", tmp_path, "--trajectories", 20, "--columns", 5)
    for path in report.iterdir():
        if path.suffix in (".png", ".json", ".md", ".tex"):
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_folder_without_anything_of_ours_is_refused(tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/one.json").write_text("{}")
    error = refused(capsys, "evaluations.report", tmp_path / "letters", "--out", tmp_path / "out")
    assert f"FOLDER {tmp_path / 'letters'}: holds no metrics" in error and not (tmp_path / "out").exists()
    error = refused(capsys, "evaluations.report", tmp_path / "none", "--out", tmp_path / "out")
    assert f"FOLDER {tmp_path / 'none'}: no such folder" in error


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
