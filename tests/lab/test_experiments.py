"""A student and its files; figures are files."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

from lab.experiments import Student
from lab.worlds import DIGITS


def test_a_student_says_where_its_files_lie(tmp_path):
    student = Student(DIGITS, tmp_path, "mine", 30)
    assert student.weights == tmp_path / "mine/checkpoints/0000030.pt" and student.samples == tmp_path / "mine.npz"
    tuned = student.tuned(5)
    assert (tuned.name, tuned.loss, tuned.weights.name) == ("mine-gan", "R+D", "0000005.pt")
    assert (str(student), student.steps) == ("ARD (R), target x0", 4)
    for blind in ({"mask": "M1"}, {"stack": 0}):
        assert Student(DIGITS, tmp_path, "m", 1, **blind).method == "step distillation"


@pytest.mark.parametrize("module", ["demo", "lab.report.page", "docs.figures"])
def test_figures_are_files_whatever_a_shell_says_of_notebooks(module):
    for backend in ("module://matplotlib_inline.backend_inline", "no such backend"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}, matplotlib; print(matplotlib.get_backend())"],
            env=os.environ | {"MPLBACKEND": backend}, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.lower() == "agg\n", done.stderr
