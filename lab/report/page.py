"""The paper's evidence redrawn from finished runs: Table 1, Figs. 4, 5, 6, 8, 10, and what the paper leaves open.

    python -m lab.report results/demo --out results/demo/report
    python -m lab.report results/study --out results/study/report --store results/study/unseen

Folders may be laid out in any way: samples (.npz), metrics of evaluations.evaluator (.json), runs and trajectory stores
say themselves what they are. What is not there yet is left out, and the page says what makes it. Writes table.md,
table.tex and table.json, beside.md (only what the paper has as well), each figure as .pdf and .png, what they show as
figures.json, and report.html, one file that needs no network.
"""

import argparse
import html
import json
from collections.abc import Callable
from pathlib import Path

import torch

from bench.timing import about_device
from lab.report import evidence, figures, measured
from lab.report.figures import Picture, inline_png
from lab.report.results import Results
from lab.report.table import COLUMNS, as_latex, as_markdown, beside_the_paper, notes, printed, table
from runtime import cli
from runtime.cli import UserError
from runtime.files import write_text
from stores.trajectories import TrajectoryStore

# Name of the file: what it shows, and what makes its input where it is missing.
SHOWN = {
    "fig4_attention": ("Fig. 4: attention to history", "train_ARD.py --mask M4"),
    "fig5_samples": ("Fig. 5: samples from the same noise", "sample.py and sample_ARD.py with the same --seed"),
    "fig6a_training": ("Fig. 6a: FID while training", "metrics of several checkpoints, or --eval-every"),
    "fig6b_teacher_steps": ("Fig. 6b: error accumulation", "sample_ARD.py --teacher-steps k, for several k"),
    "fig6c_layers": ("Fig. 6c: FID against N", "train_ARD.py --stack N for several N"),
    "fig8_targets": ("Fig. 8: targets", "train_ARD.py --target xt, and metrics of several checkpoints"),
    "fig10_manipulation": ("Fig. 10: image manipulation", "sample_ARD.py --source-images FOLDER --source-step k"),
    "step_errors": ("Exposure bias: error of each step", "a trajectory store, --store"),
    "noise_or_history": ("Is it history, or the noise?", "train_ARD.py --mask M3, with both targets"),
}

#################################################################################
#                                    Figures                                    #
#################################################################################


def builders(results: Results, stores: list[Path], trajectories: int, columns: int) -> dict[str, Callable]:
    """What draws each figure of ``SHOWN``; each returns None where its input is not there yet."""
    return {
        "fig4_attention": lambda: measured.attention(results, trajectories),
        "fig5_samples": lambda: evidence.same_noise(results, columns),
        "fig6a_training": lambda: evidence.over_training(results, lambda m: m.name, lambda m: m.target == "x0"),
        "fig6b_teacher_steps": lambda: evidence.from_teachers_points(results),
        "fig6c_layers": lambda: evidence.over_layers(results),
        "fig8_targets": lambda: evidence.targets_over_training(results),
        "fig10_manipulation": lambda: evidence.manipulation(results, columns),
        "step_errors": lambda: measured.errors(results, stores, trajectories),
        "noise_or_history": lambda: evidence.noise_or_history(results),
    }


#################################################################################
#                                   The page                                    #
#################################################################################

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #111;
  background: #fff }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 12px; white-space: nowrap }}
