"""The paper's figures from samples and their metrics: each function finds its input in ``Results``, or returns None."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lab.report import figures
from lab.report.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, Picture, Series
from lab.report.results import Model, Result, Results, Row, listed, main_layers, most_steps

COLOURS = {"step distillation": RED, "KD": PURPLE, "M2": ORANGE, "M3": GREEN, "M4": BLUE, "teacher": BLACK}


def colour(model: Model, main: int) -> str:
    """A model's colour, the same in all figures; M4 in other layers than the usual ones is lighter."""
    if model.method == "ARD" and model.mask == "M4" and model.layers != main:
        return SKY
    return COLOURS.get(model.mask if model.method == "ARD" else model.method, BLACK)


def about(results: Sequence[Result]) -> str:
    """Where figures come from, in sentences: samples, features, seeds, training."""
    seen, first = results[0].figures["provenance"], results[0]
    seeds = {r.model.about.get("training", {}).get("seed", r.model.about.get("seed")) for r in results} - {None}
    batch = {r.model.about["training"].get("global_batch_size") for r in results if r.model.student} - {None}
    yardstick = "ADM's Inception features" if seen["adm"] else f"{first.features} features, not ADM's"
    text = f"{listed([r.figures['count'] for r in results])} samples against {seen['reference_file']['count']} "
    text += f"real images ({yardstick}); seeds {listed(list(seeds))}; teacher {first.model.about.get('teacher_hash')}"
    trained = {r.model.iteration for r in results} - {0}
    text += f"; batch {listed(list(batch))}" if batch else ""
    text += f"; {listed(list(trained))} training steps" if trained else ""
    return f"{text}; metrics by PyTorch {seen['versions']['torch']}."


def alike(rows: Sequence[Row]) -> list[Row]:
    """The largest set of rows that differ in target, mask and N alone: one teacher, S, training, yardstick."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.results[0].alike("target")].append(row)
    largest = max(groups.values(), key=lambda g: (len(g), g[0].model.steps, g[0].model.iteration), default=[])
    return sorted(largest, key=lambda row: row.model.shape)


def teacher_fid(rows: Sequence[Row], of: Row) -> float | None:
    """The teacher's FID by the same yardstick."""
    return None if not of.degradations else float(np.mean(of.values("fid")) - np.mean(of.degradations))


def same_noise(results: Results, columns: int) -> Picture | None:
    """Fig. 5: the teacher, step distillation and ARD, trained by R and R+D, from the same noises and labels."""
    groups: dict[tuple, dict[tuple, tuple[Model, Path]]] = defaultdict(dict)
    for path, provenance in results.samples.items():
        model = Model(provenance)
        if "sample_seed" not in provenance or not model.plain:
            continue
        what = str([provenance.get(name) for name in ("sample_seed", "teacher_hash", "sample_labels", "weights")])
        group = groups[path.parent, what]
        if model.shape not in group or group[model.shape][0].iteration < model.iteration:
            group[model.shape] = model, path
    best = max(groups.values(), key=lambda g: (any(not m.student for m, _ in g.values()), len(g)), default=None)
    if not best or len(best) < 2:
        return None
    models = [m for m, _ in best.values()]
    main, steps = main_layers(models), most_steps(models)
    target = "x0" if any(m.target == "x0" for m in models) else "xt"
    wanted = [
        (m, path)
        for _, (m, path) in sorted(best.items())
        if not m.student
        or (m.steps == steps and m.target == target and (m.mask, m.layers) in (("M1", 0), ("M4", main)))
    ]
    if not any(m.student for m, _ in wanted):
        wanted = sorted(best.values(), key=lambda pair: pair[0].shape)[:6]
    rows = []
    for model, path in wanted:
        with np.load(path) as file:
            label = f"teacher\n{model.steps} steps" if not model.student else f"{model.method}\n{model.loss}"
            rows.append((label.replace("step distillation", "step distill."), file["arr_0"][:columns]))
    columns = min(len(images) for _, images in rows)
    return Picture(
        figures.draw_images([(label, images[:columns]) for label, images in rows]),
        f"Samples from the same noise and label in each column; students of "
        f"{listed([m.steps for m, _ in wanted if m.student])} steps, target "
        f"{listed([m.target for m, _ in wanted if m.student])}. Seed "
        f"{listed([m.about['sample_seed'] for m, _ in wanted])}, the first {columns} samples, not chosen.",
    )


