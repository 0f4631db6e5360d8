"""What the README shows runs, and prints what the README says."""

import re

import pytest
import torch
from helpers import ROOT

README = (ROOT / "README.md").read_text()


def test_the_ten_lines_of_python_run_as_printed(monkeypatch):
    monkeypatch.chdir(ROOT)
    code, _ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    names: dict = {}
    exec(code, names)
    teacher, student = names["teacher"], names["student"]
    assert names["predictions"].shape == (8, 4, *teacher.latent_shape)
    assert names["samples"].shape == (8, *teacher.latent_shape) and names["samples"].isfinite().all()
    assert student.config.items() >= teacher.config.items()
    # From one noise and the teacher's heads, every step of this untrained student is the teacher at its own time.
    first = teacher(names["noise"], torch.full((8,), 999), names["labels"])[:, :1]
    torch.testing.assert_close(names["predictions"][:, 0], first, rtol=0, atol=1e-5)


def test_the_pipelines_block_runs_as_printed(student_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(code.replace("results/demo/ard-x0/checkpoints/0000600.pt", str(student_file)), names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 2 and (tmp_path / "three.png").is_file()
    assert names["pipe"].config.keys() and (tmp_path / "digits-ard/README.md").is_file()


def test_the_files_that_the_readme_links_to_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("https://") or (ROOT / path).exists(), path


@pytest.mark.slow
def test_the_table_of_costs_is_what_the_command_counts(capsys):
    from evaluations import costs
    from runtime import cli

    cli.main(costs.build_parser(), costs.run, [])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 7 and all(row in README for row in rows)
