"""Finds what runs have left in folders, and says what belongs together: the input of lab.report.

Every file says itself what it is: metrics of the evaluator hold the provenance of the samples, samples their own, a
run its config. So a folder of any layout will do. What is not of this project, or cannot be read, is passed over.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from costs.flops import meta_model, sampling_gflops
from presets import TABLE_1
from runtime.cli import UserError
from runtime.provenance import with_current_keys
from stores.runs import read_config
from stores.samples import read_provenance

FIGURES = ("fid", "inception_score", "precision", "recall")
# Of a teacher's samples and of a student's trajectories: what decides which teacher it is, and how it was solved.
SAME_TEACHER = ("teacher_hash", "solver", "solver_steps", "cfg_scale", "cfg_channels")
# Of samples: what else decides a figure, but for seeds.
DECISIVE = (
    *(*SAME_TEACHER, "student", "target", "grid", "step", "start_step", "weights", "real", "online"),
    *("dtype", "precision", "trajectories", "sample_precision", "sample_labels", "sample_captions"),
)
ARD_ONLY_ARGS = ("steps", "mask", "history_layers", "level_embedding")


@dataclass(frozen=True)
class Model:
    """A student, or a teacher, as provenance describes it; without its seed, which is what runs are averaged over."""

    about: dict

    @cached_property
    def student(self) -> dict:
        """Its config, {} for a teacher."""
        return self.about.get("student") or {}

    @property
    def training(self) -> dict:
        """How it was trained, but for the seed; {} for a teacher."""
        return {name: value for name, value in self.about.get("training", {}).items() if name != "seed"}

    @property
    def steps(self) -> int:
        """Steps of sampling."""
        return self.student["steps"] if self.student else self.about["solver_steps"]

    @property
    def layers(self) -> int:
        """Layers that do look at history, N."""
        return 0 if not self.student or self.mask == "M1" else self.student["history_layers"]

    @property
    def mask(self) -> str:
        """M1 where there is no history, whatever the name of the mask."""
        if not self.student:
            return "-"
        return self.student["mask"] if self.student["history_layers"] and self.student["steps"] > 1 else "M1"

    @property
    def depth(self) -> int:
        """Layers in all; 0 where it is not known."""
        return self.student.get("depth", 0)

    @property
    def target(self) -> str:
        """What it predicts; in one step both targets are the sample."""
        return self.about.get("target", "-") if self.steps > 1 else "-"

    @property
    def loss(self) -> str:
        """R, R+D, or - for a teacher."""
        return self.about.get("training", {}).get("loss", "R") if self.student else "-"

    @property
    def iteration(self) -> int:
        """Training steps behind these weights; R+D counts from its own start."""
        return self.about.get("step", 0) if self.student else 0

    @property
    def method(self) -> str:
        """What the paper calls it."""
        if not self.student:
            return "teacher"
        if self.steps == 1:
            return "KD"
        return "ARD" if self.layers else "step distillation"

    @property
    def text_tokens(self) -> int:
        """Of the longest caption that it was sampled from, 0 for a model of classes."""
        return self.about.get("sample_captions", {}).get("longest", 0)

    @property
    def name(self) -> str:
        """For a legend: the method, and its mask and N where it has them."""
        return f"ARD {self.mask}, N={self.layers}" if self.method == "ARD" else self.method

    @property
    def shape(self) -> tuple:
        """What sets it apart from others in a table, in the order of one."""
        return (bool(self.student), self.steps, self.loss, self.target, self.layers > 0, self.mask, self.layers)

    @property
    def plain(self) -> bool:
        """Whether it was sampled from noise by itself, without a teacher's points or a source image."""
        return not self.about.get("teacher_steps") and not self.about.get("source_images")

    def published(self) -> str | None:
        """The row of Table 1 that it corresponds to; N of all layers stands for 28, any less for 6."""
        layers = 28 if self.layers and self.layers == self.depth else 6 if self.layers else 0
        wanted = (self.steps, self.loss, self.mask, layers) if self.student else (self.steps, "-", None, None)
        if self.target == "xt" or self.about.get("captions"):
            return None
        rows = ((name, (row.steps, row.loss, row.mask, row.history_layers)) for name, row in TABLE_1.items())
        return next((name for name, row in rows if row == wanted), None)


def main_layers(models: Sequence[Model]) -> int:
    """The usual N: that of most models with history in some of their layers."""
    some = Counter(m.layers for m in models if 0 < m.layers < m.depth) or Counter(m.layers for m in models if m.layers)
    return min(some, key=lambda n: (-some[n], n)) if some else 0


def most_steps(models: Sequence[Model]) -> int:
    """The largest S of regression-trained students."""
    return max((m.steps for m in models if m.student and m.loss == "R"), default=0)


def listed(values: Sequence[Any]) -> str:
    """Distinct values in order, for a sentence."""
    return ", ".join(str(value) for value in sorted(set(values)))


@dataclass(frozen=True)
class Result:
    """One file of metrics: figures of some samples, and what these are."""

    path: Path
    figures: dict
    model: Model

    @property
    def features(self) -> str:
        """The network behind the figures."""
        return self.figures["provenance"]["features"]

    def key(self, *without: str) -> str:
        """Equal for results that differ in their seeds alone, and in those values of the provenance named."""
        about = {name: self.model.about.get(name) for name in DECISIVE if name not in without}
        about["training"] = self.model.training
        return json.dumps([about, self.yardstick, self.figures["count"]], sort_keys=True)

    def alike(self, *without: str) -> str:
        """Equal for results that differ in what their students see of the history, in seeds, and in those values."""
        return json.dumps([self.key("student", *without), self.model.steps])

    @property
    def yardstick(self) -> tuple:
        """What the figures are measured by: the network and the real images."""
        seen = self.figures["provenance"]
        real = seen["reference_file"]
        return self.features, seen["weights_sha256"], real.get("sha256") or real.get("listing")

    @property
    def seeds(self) -> tuple:
        """Of training and of sampling."""
        return self.model.about.get("training", {}).get("seed"), self.model.about.get("sample_seed")


