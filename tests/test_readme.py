"""README and docs/: their Python runs, their commands parse, their tables are those that our commands print."""

import argparse
import importlib
import json
import re
import shlex

import pytest
import torch
from helpers import ROOT, call, module_of

from lab.report.table import beside_the_paper

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/results.md").read_text()
ROOMS = ("bench", "costs", "evaluations", "lab", "stores")
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LEAST_COMMANDS = {"README.md": 7, "own-model.md": 9, "reproducing.md": 15, "text-to-image.md": 6}


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


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_the_files_that_a_page_links_to_exist(page):
    for path in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert path.startswith("https://") or (page.parent / path).exists(), path


def test_the_table_beside_the_paper_is_the_studys():
    study = ROOT / "assets" / "study"
    assert (study / "beside.md").read_text() in RESULTS
    assert (study / "rollout.md").read_text() in RESULTS
    lines = json.loads((study / "table.json").read_text())
    assert beside_the_paper(lines) in RESULTS and all(len(line["seeds"]["fid"]) == 3 for line in lines)
    four = {line["mask"]: line["degradation"] for line in lines if (line["steps"], line["target"], line["loss"]) == (
        4, "x0", "R")}  # fmt: skip
    gain = f"already has the whole gain: {four['M1']:.1f} to {four['M3']:.1f} above the teacher"
    assert gain in " ".join(RESULTS.split())


def test_the_advice_on_targets_has_the_studys_figures():
    lines = json.loads((ROOT / "assets/study/table.json").read_text())
    above = {(line["target"], line["mask"], line["loss"]): line["degradation"] for line in lines
             if line["steps"] == 4 and line["history_layers"] in (0, 2)}  # fmt: skip
    figures = (
        f"{above['xt', 'M1', 'R']:.2f} (M1) and {above['xt', 'M4', 'R']:.2f} (M4), against "
        f"{above['x0', 'M1', 'R']:.1f} and {above['x0', 'M4', 'R']:.1f} under x0",
        f"(FID {-above['x0', 'M4', 'R+D']:.2f} below the teacher's)",
    )
    text = " ".join((ROOT / "docs/own-model.md").read_text().split())
    assert all(figure in text for figure in figures)


def rows_of(text: str) -> list[dict[str, str]]:
    """The rows of a page's first table that begins with the column "row", by their columns' names."""
    table = text[text.index("| row |") :].split("\n\n")[0]
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_the_readmes_table_is_an_excerpt_of_the_studys():
    rows = rows_of(RESULTS)
    shown = rows_of(README)
    assert len(shown) == 6 and all(any(row.items() <= whole.items() for whole in rows) for row in shown)


def test_the_readme_is_short_and_links_to_every_page():
    assert len(README.splitlines()) <= 200
    assert {f"docs/{page.name}" for page in DOCS[1:]} <= set(re.findall(r"\]\(([^)#]+)\)", README))


@pytest.mark.parametrize("page", DOCS[1:], ids=lambda page: page.name)
def test_a_page_begins_with_what_it_is_for(page):
    title, blank, purpose = page.read_text().splitlines()[:3]
    assert title.startswith("# ") and not blank and re.match(r"[A-Z][a-z]", purpose), page


def all_options() -> set[str]:
    """The options of all our commands."""
    found: set[str] = set()
    for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]:
        if "def build_parser" in path.read_text():
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            parsers = [importlib.import_module(name).build_parser()]
            for parser in parsers:
                for action in parser._actions:
                    found.update(action.option_strings)
                    if isinstance(action, argparse._SubParsersAction):
                        parsers += action.choices.values()
    return found


def test_the_options_that_our_pages_name_are_some_commands():
    others = {"--nproc_per_node", "--nnodes", "--max-restarts", "--local-dir", "--include"}  # torchrun's, hf's
    for page in DOCS:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()))
        assert named <= all_options() | others, page


def commands(text: str) -> list[list[str]]:
    """The words of each of our commands in a page, behind python or torchrun: in blocks, and between backquotes."""
    fenced = re.compile(r"^```\w*\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", fenced.sub("", text))]
    found = []
    for line in lines:
        if match := re.match(r"(?:[A-Z_]+=\S+ )*(?:python|torchrun(?: --n\S+)*) (?:-m )?(\w[\w.]*)(.*)", line):
            name, rest = match.groups()
            rest = re.split(r" [#|>]", rest)[0].replace("ROW", "ard-n6-m4-s4")  # of Table 1, any
            found.append([name.removesuffix(".py"), *shlex.split(rest)])
    return found


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_command_on_a_page_is_one_that_its_own_parser_takes(page):
    found = commands(page.read_text())
    assert len(found) >= LEAST_COMMANDS.get(page.name, 0)
    for name, *words in found:
        if words and "..." not in words:
            module_of(name).build_parser().parse_args(words)


@pytest.mark.slow
@pytest.mark.parametrize("options, count", [([], 7), (["--rows"], 14), (["--flows"], 11), (["--memory"], 9)])
def test_the_tables_of_costs_are_what_the_command_counts(options, count, capsys):
    call("costs.stages", *options)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    text = (ROOT / "docs" / ("gpu.md" if "--memory" in options else "reproducing.md")).read_text()
    assert len(rows) == count and all(row in text for row in rows)
    if not options:
        columns, *stages = ([cell.strip() for cell in row.strip("| ").split("|")] for row in rows)
        by_stage = {stage[0]: dict(zip(columns, stage, strict=True)) for stage in stages}
        dump, regression, gan = (by_stage[f"{verb}.py"] for verb in ("sample_trajectory", "train_ARD", "train_ARD_gan"))
        hours = "GPU hours (estimate)"
        counted = (
            f"the dump {dump[hours]} GPU hours and {dump['disk']}, once for all rows; this row {regression[hours]}"
        )
        assert f"{counted} hours, R+D on top of it {gan[hours]}." in " ".join(README.split())
