"""The report: the committed study is redrawn from its metrics, real runs give every figure, and its page is whole.

A study's metrics are written back from assets/study; a small teacher and two students are trained, sampled and judged.
What does not belong together is refused, and nothing is mixed.
"""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, call, refused
from PIL import Image

from lab.report import evidence
from lab.report.page import SHOWN
from lab.report.results import Model, Results
from stores import checkpoints

STUDY = ROOT / "assets/study"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """The metrics that the committed study left, written back from its table and its figures."""
    folder = tmp_path_factory.mktemp("study")
    shape = checkpoints.load(ROOT / "assets/digits_teacher.pt", "")["config"]["model"]
    teacher = {"teacher_hash": "df233531d511a1bf", "solver": "ddim", "solver_steps": 25, "cfg_scale": 1.5}

    def write(name: str, about: dict, count: int, seed: int, figures: dict) -> None:
        training = about.get("training") and {"training": about["training"] | {"seed": seed}}
        seen = {"samples": teacher | about | {"seed": seed} | (training or {}), "features": "digits", "adm": False}
        seen |= {"weights_sha256": "w", "versions": {"torch": "2.15.0"}}
        seen["reference_file"] = {"listing": "l", "count": 1797}
        path = folder / f"seed{seed}" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures | {"count": count, "provenance": seen}))

    def student(steps: int, mask: str, layers: int, target: str, loss: str = "R", step: int = 1200) -> tuple[str, dict]:
        config = shape | dict(steps=steps, mask=mask, history_layers=layers, level_embedding=False)
        training = {"loss": loss, "global_batch_size": 64 if loss == "R" else 48}
        name = f"s{steps}-{mask}-n{layers}-{target}".lower() + ("-gan" if loss == "R+D" else "")
        return name, {"student": config, "target": target, "step": step, "training": training}

    times = []
    for row in json.loads((STUDY / "table.json").read_text()):
        name, about = ("teacher", {})
        if row["model"] != "teacher":
            target = row["target"].replace("-", "x0")
            name, about = student(*(row[k] for k in ("steps", "mask", "history_layers")), target, row["loss"],
                                  row["iteration"])  # fmt: skip
        for seed in range(3):
            figures = {key: row["seeds"][key][seed] for key in ("fid", "inception_score", "precision", "recall")}
            write(name, about, 10_000, seed, figures)
        times.append({"name": name, "ms_per_sample": row["ms_per_sample"], "timed": row["timed"][0]})
    (folder / "seed0/table.json").write_text(json.dumps(times))
    drawn = json.loads((STUDY / "figures.json").read_text())
    masks = {"step distillation": ("M1", 0), "ARD": ("M4", 2)} | {f"ARD M{i}, N=2": (f"M{i}", 2) for i in (2, 3, 4)}
    for figure in ("fig6a_training", "fig8_targets", "fig6b_teacher_steps"):
        for line in drawn[figure]["numbers"]:
            label, _, target = line["label"].rpartition(", x")
            mask = masks[label or line["label"]]
            for x, values in zip(line["x"], line["values"], strict=True):
                k = {"teacher_steps": x} if "teacher" in figure else {}
                name, about = student(4, *mask, f"x{target}" if label else "x0", step=1200 if k else x)
                path = f"teacher-steps/{name}-{x}" if k else f"curves/{name}-{x:07d}"
                for seed, value in enumerate(values if x else []):
                    write(path, about | k, 2000, seed, {"fid": value})
    return folder


