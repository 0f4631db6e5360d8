"""The figures that are measured in the models themselves: attention to history (Fig. 4), and the error of each step."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.report import figures
from lab.report.attention import attention_to_history
from lab.report.exposure import FED, step_errors
from lab.report.figures import BLUE, RED, Picture, Series
from lab.report.results import Model, Results, listed, main_layers
from runtime.randomness import labels, noise
from stores import checkpoints
from stores.trajectories import TrajectoryStore


@dataclass
class Trained:
    """The last checkpoint of a run."""

    path: Path
    model: Model


def trained_students(results: Results) -> list[Trained]:
    """Regression-trained students of one teacher, S and training: of all such sets of runs the one with most.

    Those of text models are left out, nothing here reads captions.
    """
    found: dict[str, list[Trained]] = defaultdict(list)
    for folder, config in results.runs.items():
        files = sorted((folder / "checkpoints").glob("[0-9]*.pt"))
        if config.get("kind") == "student" and files and "caption_channels" not in config["model"]:
            described = {"student": config["model"], "training": config["training"], "step": int(files[-1].stem)}
            one = Trained(files[-1], Model(config["provenance"] | described))
            same = [one.model.about.get("teacher_hash"), one.model.steps, one.model.iteration, one.model.training]
            if one.model.loss == "R" and one.model.steps > 1:
                found[json.dumps(same)].append(one)
    return max(found.values(), key=lambda some: (len(some), some[0].model.steps, some[0].model.iteration), default=[])


def attention(results: Results, count: int) -> Picture | None:
    """Fig. 4: what the steps of M4 attend to, with history in some layers and in all."""
    students = trained_students(results)
    main = main_layers([t.model for t in students])
    students = [t for t in students if t.model.mask == "M4"]
    if not students:
        return None
    steps = students[0].model.steps
    target = "x0" if any(t.model.target == "x0" for t in students) else "xt"
    students = [t for t in students if t.model.target == target]
    if all(t.model.layers != main for t in students):
        main = main_layers([t.model for t in students])
    panels, drawn = [], []
    for layers in dict.fromkeys((main, students[0].model.depth)):
        shares = []
        for t in students:
            if t.model.layers == layers:
                drawn.append(t)
                student, _ = checkpoints.load_student(t.path)
                z = noise(0, "sample", range(count), student.latent_shape)
                shares.append(attention_to_history(student, z, labels(0, range(count), student.num_classes)))
        if shares:
            panels.append((f"N = {layers}", np.mean(shares, axis=0)))
    seeds = listed([t.model.about["training"]["seed"] for t in drawn])
    return Picture(
        figures.draw_attention(panels),
        f"Share of attention on each point of the history, by layer, while sampling in {steps} steps (M4, target "
        f"{target}); mean over tokens, heads, {count} noises not trained on, and training seeds {seeds}; fp32 on a "
        "CPU. Above layer N a point attends to itself alone.",
        {title: np.round(shares, 4).tolist() for title, shares in panels},
    )


def errors(results: Results, stores: Sequence[Path], count: int) -> Picture | None:
    """Not in the paper: the error of each step when fed the teacher's points, and when fed its own."""
    opened = [TrajectoryStore(folder, "--store") for folder in stores]
    students = trained_students(results)
    if not students or not opened:
        return None
    steps, main = students[0].model.steps, main_layers([t.model for t in students])
    unseen, rows, drawn = True, 0, []
    found = defaultdict(list)  # {(target, method, fed): errors (S,) of each seed}
    for t in students:
        if (t.model.mask, t.model.layers) not in (("M1", 0), ("M4", main)):
            continue
        mine = t.model.about
        serving = [
            s
            for s in opened
            if s.provenance["teacher_hash"] == mine.get("teacher_hash")
            and mine["target"] in s.tensors[0]
            and set(mine["solver_indices"]) <= set(s.solver_indices)
        ]
        serving.sort(key=lambda s: s.provenance["seed"] == mine["seed"])  # those that it was not trained on first
        if serving:
            drawn.append(t)
            unseen &= serving[0].provenance["seed"] != mine["seed"]
            columns = serving[0].point_columns(mine["solver_indices"], mine["target"])
            rows = min(count, len(serving[0]))
            batch = serving[0].read(np.arange(rows), mine["target"], columns)
            for fed, per_step in step_errors(checkpoints.load_student(t.path)[0], *batch).items():
                found[mine["target"], t.model.method, fed].append(per_step)
    panels = []
    for target in sorted({key[0] for key in found}):
        lines = []
        for method in ("step distillation", "ARD"):
            for fed in FED:
                if values := found.get((target, method, fed)):
                    label = f"{method}, fed {'the teacher' if fed == 'teacher' else 'itself'}"
                    points = np.array(values).T.tolist()
                    tint = RED if method == "step distillation" else BLUE
                    lines.append(Series(label, list(range(1, steps + 1)), points, tint, dashed=fed == "teacher"))
        panels.append((f"target {target}", lines))
    if not panels:
        return None
    seeds = listed([t.model.about["training"]["seed"] for t in drawn])
    which = "that were not trained on" if unseen else "that the students were trained on"
    return Picture(
        figures.draw_errors(panels),
        f"Error of each predicted point (median over trajectories): fed the teacher's points (dashed) or its own "
        "(solid). The gap is exposure bias; the dashed line is what a step cannot tell even from a perfect past. "
        f"{rows} trajectories {which}, "
        f"seeds {seeds}; fp32 on a CPU. Targets are different quantities, but for the last step.",
        {title: [s.numbers for s in lines] for title, lines in panels},
    )
