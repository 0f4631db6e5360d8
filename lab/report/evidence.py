"""The paper's figures from samples and their metrics: each function finds its input in ``Results``, or returns None."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lab.report import figures
from lab.report.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, Picture, Series
from lab.report.results import Model, Results, Row, listed, one_of_each
from runtime.provenance import require_same
from stores.samples import read_provenance

COLOURS = {"step distillation": RED, "KD": PURPLE, "M2": ORANGE, "M3": GREEN, "M4": BLUE, "teacher": BLACK}
MERITS = {"fid": "FID", "inception_score": "IS", "precision": "precision", "recall": "recall"}


def colour(model: Model, main: int) -> str:
    """A model's colour, the same in all figures; M4 in other layers than the usual ones is lighter."""
    if model.method == "ARD" and (model.loss == "R+D" or model.mask == "M4" and model.layers != main):
        return SKY
    if model.loss == "R+D":
        return ORANGE
    return COLOURS.get(model.mask if model.method == "ARD" else model.method, BLACK)


def about(rows: Iterable[Row]) -> str:
    """Where figures come from, in sentences: samples, features, seeds, training."""
    results = [result for row in rows for result in row.results]
    seen, first = results[0].figures["provenance"], results[0]
    seeds = {r.model.about.get("training", {}).get("seed", r.model.about.get("seed")) for r in results} - {None}
    batch = {r.model.about.get("training", {}).get("global_batch_size") for r in results if r.model.is_student} - {None}
    yardstick = "ADM's Inception features" if seen["adm"] else f"{seen['features']} features, not ADM's"
    text = f"{listed(r.figures['count'] for r in results)} samples against {seen['reference_file']['count']} "
    text += f"real images ({yardstick}); seeds {listed(seeds)}; teacher {first.model.about.get('teacher_hash')}"
    trained = {r.model.iteration for r in results} - {0}
    text += f"; batch {listed(batch)}" if batch else ""
    text += f"; {listed(trained)} training steps" if trained else ""
    return f"{text}; metrics by PyTorch {seen['versions']['torch']}."


def students(results: Results, *masks: str) -> list[Row]:
    """Regression-trained students of the most steps, with these masks; one of each shape."""
    rows = [row for row in results.students if (row.model.loss, row.model.steps) == ("R", results.steps)]
    return one_of_each(row for row in rows if row.model.mask in masks)


def usual(results: Results) -> tuple[tuple[str, int], ...]:
    """Mask and N of step distillation and of ARD."""
    return ("M1", 0), ("M4", results.main)


def same_noise(results: Results) -> Picture | None:
    """Fig. 5: the teacher, step distillation and ARD, trained by R and R+D, from the same noises and labels."""
    seed = results.seeds[0]
    rows = [row for row in one_of_each(results.students) if (seed / f"{row.name}.npz").exists()]
    target = "x0" if any(row.model.target == "x0" for row in rows) else "xt"
    main = [
        row
        for row in rows
        if (row.model.steps, row.model.target) == (results.steps, target)
        and (row.model.mask, row.model.layers) in usual(results)
    ]
    files = [seed / f"{name}.npz" for name in ("teacher-same-noise", *(row.name for row in main or rows[:6]))]
    shown = [(path, Model.of(read_provenance(path))) for path in files if path.exists()]
    if len(shown) < 2:
        return None
    noise = {name: shown[0][1].about.get(name) for name in ("sample_seed", "teacher_hash", "sample_labels")}
    pictures = []
    for path, model in shown:
        require_same(f"{path}: is not from the noise of {shown[0][0].name}", model.about, noise)
        label = f"{model.method}\n{model.loss}" if model.is_student else f"teacher\n{model.steps} steps"
        pictures.append((label.replace("step distillation", "step distill."), first_images(path, results.columns)))
    return Picture(
        figures.draw_images(pictures),
        f"Samples from the same noise and label in each column; students of "
        f"{listed(m.steps for _, m in shown if m.is_student)} steps, target "
        f"{listed(m.target for _, m in shown if m.is_student)}. Seed {noise['sample_seed']}, the first "
        f"{min(len(images) for _, images in pictures)} samples, not chosen.",
    )