def curves(results: Results) -> list[tuple[Model, dict[int, list[float]], str]]:
    """FID by training step, of each shape the curve with most points: of metrics, or of what runs logged themselves."""
    found: dict[str, tuple[Model, dict[int, list[float]], str]] = {}
    for result in results.metrics:
        if result.model.student and result.model.plain and result.model.loss == "R":
            where = f"{result.figures['count']} samples, {result.features} features"
            curve = found.setdefault(result.key("step"), (result.model, defaultdict(list), where))
            curve[1][result.model.iteration].append(result.figures["fid"])
    for folder, config in results.runs.items():
        if config.get("kind") == "student" and config["training"].get("loss") == "R":
            model = Model(config["provenance"] | {"student": config["model"], "training": config["training"]})
            key = f"{model.shape} {model.about.get('teacher_hash')} {model.training}"
            curve = found.setdefault(key, (model, defaultdict(list), "as logged by --eval-every"))
            log = folder / "log.txt"
            for line in log.read_text().splitlines() if log.is_file() else []:
                words = line.split()
                if words[:1] == ["eval"] and "fid" in words:
                    curve[1][int(words[1])].append(float(words[words.index("fid") + 1]))
    best: dict[tuple, tuple[Model, dict[int, list[float]], str]] = {}
    for curve in sorted(found.values(), key=lambda curve: len(curve[1])):
        if len(curve[1]) > 1:
            best[curve[0].shape] = curve
    return [best[shape] for shape in sorted(best)]


def over_training(results: Results, label: Callable[[Model], str], keep: Callable[[Model], bool]) -> Picture | None:
    """FID against training steps, of the students with most steps that ``keep`` lets through."""
    found = [curve for curve in curves(results) if keep(curve[0])]
    steps = most_steps([model for model, _, _ in found])
    found = [curve for curve in found if curve[0].steps == steps]
    main = main_layers([model for model, _, _ in found])
    found = [curve for curve in found if curve[0].layers in (0, main, curve[0].depth)]
    if not found:
        return None
    lines = []
    for model, points, _ in found:
        at, tint = sorted(points), colour(model, main)
        lines.append(Series(label(model), at, [points[x] for x in at], tint, dashed=model.target == "xt"))
    where = "; ".join(dict.fromkeys(where for _, _, where in found))
    seeds = max(len(values) for _, points, _ in found for values in points.values())
    several = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    text = f"FID while training, students of {steps} steps ({where}); {several}."
    return Picture(figures.draw_lines(lines, "training steps", "FID"), text, [s.numbers for s in lines])


def targets_over_training(results: Results) -> Picture | None:
    """Fig. 8: the same by target, for ARD and step distillation; None without both targets."""

    def label(model: Model) -> str:
        return f"{model.method}, {model.target}"

    usual = main_layers([model for model, _, _ in curves(results)])
    if len({m.target for m, _, _ in curves(results)} & {"x0", "xt"}) < 2:
        return None
    return over_training(results, label, lambda m: m.mask in ("M1", "M4") and m.layers in (0, usual) and m.steps > 1)