th, td {{ padding: .2rem .5rem; border-bottom: 1px solid #ccc; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
figure {{ margin: 0 0 2rem }}
figure img {{ width: 100%; max-width: 26rem; height: auto }}
p {{ max-width: 60rem }}
figcaption {{ font-size: 13px; max-width: 40rem; color: #333 }}
</style></head><body>
<h1>{title}</h1>
<p>{about}</p>
{body}
</body></html>
"""


def page(folders: list[str], lines: list[dict], text: list[str], shown: dict[str, tuple[str, Path]]) -> str:
    """The page: ``shown`` has caption and PNG of each figure that is there."""
    parts = ["<h2>Table 1</h2>"]
    if lines:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS.values())
        body = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in printed(lines, "±")]
        parts.append(
            f'<div class="wide"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in body)}</table></div>'
        )
        parts += [f"<p>{html.escape(note)}</p>" for note in text]
    for name, (title, _) in SHOWN.items():
        if name in shown:
            caption, picture = shown[name]
            image = f'<img src="{inline_png(picture)}" alt="{html.escape(title)}">'
            parts.append(f"<h2>{html.escape(title)}</h2>")
            parts.append(f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>")
    missing = [
        f"<li>{html.escape(f'{title}: {how}')}</li>" for name, (title, how) in SHOWN.items() if name not in shown
    ]
    if missing:
        parts.append(f"<h2>Not there yet</h2><p>Each needs:</p><ul>{''.join(missing)}</ul>")
    device = about_device(torch.device("cpu"))
    about = f"From {', '.join(folders)}; drawn on {device['date']} with PyTorch {device['torch']}, {device['on']}."
    title = "Autoregressive distillation: evidence from runs"
    return PAGE.format(title=title, about=html.escape(about), body="\n".join(parts))


#################################################################################
#                                  The command                                  #
#################################################################################


def write_report(
    folders: list[str], out: Path, *, stores: list[str], trajectories: int = 256, columns: int = 8
) -> dict[str, Picture]:
    """Everything into ``out``; returns the figures that there was input for. ``UserError`` where there is nothing."""
    results = Results(Path(folder) for folder in folders)
    lines = table(results)
    if not lines and not results.runs and not results.samples:
        raise UserError(
            f"FOLDER {' '.join(folders)}: holds no metrics of evaluations.evaluator, no samples and no runs"
        )
    opened = [Path(store) for store in stores] or results.stores
    drawn = {name: build() for name, build in builders(results, opened, trajectories, columns).items()}
    pictures = {name: picture for name, picture in drawn.items() if picture is not None}
    for name, picture in pictures.items():
        figures.save(picture.figure, out / name)
    text = notes(lines, results) if lines else []
    write_text(out / "table.json", json.dumps(lines, indent=1) + "\n")
    write_text(out / "table.md", as_markdown(lines, text))
    write_text(out / "table.tex", as_latex(lines, text))
    write_text(out / "beside.md", beside_the_paper(lines))
    shown = {name: (picture.caption, out / f"{name}.png") for name, picture in pictures.items()}
    behind = {name: {"caption": picture.caption, "numbers": picture.numbers} for name, picture in pictures.items()}
    write_text(out / "figures.json", json.dumps(behind) + "\n")
    write_text(out / "report.html", page(folders, lines, text, shown))
    return pictures


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="lab.report", description="Redraw the paper's table and figures from runs.")
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="Look for runs, samples and metrics in here.")
    parser.add_argument("--out", type=Path, required=True, help="Folder to write the report to.")
    parser.add_argument(
        "--store", nargs="+", default=[], metavar="DIR", help="Trajectories for the errors of steps; else those found."
    )
    parser.add_argument("--trajectories", type=cli.positive, default=256, help="Measure on so many of them.")
    parser.add_argument("--columns", type=cli.positive, default=8, help="Samples in a row of pictures.")
    return parser


def run(args: argparse.Namespace) -> None:
    for folder in args.folders:
        if cli.existing_folder("FOLDER", folder).resolve() == args.out.resolve():
            raise UserError(f"--out {args.out}: is a FOLDER to read, give another one, such as {args.out / 'report'}")
    for store in args.store:
        TrajectoryStore(store, "--store")
    options = {"stores": args.store, "trajectories": args.trajectories, "columns": args.columns}
    pictures = write_report(args.folders, args.out, **options)
    print(f"{args.out}/report.html: {', '.join(pictures)}")