def first_images(path: Path, count: int) -> np.ndarray:
    """(count, H, W, 3) uint8 of a file of samples."""
    with np.load(path) as file:
        return file["arr_0"][:count]


def lines_of(results: Results, rows: Iterable[Row], x: Mapping[str, float], labels: dict[str, str], merit: str = "fid",
             tint: str | None = None) -> list[Series]:  # fmt: skip
    """A line through the rows of each label, at ``x``; both are by the row's name. Of two at one place, the first."""
    lines: dict[str, Series] = {}
    for row in sorted(rows, key=lambda row: (row.model.shape, x[row.name])):
        label, dashed = labels[row.name], row.model.target == "xt"
        line = lines.setdefault(label, Series(label, [], [], tint or colour(row.model, results.main), dashed))
        if x[row.name] not in line.x:
            line.x.append(x[row.name])
            line.values.append(row.values(merit))
    return [*lines.values()]


def draw_curves(results: Results, rows: list[Row], labels: dict[str, str]) -> Picture | None:
    """FID against training steps, of students with most steps."""
    rows = [row for row in rows if row.model.steps == results.steps]
    lines = lines_of(results, rows, {row.name: row.model.iteration for row in rows}, labels)
    lines = [line for line in lines if len(line.x) > 1]
    if not lines:
        return None
    seen = rows[0].results[0].figures
    where = "as logged by --eval-every"
    if "count" in seen:
        where = f"{seen['count']} samples, {seen['provenance']['features']} features"
    seeds = max(len(values) for line in lines for values in line.values)
    several = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    text = f"FID while training, students of {results.steps} steps ({where}); {several}."
    return Picture(figures.draw_lines({"FID": lines}, "training steps"), text, [s.numbers for s in lines])


def over_training(results: Results) -> Picture | None:
    """Fig. 6a: FID against training steps under the target x0, by mask and N."""
    rows = [row for row in results.more("curves") or results.logged() if row.model.target == "x0"]
    rows = [row for row in rows if row.model.layers in (0, results.main, row.model.depth)]
    return draw_curves(results, rows, {row.name: row.model.label for row in rows})


def targets_over_training(results: Results) -> Picture | None:
    """Fig. 8: the same by target, for ARD and step distillation; None without both targets."""
    rows = results.more("curves") or results.logged()
    rows = [row for row in rows if (row.model.mask, row.model.layers) in usual(results)]
    labels = {row.name: f"{row.model.method}, {row.model.target}" for row in rows}
    return draw_curves(results, rows, labels) if len({row.model.target for row in rows}) > 1 else None


def from_teachers_points(results: Results) -> Picture | None:
    """Fig. 6b: FID when the first k steps are the teacher's own points; k = 0 is from ``curves``, or the student's."""
    given = results.more("teacher-steps")
    last = {(row.model.shape, row.model.iteration, row.results[0].figures["count"]) for row in given}
    own = {}
    for row in [*results.rows, *results.more("curves")]:
        if (row.model.shape, row.model.iteration, row.results[0].figures["count"]) in last:
            own[row.model.shape] = row
    rows = [*own.values(), *given]
    x = {row.name: row.model.about.get("teacher_steps") or 0 for row in rows}
    several = len({row.model.target for row in rows}) > 1
    labels = {r.name: f"{r.model.method}, {r.model.target}" if several else r.model.label for r in rows}
    lines = lines_of(results, rows, x, labels)
    if not given:
        return None
    steps = listed(row.model.steps for row in given)
    text = f"FID when the first k of {steps} steps are the teacher's own points: how errors add up. {about(rows)}"
    figure = figures.draw_lines({"FID": lines}, "steps taken by the teacher, k")
    return Picture(figure, text, [s.numbers for s in lines])


