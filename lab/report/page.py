"""The paper's evidence redrawn from runs: Table 1, Figs. 2c, 4, 5, 6, 8, 9 and 10, and what the paper leaves open.

    python -m lab.report results/demo --out results/demo/report

FOLDER is laid out as results.py says, which is what `make study` and `make demo` leave. What is missing is left out,
and the page says what makes it. Writes table.md, table.tex and table.json, beside.md (only what the paper has as well),
each figure as .pdf and .png, their numbers as figures.json, and report.html, one file that needs no network.
"""

import argparse
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch

from bench.timing import about_device
from lab.report import evidence, measured
from lab.report.figures import STYLE, Picture, inline_png, save
from lab.report.results import Results
from lab.report.table import COLUMNS, as_latex, as_markdown, beside_the_paper, notes, printed, table
from runtime import cli
from runtime.cli import UserError
from runtime.files import write_text
from stores.trajectories import TrajectoryStore

# Name of the file: what it shows, what makes its input where it is missing, and what draws it.
SHOWN: dict[str, tuple[str, str, Callable[[Results], Picture | None]]] = {
    "fig2c_efficiency": ("Fig. 2c: FID against GFLOPs", "metrics for several --steps", evidence.efficiency),
    "fig4_attention": ("Fig. 4: attention to history", "train_ARD.py --mask M4", measured.attention),
    "fig5_samples": ("Fig. 5: samples from the same noise", "samples with the same --seed", evidence.same_noise),
    "fig6a_training": ("Fig. 6a: FID while training", "curves/, or --eval-every", evidence.over_training),
    "fig6b_teacher_steps": ("Fig. 6b: error accumulation", "teacher-steps/", evidence.from_teachers_points),
    "fig6c_layers": ("Fig. 6c: FID against N", "metrics for several N", evidence.fid_over_layers),
    "fig8_targets": ("Fig. 8: targets", "curves/ of --target x0 and xt", evidence.targets_over_training),
    "fig9_layers": ("Fig. 9: IS, precision, recall against N", "metrics for several N", evidence.others_over_layers),
    "fig10_manipulation": ("Fig. 10: image manipulation", "manipulation/", evidence.manipulation),
    "step_errors": ("Exposure bias: error of each step", "unseen/, trajectories, or --store", measured.errors),
    "noise_or_history": ("Is it history, or the noise?", "M1 to M4 under both targets", evidence.noise_or_history),
}

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


def page(folder: Path, lines: list[dict], text: list[str], shown: dict[str, tuple[str, Path]]) -> str:
    """The page: ``shown`` has caption and PNG of each figure that is there."""
    parts, missing = [], []
    if lines:
        parts.append("<h2>Table 1</h2>")
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in printed(lines))
        head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS.values())
        parts.append(f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>')
        parts += [f"<p>{html.escape(note)}</p>" for note in text]
    else:
        missing.append("<li>Table 1: metrics of the evaluator beside samples, NAME.json and NAME.npz</li>")
    for name, (title, how, _) in SHOWN.items():
        if name in shown:
            caption, picture = shown[name]
            image = f'<img src="{inline_png(picture)}" alt="{html.escape(title)}">'
            parts.append(f"<h2>{html.escape(title)}</h2>")
            parts.append(f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>")
        else:
            missing.append(f"<li>{html.escape(f'{title}: {how}')}</li>")
    if missing:
        parts.append(f"<h2>Not there yet</h2><p>Each needs, see lab/report/results.py:</p><ul>{''.join(missing)}</ul>")
    device = about_device(torch.device("cpu"))
    about = f"From {folder}; drawn on {device['date']} with PyTorch {device['torch']}, {device['on']}."
    title = "Autoregressive distillation: evidence from runs"
    return PAGE.format(title=title, about=html.escape(about), body="\n".join(parts))


def write_report(folder: Path, out: Path, **options: Any) -> dict[str, Picture]:
    """Everything into ``out``; returns the figures that there was input for. ``options`` are those of ``Results``.

    ``UserError`` where the folder holds nothing.
    """
    results = Results(folder, **options)
    lines = table(results)
    with matplotlib.rc_context(STYLE):
        drawn = {name: draw(results) for name, (_, _, draw) in SHOWN.items()}
        pictures = {name: picture for name, picture in drawn.items() if picture is not None}
        for name, picture in pictures.items():
            save(picture.figure, out / name)
    if not lines and not pictures:
        raise UserError(f"FOLDER {folder}: holds no metrics, samples or runs where lab/report/results.py says they lie")
    text = notes(lines, results) if lines else []
    write_text(out / "table.json", json.dumps(lines, indent=1) + "\n")
    write_text(out / "table.md", as_markdown(lines, text))
    write_text(out / "table.tex", as_latex(lines, text))
    write_text(out / "beside.md", beside_the_paper(lines))
    behind = {name: {"caption": picture.caption, "numbers": picture.numbers} for name, picture in pictures.items()}
    write_text(out / "figures.json", json.dumps(behind) + "\n")
    shown = {name: (picture.caption, out / f"{name}.png") for name, picture in pictures.items()}
    write_text(out / "report.html", page(folder, lines, text, shown))
    return pictures


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="lab.report", description="Redraw the paper's table and figures from runs.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="What a study or a demo left, or your own runs.")
    parser.add_argument("--out", type=Path, required=True, help="Folder to write the report to.")
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="Trajectories for the errors of steps; else FOLDER/unseen."
    )
    parser.add_argument("--trajectories", type=cli.positive, default=256, help="Measure on so many of them.")
    parser.add_argument("--columns", type=cli.positive, default=8, help="Samples in a row of pictures.")
    return parser


def run(args: argparse.Namespace) -> None:
    if cli.existing_folder("FOLDER", args.folder).resolve() == args.out.resolve():
        raise UserError(f"--out {args.out}: is the FOLDER to read, give another one, such as {args.out / 'report'}")
    if args.store:
        TrajectoryStore(args.store, "--store")
    options = cli.chosen(args, ("store", "trajectories", "columns"))
    print(f"{args.out}/report.html: {', '.join(write_report(args.folder, args.out, **options))}")