def test_the_committed_study_is_redrawn_from_its_metrics(study, tmp_path):
    call("lab.report", study, "--out", tmp_path)
    for name in ("table.md", "beside.md"):
        assert (tmp_path / name).read_text() == (STUDY / name).read_text()
    lines, committed = (json.loads((folder / "table.json").read_text()) for folder in (tmp_path, STUDY))
    for line in lines + committed:
        line["files"] = [path.rpartition("/")[2] for path in line["files"]]
    assert lines == committed
    found, committed = (json.loads((folder / "figures.json").read_text()) for folder in (tmp_path, STUDY))
    others = {"fig4_attention", "fig5_samples", "fig10_manipulation", "step_errors"}  # need more than metrics
    assert found == {name: figure for name, figure in committed.items() if name not in others}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, store, teacher_file, digit_files) -> Path:
    """One seed of somebody's own work: a teacher, step distillation and ARD, their samples, and metrics."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(store, folder / "trajectories")
    call("stores.trajectories", "export", store, "--out", folder / "teacher.npz")
    call("sample.py", "--teacher", teacher_file, "--num-samples", 9, "--out", folder / "teacher-same-noise.npz")
    for mask in ("M1", "M4"):
        run = folder / mask
        call("train_ARD.py", "--data-path", store, *SMALL, "--mask", mask, "--iterations", 2, "--ckpt-every", 1,
             "--run-dir", run)  # fmt: skip
        for step, samples in ((2, f"{mask}.npz"), (1, f"curves/{mask}-1.npz"), (2, f"curves/{mask}-2.npz")):
            call("sample_ARD.py", "--ckpt-path", run / f"checkpoints/{step:07d}.pt", "--num-samples", 50,
                 "--out", folder / samples)  # fmt: skip
    call("sample_ARD.py", "--ckpt-path", run / "checkpoints/0000002.pt", "--num-samples", 5, "--source-images",
         digit_files[0], "--source-step", 1, "--out", folder / "manipulation/m.npz")  # fmt: skip
    for samples in [*folder.rglob("M*.npz"), folder / "teacher.npz"]:
        call("evaluations.evaluator", digit_files[0], samples, "--features", "digits", "--allow-few", "--no-cache",
             "--json", samples.with_suffix(".json"))  # fmt: skip
    (folder / "notes.json").write_text('["not a metric"]')
    (folder / "table.json").write_text(json.dumps([{"name": "M4", "ms_per_sample": 1.25, "timed": "a clock"}]))
    return folder


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    call("lab.report", runs, "--out", out, "--trajectories", 20, "--columns", 5)
    return out


def test_the_tables_numbers_are_those_of_the_metric_files(runs, report):
    rows = json.loads((report / "table.json").read_text())
    assert [row["model"] for row in rows] == ["teacher", "step distillation", "ARD"]
    files = [json.loads((runs / f"{name}.json").read_text()) for name in ("teacher", "M1", "M4")]
    markdown, latex = (report / "table.md").read_text(), (report / "table.tex").read_text()
    for row, file in zip(rows, files, strict=True):
        for figure in ("fid", "inception_score", "precision", "recall"):
            assert row[figure] == file[figure] and row["std"][figure] is None
        assert row["degradation"] == file["fid"] - files[0]["fid"]
        assert f"| {row['fid']:.2f}" in markdown and f"& {row['fid']:.2f}" in latex
    assert [row["ms_per_sample"] for row in rows] == [None, None, 1.25] and "median (a clock)" in markdown
    assert [row["paper"]["name"] for row in rows] == ["teacher-25", "step-s4", "ard-n6-m4-s4"]
    assert 0 < rows[1]["gflops"] < rows[2]["gflops"] < rows[0]["gflops"] / 10


def test_the_page_holds_every_figure_and_points_nowhere(runs, report):
    page = (report / "report.html").read_text()
    drawn = {path.stem for path in report.glob("*.png")}
    assert drawn == {"fig4_attention", "fig5_samples", "fig6a_training", "fig10_manipulation", "step_errors"}
    for name in drawn:
        assert (report / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert abs(Image.open(report / f"{name}.png").width - 3.3 * 300) <= 1  # it fits a column
    sources = re.findall(r"""(?:src|href|data)\s*=\s*["']([^"']*)""", page)
    assert len(sources) == len(drawn) and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    for name, (title, how, _) in SHOWN.items():
        assert (title in page) and (name in drawn) != (html.escape(f"{title}: {how}") in page)
    behind = json.loads((report / "figures.json").read_text())
    assert behind.keys() == drawn and all(html.escape(figure["caption"]) in page for figure in behind.values())
    curves = {line["label"]: line["values"] for line in behind["fig6a_training"]["numbers"]}
    assert curves["ARD M4, N=2"][0] == [json.loads((runs / "curves/M4-1.json").read_text())["fid"]]


def test_the_same_input_gives_the_same_files(runs, report, tmp_path):
    call("lab.report", runs, "--out", tmp_path, "--trajectories", 20, "--columns", 5)
    for path in report.iterdir():
        if path.suffix in (".png", ".json", ".md", ".tex"):
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_curves_come_from_the_runs_own_logs_where_there_are_no_metrics(runs, tmp_path):
    shutil.copytree(runs / "M4", tmp_path / "M4")
    with (tmp_path / "M4/log.txt").open("a") as log:
        log.write("eval 0000001 fid 12.5 recall 0.5\neval 0000002 fid 1.0 recall 0.5\n")
    found = evidence.over_training(Results(tmp_path))
    assert found.numbers == [{"label": "ARD M4, N=2", "x": [1, 2], "values": [[12.5], [1.0]]}]
    assert "as logged by --eval-every" in found.caption and found.figure.axes[0].get_yscale() == "log"


def test_a_page_of_runs_without_metrics_has_no_empty_table(runs, tmp_path):
    shutil.copytree(runs / "M4", tmp_path / "runs/M4")
    call("lab.report", tmp_path / "runs", "--store", runs / "trajectories", "--out", tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "<h2>Table 1" not in page and "<li>Table 1: metrics of the evaluator" in page


def test_what_does_not_belong_together_is_refused(study, runs, tmp_path, capsys):
    (tmp_path / "letter.json").write_text("{")
    error = refused(capsys, "lab.report", tmp_path, "--out", tmp_path / "out")
    assert f"{tmp_path}/letter.json: not a file of JSON" in error
    (tmp_path / "letter.json").write_text('{"provenance": {"samples": null}}')  # metrics of somebody's own samples
    assert f"FOLDER {tmp_path}: holds no metrics" in refused(capsys, "lab.report", tmp_path, "--out", tmp_path / "out")
    assert "no such folder" in refused(capsys, "lab.report", tmp_path / "none", "--out", tmp_path / "out")
    assert f"--out {runs}: is the FOLDER to read" in refused(capsys, "lab.report", runs, "--out", runs)
    folder = shutil.copytree(study, tmp_path / "study")
    path = folder / "seed1/s4-m4-n2-x0.json"
    for key, value, error in (
        ("teacher_hash", "b", "teacher_hash is 'b' there"), ("dtype", "bf16", "dtype is None there"),
    ):  # fmt: skip
        content = json.loads((study / "seed1" / path.name).read_text())
        content["provenance"]["samples"][key] = value
        for seed in (0, 1, 2) if key == "teacher_hash" else (1,):
            (folder / f"seed{seed}" / path.name).write_text(json.dumps(content))
        assert error in refused(capsys, "lab.report", folder, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps, mask, layers, place", [
    (1, "M4", 2, "kd"), (2, "M4", 0, "step-s2"), (4, "M1", 3, "step-s4"), (8, "M4", 2, None),
])  # fmt: skip
def test_a_model_without_history_is_in_its_place_whatever_its_mask_is_called(steps, mask, layers, place):
    shape = {"steps": steps, "mask": mask, "history_layers": layers, "depth": 6}
    assert Model.of({"student": shape, "target": "x0", "training": {"loss": "R"}}).published() == place
