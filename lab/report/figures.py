"""Figures for a paper's column, 3.3 inches wide, in Okabe and Ito's colours, which colour-blind readers tell apart.

Every line also has its marker, so that it can be read in grey. Nothing here knows where numbers come from. All is drawn
and saved within ``matplotlib.rc_context(STYLE)``.
"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from runtime.files import atomic_write

WIDTH = 3.3  # inches, one column
STYLE: Any = {
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # text stays text
    "figure.constrained_layout.use": True,
}
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
)
MARKERS = dict(zip((BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK), "osD^vPX"))


@dataclass
class Picture:
    """A figure, what a reader must know of it, and the numbers that it shows (as JSON has them)."""

    figure: Figure
    caption: str
    numbers: Any = None


@dataclass
class Series:
    """A line: values of several seeds at each x; the band is from the lowest to the highest."""

    label: str
    x: list[Any]  # numbers
    values: list[list[float]]
    colour: str
    dashed: bool = False

    @property
    def numbers(self) -> dict[str, Any]:
        """For a file."""
        return {"label": self.label, "x": list(self.x), "values": [list(values) for values in self.values]}


def plain_log(axis: Axes) -> None:
    """A logarithmic y axis with numbers as one writes them."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain = ScalarFormatter()
    plain.set_scientific(False)
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(NullFormatter())


def add_series(axis: Axes, series: Series) -> None:
    """One line with its band."""
    means = [float(np.mean(values)) for values in series.values]
    look: dict[str, Any] = {
        "color": series.colour,
        "marker": MARKERS.get(series.colour, "o"),
        "ls": "--" if series.dashed else "-",
    }
    axis.plot(series.x, means, label=series.label, mfc="white" if series.dashed else series.colour, **look)
    if any(len(values) > 1 for values in series.values):
        low, high = [min(v) for v in series.values], [max(v) for v in series.values]
        axis.fill_between(series.x, low, high, color=series.colour, alpha=0.15, lw=0)


def labelled(axes: Iterable[Axes]) -> dict[str, Any]:
    """What a legend of several panels shows: a line for each label."""
    return {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}


def draw_lines(
    panels: dict[str, list[Series]], xlabel: str, ylabel: str = "", teacher: dict[str, Any] | None = None
) -> Figure:
    """A panel of lines over one x axis for each {title: lines}: side by side on one scale with a ``ylabel``, else below
    each other, with their titles at their y axes.

    Of those below each other, an axis is logarithmic where the largest mean is above 1 and ten times the smallest.
    ``teacher`` has the height of a
    horizontal line in each panel.
    """
    rows = 1 if ylabel else len(panels)
    figure = Figure(figsize=(WIDTH, 0.7 + 1.4 * rows))
    axes = figure.subplots(rows, len(panels) // rows, sharex=True, sharey=bool(ylabel), squeeze=False)
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=True):
        for line in series:
            add_series(axis, line)
        means = [float(np.mean(values)) for line in series for values in line.values]
        if level := (teacher or {}).get(title):
            axis.axhline(level, color=BLACK, lw=0.8, ls=":", label="teacher")
            means.append(level)
        if ylabel:
            axis.set_ylim(bottom=0)
        elif min(means) > 0 and max(means) > max(1, 10 * min(means)):
            plain_log(axis)
        else:
            highest = max(value for line in series for values in line.values for value in values)
            axis.set_ylim(min(0, *means), 1.08 * max(highest, *means))
        axis.set(**({"title": title} if ylabel else {"ylabel": title}))
    points = sorted({x for series in panels.values() for line in series for x in line.x})
    for axis in axes[-1]:
        axis.set_xlabel(xlabel)
        if points == [int(x) for x in points] and points[-1] < 100:
            axis.set_xticks(points)
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5))
    if ylabel:
        axes[0, 0].set_ylabel(ylabel)
    handles = labelled(axes.flat)
    columns = 3 if len(handles) == 3 else 2
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=columns)
    return figure


