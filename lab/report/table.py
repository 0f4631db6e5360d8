"""Table 1 from finished runs: our rows, the paper's below those that they repeat, as data, Markdown and LaTeX."""

from typing import Any

import numpy as np

from lab.report.evidence import about
from lab.report.results import FIGURES, Results, Row
from presets import TABLE_1

COLUMNS = {
    "model": "model",
    "loss": "loss",
    "target": "target",
    "mask": "mask",
    "steps": "S",
    "history_layers": "N",
    "iteration": "iterations",
    "gflops": "GFLOPs",
    "ms_per_sample": "ms",
    "fid": "FID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "degradation": "FID - teacher's",
    "ratio": "step distillation's / its",
}
WHERE = ("here", "there")  # in these runs, in the paper
MEASURED = (*FIGURES, "degradation", "ratio")
DECIMALS = {"precision": 3, "recall": 3, "ratio": 1}


def table(results: Results) -> list[dict[str, Any]]:
    """The rows as data: figures are means over seeds, with "std" and the values of "seeds" beside them.

    "paper" is the published row that a row repeats, None where there is none; each stands once.
    """
    lines, last = [], {}
    for row in results.rows:
        model, (milliseconds, timed) = row.model, results.milliseconds(row.name)
        line: dict[str, Any] = {"model": model.method, "loss": model.loss, "target": model.target, "mask": model.mask}
        line |= {"steps": model.steps, "history_layers": model.layers if model.is_student else None}
        line |= {"iteration": model.iteration or None, "gflops": results.gflops(model)}
        line |= {"ms_per_sample": milliseconds, "timed": timed}
        values = {name: row.values(name) for name in (*FIGURES, "degradation")} | {"ratio": ratios(row, results)}
        line |= {name: mean(numbers) for name, numbers in values.items()} | {"paper": None}
        line |= {"std": {name: spread(numbers) for name, numbers in values.items()}, "seeds": values}
        seen = row.results[0].figures
        line |= {"samples": seen["count"], "features": seen["provenance"]["features"], "adm": seen["provenance"]["adm"]}
        lines.append(line | {"files": [str(result.path) for result in row.results]})
        if model.layers in (0, results.main, model.depth):
            last[model.published()] = lines[-1]  # of several, the one that was trained longest
    for name, line in last.items():
        line["paper"] = paper_row(name) if name else None
    return lines


def paper_row(name: str) -> dict[str, Any]:
    """A published row in the same columns."""
    row, teacher = TABLE_1[name], TABLE_1["teacher-25"].fid
    line: dict[str, Any] = {"name": name, "model": f"paper: {row.model}", "loss": row.loss, "target": "-"}
    line |= {"mask": row.mask or "-", "steps": row.steps, "history_layers": row.history_layers, "iteration": None}
    line |= {"target": "x0"} if row.mask and row.steps > 1 else {}
    line |= {"gflops": row.gflops, "ms_per_sample": row.latency_ms, "degradation": row.fid - teacher}
    line |= {figure: getattr(row, figure) for figure in FIGURES}
    line["ratio"] = None
    if row.history_layers and line["degradation"] > 0:
        rivals = (r for r in TABLE_1.values() if (r.steps, r.loss, r.mask) == (row.steps, row.loss, "M1"))
        line["ratio"] = (next(rivals).fid - teacher) / line["degradation"]
    return line | {"std": {}}


def ratios(row: Row, results: Results) -> list[float]:
    """How many times the row's degradation goes into that of step distillation, for each seed that both have.

    Empty where there is no such row trained alike, and where a degradation is not positive.
    """
    model = row.model
    rivals = [
        other.degradation
        for other in results.students
        if (other.model.method, other.model.steps) == ("step distillation", model.steps)
        and other.results[0].settings | {"student": None} == row.results[0].settings | {"student": None}
    ]
    if model.method != "ARD" or not rivals:
        return []
    pairs = [(rivals[0][seed], lost) for seed, lost in row.degradation.items() if seed in rivals[0]]
    return [theirs / mine for theirs, mine in pairs] if all(min(pair) > 0 for pair in pairs) else []


def mean(values: list[float]) -> float | None:
    """None of nothing, and of what was not measured."""
    return float(np.mean(values)) if values and None not in values else None


def spread(values: list[float]) -> float | None:
    """The standard deviation over seeds (n - 1), None of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 and None not in values else None


def cells(line: dict[str, Any], plus_minus: str = "±") -> list[str]:
    """A row's text, in the order of ``COLUMNS``."""
    found = []
    for name in COLUMNS:
        value, deviation = line.get(name), line["std"].get(name)
        text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        if isinstance(value, float) and name in MEASURED:
            digits = DECIMALS.get(name, 2)
            text = f"{value:.{digits}f}" + (f" {plus_minus} {deviation:.{digits}f}" if deviation is not None else "")
        found.append(text)
    return found


def printed(lines: list[dict[str, Any]], plus_minus: str = "±") -> list[list[str]]:
    """The cells of all rows, a paper's row below ours."""
    return [cells(row, plus_minus) for line in lines for row in (line, line["paper"]) if row]


def notes(lines: list[dict[str, Any]], results: Results) -> list[str]:
    """What a reader of the table must know."""
    made = about(results.rows)
    text = [f"Means over seeds, with the standard deviation where there are several. {made}"]
    text.append("GFLOPs: multiply-accumulates of one image, counted in our own models.")
    if timed := {how for line in lines for how in line["timed"]}:
        text.append(f"ms: measured milliseconds for a sample, median ({'; '.join(sorted(timed))}).")
    if any(line["paper"] for line in lines):
        text.append(
            "Rows of the paper are published ones, of DiT-XL/2 on ImageNet 256 with ADM's features: compare ratios and "
            "order, not figures. Its N=6 of 28 layers stands below our usual N, its N=28 below all layers."
        )
    return text


def as_markdown(lines: list[dict[str, Any]], text: list[str]) -> str:
    """The table and its notes."""
    head = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in printed(lines)), "", *text]) + "\n"


def beside_the_paper(lines: list[dict[str, Any]]) -> str:
    """Only the rows that repeat a published one, as Markdown: our figures beside the paper's."""
    head = ["row", "loss", "S", "mask", "N here", "N there"]
    head += [f"{what} {where}" for what in ("FID", COLUMNS["degradation"], COLUMNS["ratio"]) for where in WHERE]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        if paper := line["paper"]:
            ours, theirs = (dict(zip(COLUMNS, cells(each), strict=True)) for each in (line, paper))
            row = [ours["model"], *(ours[name] for name in ("loss", "steps", "mask"))]
            row += [ours["history_layers"], theirs["history_layers"]]
            rows.append(row + [each[name] for name in ("fid", "degradation", "ratio") for each in (ours, theirs)])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def as_latex(lines: list[dict[str, Any]], text: list[str]) -> str:
    """The same for a paper; needs the package booktabs."""
    escape = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&"})
    head = " & ".join(COLUMNS.values()).translate(escape)
    body = [" & ".join(cell.translate(escape) for cell in row) + r" \\" for row in printed(lines, r"$\pm$")]
    comment = [f"% {note}" for note in text]
    begin = [rf"\begin{{tabular}}{{{'l' * len(COLUMNS)}}}", r"\toprule", head + r" \\", r"\midrule"]
    return "\n".join([*comment, *begin, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"