def from_teachers_points(results: Results) -> Picture | None:
    """Fig. 6b: FID when the first k steps are the teacher's own points."""
    groups: dict[str, dict[int, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for r in results.metrics:
        k = r.model.about.get("teacher_steps") or 0
        if r.model.student and r.model.loss == "R" and (k or r.model.plain):
            groups[r.key()][k].append(r)

    def model_of(points: dict[int, list[Result]]) -> Model:
        return next(iter(points.values()))[0].model

    best = {}  # of each shape the most complete set, trained longest
    for points in sorted(groups.values(), key=lambda points: (len(points), model_of(points).iteration)):
        if any(points):
            best[model_of(points).shape] = points
    models = {shape: model_of(best[shape]) for shape in sorted(best)}
    main, steps = main_layers(list(models.values())), most_steps(list(models.values()))
    several = len({model.target for model in models.values()}) > 1
    lines, used = [], []
    for shape, model in models.items():
        if model.steps == steps and model.layers in (0, main):
            at = sorted(best[shape])
            used += [r for k in at for r in best[shape][k]]
            values = [[r.figures["fid"] for r in best[shape][k]] for k in at]
            label = f"{model.method}, {model.target}" if several else model.name
            lines.append(Series(label, at, values, colour(model, main), dashed=model.target == "xt"))
    if not lines:
        return None
    text = f"FID when the first k of {steps} steps are the teacher's own points: how errors add up. {about(used)}"
    figure = figures.draw_lines(lines, "steps taken by the teacher, k", "FID", whole=True)
    return Picture(figure, text, [s.numbers for s in lines])


def over_layers(results: Results) -> Picture | None:
    """Fig. 6c: FID against N, the layers that look at history; 0 is step distillation."""
    rows = alike([r for r in results.table() if r.model.loss == "R" and r.model.mask in ("M1", "M4")])
    lines = []
    for target in sorted({r.model.target for r in rows}):
        mine = sorted((r for r in rows if r.model.target == target), key=lambda r: r.model.layers)
        if len(mine) > 2:
            x, values = [r.model.layers for r in mine], [r.values("fid") for r in mine]
            lines.append(Series(f"target {target}", x, values, BLUE, dashed=target == "xt"))
    if not lines:
        return None
    steps = rows[0].model.steps
    text = f"FID against the lower layers N that see history, M4, {steps} steps; N=0 is step distillation. "
    text += about([result for row in rows for result in row.results])
    axis = "layers that see history, N"
    figure = figures.draw_lines(lines, axis, "FID", teacher_fid(rows, rows[0]), whole=True)
    return Picture(figure, text, [s.numbers for s in lines])


def noise_or_history(results: Results) -> Picture | None:
    """Not in the paper: what each mask loses to the teacher under both targets, which tells noise from history."""
    rows = alike([r for r in results.table() if r.model.student and r.model.loss == "R" and r.degradations])
    main = main_layers([r.model for r in rows])
    rows = [r for r in rows if r.model.layers in (0, main)]
    sees = {"M1": "its own point", "M2": "and the one before", "M3": "and the noise", "M4": "and all before"}
    groups: dict[str, dict[str, list[float]]] = {}
    for target in ("x0", "xt"):
        mine = {r.model.mask: r.degradations for r in rows if r.model.target == target}
        if len(mine) > 1:
            groups[f"target {target}"] = {f"{m}: {sees[m]}": mine[m] for m in sees if m in mine}
    if not groups or not any("M3" in name for bars in groups.values() for name in bars):
        return None
    text = (
        "FID minus the teacher's, by what a step sees. M1 to M3 under x0 is what giving the noise back gains; M3 to M4 "
        "is what the rest of the history gains; under xt nothing was thrown away, so a gain there is no return of what "
        "was lost. " + about([result for row in rows for result in row.results])
    )
    colours = {f"{m}: {sees[m]}": COLOURS.get(m, RED) for m in sees}
    return Picture(figures.draw_bars(groups, colours, "FID - teacher's"), text, groups)


def manipulation(results: Results, columns: int) -> Picture | None:
    """Fig. 10: source images in place of a prediction, and what the student makes of them."""
    groups: dict[tuple, list[tuple[int, Path]]] = defaultdict(list)
    for path, p in results.samples.items():
        if "source_step" in p:
            what = (str(p.get(name)) for name in ("source_images", "weights_hash", "sample_labels"))
            groups[tuple(what)].append((p["source_step"], path))
    if not groups:
        return None
    (source, _, labels), found = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[0]
    rows: list[tuple[str, np.ndarray]] = []
    is_file = source.endswith(".npz") and Path(source).is_file()
    wanted = [("source", Path(source))] if is_file else []
    wanted += [(f"in place of\nprediction {step}", path) for step, path in sorted(found)[:6]]
    for label, path in wanted:
        with np.load(path) as file:
            rows.append((label, file["arr_0"][:columns]))
    columns = min(len(images) for _, images in rows)
    name = Model(results.samples[found[0][1]]).name
    text = f"Each source image takes the place of a prediction of {name}, which goes on "
    text += f"from it to the labels {labels}." + ("" if is_file else f" The sources, {source}, are not shown here.")
    return Picture(figures.draw_images([(label, images[:columns]) for label, images in rows]), text)
