"""Draw the figures of docs/method.md from the code that they explain.

python -m docs.figures --out docs
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from models_ard import MASKS, cache_slots, visible_steps
from runtime import cli
from runtime.files import atomic_write

STEPS = 4
UNSEEN, EARLIER, OWN = range(3)
# White and two colours of Okabe and Ito's palette, which differ in brightness as well as in hue.
LOOKS = {UNSEEN: ("not seen", "#FFFFFF"), EARLIER: ("an earlier point", "#E69F00"), OWN: ("its own point", "#0072B2")}


def seen_points(mask: str, steps: int) -> np.ndarray:
    """(S, S), a row for each step that looks and a column for each point: ``UNSEEN``, ``EARLIER`` or ``OWN``."""
    seen = np.full((steps, steps), UNSEEN)
    for step in range(steps):
        *earlier, own = visible_steps(mask, step)
        seen[step, earlier], seen[step, own] = EARLIER, OWN
    return seen


def draw_masks(steps: int = STEPS) -> Figure:
    """One matrix for each mask, and below it the number of slots that its kv-cache has."""
    figure = Figure(figsize=(9, 3.5))
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.27, top=0.83, wspace=0.26)
    colours = ListedColormap([colour for _, colour in LOOKS.values()])
    for axes, mask in zip(figure.subplots(1, len(MASKS)), MASKS, strict=True):
        edges = np.arange(steps + 1) - 0.5
        seen = seen_points(mask, steps)
        axes.pcolormesh(edges, edges, seen, cmap=colours, vmin=UNSEEN, vmax=OWN, edgecolors="#999999", linewidth=0.8)
        axes.invert_yaxis()  # step 0 is the top row
        axes.set(aspect="equal", xticks=range(steps), yticks=range(steps))
        axes.tick_params(length=0, labelsize=11)
        axes.set_title(mask, fontsize=13, fontweight="bold")
        axes.set_ylabel("step", fontsize=11)
        slots = max(cache_slots(mask, steps)) + 1
        axes.set_xlabel("point it sees\n(0 is the noise)", fontsize=11)
        text = "kv-cache: 1 slot" if slots == 1 else f"kv-cache: {slots} slots"
        axes.text(0.5, -0.47, text, transform=axes.transAxes, ha="center", fontsize=11, fontweight="bold")
    handles = [Patch(facecolor=colour, edgecolor="#999999", label=label) for label, colour in LOOKS.values()]
    figure.legend(handles=handles[::-1], loc="upper center", ncols=len(handles), fontsize=11, frameon=False)
    return figure


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="docs.figures", description="Draw the figures of docs/method.md.")
    parser.add_argument("--out", type=Path, required=True, help="Folder to write masks.png to.")
    return parser


def run(args: argparse.Namespace) -> None:
    path = args.out / "masks.png"
    with atomic_write(path) as partial:
        draw_masks().savefig(partial, format="png", dpi=160, metadata={"Software": None})
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    cli.main(build_parser(), run)