def over_layers(results: Results, *merits: str) -> Picture | None:
    """Figures of merit against N, the layers that look at history; 0 is step distillation."""
    rows = students(results, "M1", "M4")
    x, labels = {r.name: r.model.layers for r in rows}, {r.name: f"target {r.model.target}" for r in rows}
    panels = {merit: lines_of(results, rows, x, labels, merit, BLUE) for merit in merits}
    panels = {merit: [line for line in lines if len(line.x) > 2] for merit, lines in panels.items()}
    if not all(panels.values()):
        return None
    named = ", ".join(MERITS[merit] for merit in merits)
    text = f"{named} against the lower layers N that see history, M4, {results.steps} steps; N=0 is step distillation. "
    level = {MERITS[merit]: results.teacher(merit) for merit in merits}
    lines = {MERITS[merit]: lines for merit, lines in panels.items()}
    figure = figures.draw_lines(lines, "layers that see history, N", teacher=level)
    numbers = {merit: [s.numbers for s in lines] for merit, lines in panels.items()}
    return Picture(figure, text + about(rows), numbers if len(merits) > 1 else numbers[merits[0]])


def fid_over_layers(results: Results) -> Picture | None:
    """Fig. 6c: FID against N."""
    return over_layers(results, "fid")


def others_over_layers(results: Results) -> Picture | None:
    """Fig. 9: the other figures of merit against N."""
    return over_layers(results, "inception_score", "precision", "recall")


def efficiency(results: Results) -> Picture | None:
    """Fig. 2c: FID against multiply-accumulates of one image, a line for each method over its S."""
    rows = [row for row in one_of_each(results.students) if (row.model.mask, row.model.layers) in usual(results)]
    x = {row.name: results.gflops(row.model) or 0.0 for row in rows}
    labels = {}
    for name, m in ((row.name, row.model) for row in rows):
        labels[name] = ", ".join([m.method, *[m.target][: m.steps > 1], *[m.loss][: m.loss != "R"]])
    lines = lines_of(results, rows, x, labels)
    if not any(len(line.x) > 1 for line in lines):
        return None
    text = "FID against the multiply-accumulates of one image, in 1e9; a line for each method, a point for each S. "
    figure = figures.draw_lines({"FID": lines}, "GFLOPs of an image", teacher={"FID": results.teacher("fid")})
    return Picture(figure, text + about(rows), [s.numbers for s in lines])


def noise_or_history(results: Results) -> Picture | None:
    """Not in the paper: what each mask loses to the teacher under both targets, which tells noise from history."""
    rows = [row for row in students(results, "M1", "M2", "M3", "M4") if row.model.layers in (0, results.main)]
    sees = {"M1": "its own point", "M2": "and the one before", "M3": "and the noise", "M4": "and all before"}
    groups: dict[str, dict[str, list[float]]] = {}
    for target in ("x0", "xt"):
        mine = {row.model.mask: row.values("degradation") for row in rows if row.model.target == target}
        if len(mine) > 1 and all(mine.values()):
            groups[f"target {target}"] = {f"{m}: {sees[m]}": mine[m] for m in sees if m in mine}
    if not any("M3" in name for bars in groups.values() for name in bars):
        return None
    text = (
        "FID minus the teacher's, by what a step sees. M1 to M3 under x0 is what giving the noise back gains; M3 to M4 "
        "is what the rest of the history gains; under xt nothing was thrown away, so a gain there is no return of what "
        f"was lost. {about(rows)}"
    )
    colours = {f"{m}: {sees[m]}": COLOURS.get(m, RED) for m in sees}
    return Picture(figures.draw_bars(groups, colours, "FID - teacher's"), text, groups)


def manipulation(results: Results) -> Picture | None:
    """Fig. 10: source images in place of a prediction, and what the student makes of them."""
    files = sorted(path for seed in results.seeds[:1] for path in (seed / "manipulation").glob("*.npz"))
    shown = sorted((read_provenance(path)["source_step"], path) for path in files)[:6]
    if not shown:
        return None
    first = read_provenance(shown[0][1])
    source = Path(first["source_images"])
    wanted = [("source", source)] if source.suffix == ".npz" and source.is_file() else []
    wanted += [(f"in place of\nprediction {step}", path) for step, path in shown]
    text = f"Each source image takes the place of a prediction of {Model.of(first).label}, which goes on "
    text += f"from it to the labels {first['sample_labels']}."
    text += "" if wanted[0][0] == "source" else f" The sources, {source}, are not shown here."
    return Picture(figures.draw_images([(label, first_images(path, results.columns)) for label, path in wanted]), text)
