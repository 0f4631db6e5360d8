"""Reads what a study leaves, by this layout, which any project may use. A folder for each seed, or FOLDER alone:

    FOLDER/seed0/, FOLDER/seed1/, ...       one training seed each; without them FOLDER itself is the only one
        teacher.json                        metrics (evaluations.evaluator --json) of the teacher's samples
        teacher-same-noise.npz              samples of the teacher from the students' noise
        NAME.json, NAME.npz, NAME/          metrics and samples of a student, and its run
        curves/NAME-STEP.json               metrics of its checkpoint after STEP training steps
        teacher-steps/NAME-K.json           metrics of its samples that begin at the teacher's K-th point
        manipulation/*.npz                  its samples from source images
        table.json                          a list of {"name", "ms_per_sample", "timed"}, "name" being "teacher" or NAME
    FOLDER/unseen/                          trajectories that no student was trained on

Equal names in several seeds are one model. Whatever is missing is left out; what a model is, its files say.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from costs.flops import meta_model, sampling_gflops
from models_ard import method_name
from presets import TABLE_1
from runtime.cli import UserError
from runtime.files import read_json
from runtime.provenance import require_same
from stores.runs import read_config

FIGURES = ("fid", "inception_score", "precision", "recall")
# Of a teacher's samples and of a student's trajectories: what decides which teacher it is, and how it was solved.
TEACHER = ("teacher_hash", "process", "solver", "solver_steps", "cfg_scale", "cfg_channels", "guidance_interval")
# Of samples: what else decides a figure, but for seeds.
DECISIVE = (
    *(*TEACHER, "student", "target", "grid", "step", "start_step", "weights", "real", "online", "teacher_steps"),
    *("dtype", "precision", "trajectories", "sample_precision", "sample_labels", "sample_captions"),
)

ARD_ONLY_ARGS = ("steps", "mask", "history_layers", "level_embedding", "residual")


@dataclass(frozen=True)
class Model:
    """A student, or a teacher, as provenance describes it."""

    about: dict
    steps: int  # of sampling
    loss: str = "-"  # R, R+D, or - for a teacher
    target: str = "-"  # in one step both targets are the sample
    layers: int = 0  # that do look at history, N
    mask: str = "-"  # M1 where there is no history, whatever the name of the mask
    depth: int = 0  # layers in all
    iteration: int = 0  # training steps behind these weights; R+D counts from its own start

    @classmethod
    def of(cls, about: dict) -> "Model":
        """That of a provenance; a student's has its config as "student"."""
        config = about.get("student")
        if not config:
            return cls(about, about["solver_steps"])
        steps, layers = config["steps"], 0 if config["mask"] == "M1" else config["history_layers"]
        loss, target = about.get("training", {}).get("loss", "R"), about["target"] if steps > 1 else "-"
        target = f"{about['target']}, residual" if config.get("residual") else target
        layers = layers if steps > 1 else 0
        mask = config["mask"] if layers else "M1"
        return cls(about, steps, loss, target, layers, mask, config["depth"], about.get("step", 0))

    @property
    def is_student(self) -> bool:
        """Else a teacher."""
        return self.loss != "-"

    @property
    def method(self) -> str:
        """The paper's name for it."""
        if not self.is_student:
            return "teacher"
        return method_name(self.steps, self.mask, self.layers)

    @property
    def label(self) -> str:
        """For a legend: the method, and its mask and N where it has them."""
        return f"ARD {self.mask}, N={self.layers}" if self.method == "ARD" else self.method

    @property
    def shape(self) -> tuple:
        """What sets it apart from others in a table, in the order of one."""
        return (self.is_student, self.steps, self.loss, self.target, self.layers > 0, self.mask, self.layers)

    def published(self) -> str | None:
        """The row of Table 1 that it corresponds to; N of all layers stands for 28, any less for 6."""
        layers = 28 if 0 < self.layers == self.depth else 6 if self.layers else 0
        wanted = (self.steps, self.loss, self.mask, layers) if self.is_student else (self.steps, "-", None, None)
        rows = {(row.steps, row.loss, row.mask, row.history_layers): name for name, row in TABLE_1.items()}
        return None if self.target not in ("x0", "-") or self.about.get("captions") else rows.get(wanted)