def draw_attention(panels: dict[str, np.ndarray]) -> Figure:
    """Fig. 4: a column for each student {title: shares (L, S, S)}, a row for each step from the second on."""
    steps = next(iter(panels.values())).shape[1]
    figure = Figure(figsize=(WIDTH, 0.45 + 1.0 * (steps - 1)))
    grid = figure.subplots(steps - 1, len(panels), sharex=True, sharey=True, squeeze=False)
    colours = [BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK]
    for column, (title, shares) in enumerate(panels.items()):
        layers = np.arange(1, len(shares) + 1)
        for step in range(1, steps):
            axis = grid[step - 1, column]
            for point in range(step + 1):
                own = point == step
                colour = RED if own else colours[point % len(colours)]
                label = "its own point" if own else "noise" if point == 0 else f"point {point}"
                axis.plot(layers, shares[:, step, point], color=colour, marker=MARKERS[colour], ms=3, label=label)
            axis.set(ylim=(-0.04, 1.04), yticks=[0, 0.5, 1])
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if step == 1:
                axis.set_title(title)
            if column == 0:
                axis.set_ylabel(f"step {step + 1}\nshare")
        grid[-1, column].set_xlabel("layer")
    handles = labelled(grid.flat)
    order = sorted(handles, key=lambda label: (label == "its own point", label != "noise", label))
    figure.legend([handles[o] for o in order], order, loc="outside upper center", ncols=min(4, len(order)))
    return figure


def draw_images(rows: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """A labelled row for each (label, images (n, H, W, 3) uint8); a column is one noise, or one source."""
    columns, margin = len(rows[0][1]), 0.78
    side = (WIDTH - margin) / columns
    figure = Figure(figsize=(WIDTH, side * len(rows) * 1.06))
    figure.set_layout_engine("none")
    for i, (label, images) in enumerate(rows):
        axis = figure.add_axes((margin / WIDTH, 1 - (i + 1) / len(rows), 1 - margin / WIDTH, 0.94 / len(rows)))
        gap = max(1, images.shape[1] // 16)
        padded = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
        axis.imshow(np.concatenate(list(padded), axis=1), interpolation="nearest", aspect="auto")
        axis.set_axis_off()
        figure.text(0, 1 - (i + 0.5) / len(rows), label, va="center", fontsize=7)
    return figure


def draw_bars(groups: dict[str, dict[str, list[float]]], colours: dict[str, str], ylabel: str) -> Figure:
    """A panel of bars for each group, {group: {bar: values of the seeds}}: the mean, and a dot for each seed."""
    figure = Figure(figsize=(WIDTH, 2.2))
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    handles = {}
    for axis, (group, bars) in zip(panels, groups.items(), strict=True):
        for x, (name, values) in enumerate(bars.items()):
            mean = float(np.mean(values))
            handles[name] = axis.bar(x, mean, 0.85, color=colours[name])
            axis.plot([x] * len(values), values, ".", color=BLACK, ms=3)
            text = f"{mean:.2g}" if abs(mean) < 100 else f"{mean:.0f}"
            axis.annotate(text, (x, max(0, *values)), (0, 3), textcoords="offset points", ha="center", fontsize=7)
        axis.set_xticks([])
        axis.axhline(0, color=BLACK, lw=0.6)
        axis.margins(y=0.14)
        axis.set_title(group)
    panels[0].set_ylabel(ylabel)
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=2)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write it as ``path``.pdf and ``path``.png, the same bytes from the same numbers."""
    kinds: dict[str, Any] = {"pdf": {"CreationDate": None}, "png": {"Software": None}}
    for kind, metadata in kinds.items():
        with atomic_write(path.with_suffix(f".{kind}")) as partial:
            figure.savefig(partial, format=kind, dpi=300, metadata=metadata)


def inline_png(path: Path) -> str:
    """An image as a data URL."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
