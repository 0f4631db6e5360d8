"""The figures that are measured in the models themselves: attention to history (Fig. 4), and the error of each step."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from lab.report import figures
from lab.report.attention import attention_to_history
from lab.report.exposure import FED, step_errors
from lab.report.figures import BLUE, RED, Picture, Series
from lab.report.results import Model, Results, listed
from runtime.randomness import labels, noise
from stores import checkpoints
from stores.trajectories import TrajectoryStore


def last_checkpoints(results: Results) -> list[tuple[Path, Model]]:
    """Of the regression-trained students with most steps."""
    return [(path, m) for path, m in results.runs if (m.loss, m.steps) == ("R", results.steps) and m.steps > 1]


def attention(results: Results) -> Picture | None:
    """Fig. 4: what the steps of M4 attend to, with history in some layers and in all."""
    students, count = [(path, m) for path, m in last_checkpoints(results) if m.mask == "M4"], results.trajectories
    target = "x0" if any(m.target == "x0" for _, m in students) else "xt"
    students = [(path, m) for path, m in students if m.target == target and m.layers in (results.main, m.depth)]
    shares, seeds = defaultdict(list), set()
    for path, model in sorted(students, key=lambda one: one[1].layers != results.main):
        student, _ = checkpoints.load_student(path)
        z = noise(0, "sample", range(count), student.latent_shape)
        found = attention_to_history(student, z, labels(0, range(count), student.num_classes))
        shares[f"N = {model.layers}"].append(found)
        seeds.add(model.about["training"]["seed"])
    if not shares:
        return None
    panels = {title: np.mean(found, axis=0) for title, found in shares.items()}
    return Picture(
        figures.draw_attention(panels),
        f"Share of attention on each point of the history, by layer, while sampling in {results.steps} steps (M4, "
        f"target {target}); mean over tokens, heads, {count} noises not trained on, and training seeds "
        f"{listed(seeds)}; fp32 on a CPU. Above layer N a point attends to itself alone.",
        {title: np.round(found, 4).tolist() for title, found in panels.items()},
    )


def errors(results: Results) -> Picture | None:
    """Not in the paper: the error of each step when fed the teacher's points, and when fed its own.

    On the trajectories of FOLDER/unseen, or else of the first seed.
    """
    wanted = [results.store] if results.store else [results.folder / "unseen", results.seeds[0] / "trajectories"]
    opened = [TrajectoryStore(path, "--store") for path in wanted if (path / "manifest.json").exists()]
    if not opened:
        return None
    store = opened[0]
    unseen, seeds, rows = True, set(), min(results.trajectories, len(store))
    found = defaultdict(list)  # {(target, method, fed): errors (S,) of each seed}
    for path, model in last_checkpoints(results):
        mine = model.about
        known = mine["teacher_hash"] == store.provenance["teacher_hash"] and mine["target"] in store.tensors[0]
        known = known and set(mine["solver_indices"]) <= set(store.solver_indices)
        if known and (model.mask, model.layers) in (("M1", 0), ("M4", results.main)):
            unseen &= store.provenance["seed"] != mine["seed"]
            seeds.add(model.about["training"]["seed"])
            columns = store.point_columns(mine["solver_indices"], mine["target"])
            batch = store.read(np.arange(rows), mine["target"], columns)
            for fed, per_step in step_errors(checkpoints.load_student(path)[0], *batch).items():
                found[mine["target"], model.method, fed].append(per_step)
    panels: dict[str, list[Series]] = defaultdict(list)
    for target in sorted({key[0] for key in found}):
        for method, tint in (("step distillation", RED), ("ARD", BLUE)):
            for fed in FED:
                if values := found.get((target, method, fed)):
                    label = f"{method}, fed {'the teacher' if fed == 'teacher' else 'itself'}"
                    x, points = list(range(1, results.steps + 1)), np.array(values).T.tolist()
                    panels[f"target {target}"].append(Series(label, x, points, tint, dashed=fed == "teacher"))
    if not panels:
        return None
    which = "that were not trained on" if unseen else "that the students were trained on"
    return Picture(
        figures.draw_lines(panels, "step", "RMS error, units of latents"),
        f"Error of each predicted point (median over trajectories): fed the teacher's points (dashed) or its own "
        "(solid). The gap is exposure bias; the dashed line is what a step cannot tell even from a perfect past. "
        f"{rows} trajectories {which}, "
        f"seeds {listed(seeds)}; fp32 on a CPU. Targets are different quantities, but for the last step.",
        {title: [s.numbers for s in lines] for title, lines in panels.items()},
    )