@dataclass(frozen=True)
class Result:
    """A file of metrics: figures of some samples, and what these are."""

    path: Path
    figures: dict

    @cached_property
    def model(self) -> Model:
        """Whose samples they are."""
        return Model.of(self.figures["provenance"]["samples"])

    @property
    def yardstick(self) -> dict:
        """By what the figures are measured: network, real images, number of samples."""
        seen = self.figures["provenance"]
        real = seen["reference_file"]
        return {
            "features": seen["features"],
            "weights_sha256": seen["weights_sha256"],
            "reference": real.get("sha256") or real.get("listing"),
            "count": self.figures["count"],
        }

    @property
    def settings(self) -> dict:
        """All that decides the figures, but for seeds."""
        training = {name: value for name, value in self.model.about.get("training", {}).items() if name != "seed"}
        return {name: self.model.about.get(name) for name in DECISIVE} | {"training": training} | self.yardstick


@dataclass(frozen=True)
class Row:
    """Results of one model, one for each seed; figures are means with their spread."""

    name: str
    results: list[Result]
    teachers: dict[Path, Result]  # of the seeds' folders

    @property
    def model(self) -> Model:
        """Any of them."""
        return self.results[0].model

    @cached_property
    def degradation(self) -> dict[Path, float]:
        """FID minus the teacher's, by folder, of those that have one. ``UserError`` where it is another's."""
        found = {}
        for result in self.results:
            if teacher := self.teachers.get(result.path.parent):
                keys = TEACHER if self.model.is_student else TEACHER[:1]
                about = {key: teacher.model.about.get(key) for key in keys} | teacher.yardstick
                what = f"{result.path}: does not belong to the teacher.json beside it"
                require_same(what, result.settings, about)
                found[result.path.parent] = result.figures["fid"] - teacher.figures["fid"]
        return found

    def values(self, figure: str) -> list[float]:
        """The figure of each seed."""
        return [*self.degradation.values()] if figure == "degradation" else [r.figures[figure] for r in self.results]


def content_of(path: Path) -> Any:
    """What a file of JSON holds. ``UserError`` where it is none."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a file of JSON that can be read ({error})") from None


def read_metrics(paths: Iterable[Path]) -> list[Result]:
    """The files of our evaluator's metrics among some of JSON, with FID, of samples that say whose they are."""
    found = [(path, content) for path in sorted(paths) if isinstance(content := content_of(path), dict)]
    return [
        Result(path, content)
        for path, content in found
        if "fid" in content and "solver_steps" in (content.get("provenance", {}).get("samples") or {})
    ]


@lru_cache
def count_gflops(config: str, steps: int, text_tokens: int) -> float:
    """Multiply-accumulates of one image, by a model of this config (as JSON)."""
    return sampling_gflops(meta_model(json.loads(config)), steps, text_tokens=text_tokens)


def one_of_each(rows: Iterable[Row]) -> list[Row]:
    """Of the rows of one shape, the one that was trained longest: those of figures."""
    longest = {row.model.shape: row for row in sorted(rows, key=lambda row: row.model.iteration)}
    return [longest[shape] for shape in sorted(longest)]


def main_layers(models: Sequence[Model]) -> int:
    """The usual N: that of most models with history in some of their layers."""
    some = Counter(m.layers for m in models if 0 < m.layers < m.depth) or Counter(m.layers for m in models if m.layers)
    return min(some, key=lambda n: (-some[n], n)) if some else 0


def listed(values: Iterable[Any]) -> str:
    """Distinct values in order, for a sentence."""
    return ", ".join(str(value) for value in sorted(set(values)))