@dataclass
class Row:
    """Results of equal models that differ in their seeds; figures are means with their spread."""

    results: list[Result]
    degradations: list[float] = field(default_factory=list)

    @property
    def model(self) -> Model:
        """Any of them."""
        return self.results[0].model

    def values(self, figure: str) -> list[float]:
        """The figure of each seed."""
        return self.degradations if figure == "degradation" else [r.figures[figure] for r in self.results]

    def gflops(self) -> float | None:
        """Multiply-accumulates of one image; None where the architecture is not known."""
        model = self.model
        return count_gflops(json.dumps(model.student), model.steps, model.text_tokens) if model.student else None


_counted: dict[tuple[str, int, int], float] = {}


def count_gflops(student: str, steps: int, text_tokens: int = 0, teacher: bool = False) -> float:
    """Of a student with this config (as JSON), or of its teacher in so many guided steps."""
    config = json.loads(student)
    if teacher:
        config = {name: value for name, value in config.items() if name not in ARD_ONLY_ARGS}
    key = json.dumps(config), steps, text_tokens
    if key not in _counted:
        _counted[key] = sampling_gflops(meta_model(config), steps, text_tokens=text_tokens)
    return _counted[key]


class Results:
    """All that some folders hold."""

    def __init__(self, folders: Iterable[Path]):
        self.folders = [Path(folder).resolve() for folder in folders]
        self.metrics = [r for path in self._files("*.json") if (r := read_metrics(path)) is not None]
        self.samples = {path: about for path in self._files("*.npz") if (about := provenance_of(path))}
        self.stores = sorted({p.parent for p in self._files("manifest.json") if b"solver_indices" in p.read_bytes()})
        self.runs = {path.parent: config for path in self._files("config.json") if (config := read_config(path.parent))}

    def _files(self, pattern: str) -> list[Path]:
        """In a fixed order, each once, without those of runs or samples that are being written."""
        found = {path for folder in self.folders for path in folder.rglob(pattern)}
        return sorted(path for path in found if not any(part.endswith(".partial") for part in path.parts))

    def rows(self, keep: Callable[[Result], bool], *without: str) -> list[Row]:
        """Those results in groups of equal models, in the order of a table, with their degradation."""
        groups: dict[str, list[Result]] = defaultdict(list)
        for result in self.metrics:
            if keep(result):
                groups[result.key(*without)].append(result)
        rows = [Row(results, self._degradations(results)) for results in groups.values()]
        return sorted(rows, key=lambda row: (row.model.shape, row.model.iteration))

    def table(self) -> list[Row]:
        """The rows of Table 1: of each training the figures with most samples."""
        most: dict[str, int] = defaultdict(int)
        for result in self.metrics:
            key = json.dumps(json.loads(result.key("step"))[:2])
            most[key] = max(most[key], result.figures["count"])
        finest = [r for r in self.metrics if r.figures["count"] == most[json.dumps(json.loads(r.key("step"))[:2])]]
        return self.rows(lambda result: result.model.plain and result in finest)

    def _degradations(self, results: list[Result]) -> list[float]:
        """FID minus the teacher's, which is of the same folder or else the mean of all; none without a teacher."""
        found = []
        for result in results:
            teachers = [t for t in self.metrics if not t.model.student and same_teacher(t, result)]
            near = [t for t in teachers if t.path.parent in (result.path.parent, *result.path.parents)] or teachers
            if near:
                found.append(result.figures["fid"] - float(np.mean([t.figures["fid"] for t in near])))
        return found

    def milliseconds(self, row: Row) -> tuple[float | None, set[str]]:
        """Measured time of one sample, and on what: from the table.json that demo and study leave."""
        found, how = [], set()
        for result in row.results:
            path, model = result.path.parent / "table.json", result.model
            mine = {"model": model.method, "loss": model.loss, "target": model.target, "steps": model.steps}
            mine |= {"mask": model.mask, "history_layers": model.layers}
            for line in timings(path):
                if all(line.get(key, value) == value for key, value in mine.items()):
                    found.append(line["ms_per_sample"])
                    how.add(line.get("timed", "see the table.md of the run"))
        return (float(np.median(found)) if found else None), how


def same_teacher(teacher: Result, result: Result) -> bool:
    """Whether these are figures of the student's own teacher, by the same yardstick and as many samples."""
    a, b = teacher.model.about, result.model.about
    counted = teacher.figures["count"] == result.figures["count"]  # FID falls with the number of samples
    return counted and teacher.yardstick == result.yardstick and all(a.get(n) == b.get(n) for n in SAME_TEACHER)


def timings(path: Path) -> list[dict]:
    """The lines of a demo's or study's table.json that say how long a sample takes."""
    try:
        lines = json.loads(path.read_text())
        return [
            line
            for line in lines
            if isinstance(line.get("ms_per_sample"), float) and isinstance(line.get("timed", ""), str)
        ]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def read_metrics(path: Path) -> Result | None:
    """What the evaluator wrote, None for another JSON file or samples that do not say what they are."""
    try:
        content = json.loads(path.read_text())
        about = with_current_keys(content["provenance"]["samples"])
        result = Result(path, content, Model(about))
        whole = result.model.steps and all(name in content for name in (*FIGURES, "count"))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return None
    return result if whole else None


def provenance_of(path: Path) -> dict:
    """What a file of samples says of itself, {} where it says nothing."""
    try:
        return read_provenance(path)
    except (UserError, ValueError):
        return {}