class Results:
    """All that a folder of this layout holds, and how figures are drawn from it.

    ``store`` has trajectories for the errors of steps, in place of FOLDER/unseen; ``trajectories`` is how many of them
    are used, ``columns`` how many samples a row of pictures has.
    """

    def __init__(self, folder: Path, store: Path | None = None, trajectories: int = 256, columns: int = 8):
        self.folder, self.store, self.trajectories, self.columns = folder.resolve(), store, trajectories, columns
        self.seeds = sorted(self.folder.glob("seed[0-9]*")) or [self.folder]
        metrics = {seed: read_metrics(seed.glob("*.json")) for seed in self.seeds}
        self.teachers = {s: r for s, results in metrics.items() for r in results if r.path.stem == "teacher"}
        self.rows = self._rows(result for results in metrics.values() for result in results)
        self.students = [row for row in self.rows if row.model.is_student]
        models = [row.model for row in self.students] or [model for _, model in self.runs]
        self.main, self.steps = main_layers(models), max((m.steps for m in models if m.loss == "R"), default=0)

    def _rows(self, results: Iterable[Result]) -> list[Row]:
        """Results in groups of equal names, in the order of a table. ``UserError`` where they are of several models."""
        groups: dict[str, list[Result]] = defaultdict(list)
        for result in results:
            first = groups[result.path.stem][:1] or [result]
            what = f"{result.path}: has the name of {first[0].path}, but is another model"
            require_same(what, first[0].settings, result.settings)
            groups[result.path.stem].append(result)
        rows = [Row(name, found, self.teachers) for name, found in groups.items()]
        return sorted(rows, key=lambda row: (row.model.shape, row.model.iteration))

    def more(self, kind: str) -> list[Row]:
        """Rows of R in the folders ``curves`` or ``teacher-steps`` of all seeds."""
        rows = self._rows(r for seed in self.seeds for r in read_metrics((seed / kind).glob("*.json")))
        return [row for row in rows if row.model.loss == "R"]

    def logged(self) -> list[Row]:
        """Rows of what runs logged themselves, by --eval-every."""
        found: dict[str, list[Result]] = defaultdict(list)
        for log, model in ((path.parent.parent / "log.txt", model) for path, model in self.runs):
            for words in (line.split() for line in (log.read_text() if log.exists() else "").splitlines()):
                if words[:1] == ["eval"] and "fid" in words:
                    about, fid = model.about | {"step": int(words[1])}, float(words[words.index("fid") + 1])
                    content = {"fid": fid, "provenance": {"samples": about}}
                    found[f"{log.parent.name}-{words[1]}"].append(Result(log, content))
        return [Row(name, results, {}) for name, results in found.items() if results[0].model.loss == "R"]

    @cached_property
    def runs(self) -> list[tuple[Path, Model]]:
        """The last checkpoint of each student's run, of classes: nothing here reads captions."""
        found = []
        for folder in (path.parent for seed in self.seeds for path in sorted(seed.glob("*/config.json"))):
            config, files = read_config(folder), sorted((folder / "checkpoints").glob("[0-9]*.pt"))
            if config and files and config.get("kind") == "student" and "caption_channels" not in config["model"]:
                about = {"student": config["model"], "training": config["training"], "step": int(files[-1].stem)}
                found.append((files[-1], Model.of(config["provenance"] | about)))
        return found

    def teacher(self, figure: str) -> float | None:
        """The teacher's mean over seeds."""
        values = [result.figures[figure] for result in self.teachers.values()]
        return float(np.mean(values)) if values else None

    def gflops(self, model: Model) -> float | None:
        """Of one image; a teacher's shape is known from its students, None where there are none."""
        config = model.about.get("student")
        if not config:
            shapes = {row.model.about["teacher_hash"]: row.model.about["student"] for row in self.students}
            config = {k: v for k, v in shapes.get(model.about["teacher_hash"], {}).items() if k not in ARD_ONLY_ARGS}
        tokens = model.about.get("sample_captions", {}).get("longest", 0)
        return count_gflops(json.dumps(config), model.steps, tokens) if config else None

    def milliseconds(self, name: str) -> tuple[float | None, list[str]]:
        """The median over seeds of the measured time of a sample, and on what."""
        tables = [content_of(path) for seed in self.seeds if (path := seed / "table.json").exists()]
        lines = [line for table in tables for line in table if line.get("name") == name and "ms_per_sample" in line]
        times, how = [line["ms_per_sample"] for line in lines], {line.get("timed", "a clock") for line in lines}
        return float(np.median(times)) if times else None, sorted(how)
