"""Count the GFLOPs column of the paper's Table 1 from our own models, on the meta device: nothing is computed.

    python -m evaluations.flops --json flops.json

PyTorch's counter watches the same ``ARD.sample`` and ``DiT.forward`` that users run, for one image of DiT-XL/2. The
paper counts multiply-accumulates, half of what PyTorch counts, of the backbone, without the VAE.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import cli
from diffusion import create_diffusion
from models import DiT, DiT_models
from models_ard import ARD

# Table 1: name, loss, S, mask, N, GFLOPs. The teacher evaluates twice a step, with and without its label.
TABLE_1 = [
    ("DiT-XL/2, 250 steps", "-", 250, None, None, 59300),
    ("DiT-XL/2, 25 steps (teacher)", "-", 25, None, None, 5930),
    ("KD", "R", 1, "M1", 0, 118.6),
    ("Step distillation", "R", 2, "M1", 0, 237.2),
    ("ARD", "R", 2, "M4", 6, 238.1),
    ("ARD", "R", 2, "M4", 28, 241.5),
    ("Step distillation", "R", 4, "M1", 0, 474.4),
    ("ARD", "R", 4, "M2", 6, 477.1),
    ("ARD", "R", 4, "M3", 6, 477.1),
    ("ARD", "R", 4, "M4", 6, 479.9),
    ("ARD", "R", 4, "M4", 28, 500.2),
    ("Step distillation", "R+D", 4, "M1", 0, 474.4),
    ("ARD", "R+D", 4, "M4", 6, 479.9),
]


def count_flops(work) -> int:
    """Floating-point operations (two for a multiply-accumulate) of what ``work()`` does."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def sampling_gflops(model: DiT, steps: int) -> float:
    """Multiply-accumulates, in 1e9, that one image costs: a student's sampling, or a teacher's guided DDIM."""
    device = next(model.parameters()).device
    noise, y = torch.empty(1, *model.latent_shape, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    if isinstance(model, ARD):
        return count_flops(lambda: model.sample(noise, y)) / 2e9
    # A guided step is the same work at every time: count one, on both halves of the batch, and multiply.
    one = count_flops(lambda: create_diffusion("1").ddim_trajectory(model, noise, y, cfg_scale=1.5))
    return one * steps / 2e9


def count_table(model: str) -> list[dict]:
    """One row for each of Table 1's, counted for the given size."""
    rows, counted = [], {}
    with torch.device("meta"):
        teacher = DiT_models[model]()
    for name, loss, steps, mask, layers, paper in TABLE_1:
        if layers is not None:
            layers = min(layers, len(teacher.blocks))
        if (steps, mask, layers) not in counted:
            with torch.device("meta"):
                student = ARD(steps, mask, layers, **teacher.config) if mask else None
            counted[steps, mask, layers] = sampling_gflops(student or teacher, steps)
        row = {"row": name, "loss": loss, "steps": steps, "mask": mask, "history_layers": layers}
        row |= {"gflops": counted[steps, mask, layers], "paper_gflops": paper if model == "DiT-XL/2" else None}
        rows.append(row)
    return rows


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="evaluations.flops", description="Count the GFLOPs column of the paper's Table 1.")
    parser.add_argument("--model", choices=DiT_models, default="DiT-XL/2", metavar="NAME", help="size of the model")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    return parser


def run(args: argparse.Namespace) -> None:
    rows = count_table(args.model)
    print(f"{'row':<30}{'loss':>5}{'S':>5}{'mask':>6}{'N':>4}{'GFLOPs':>10}{'paper':>9}{'off by':>9}")
    for row in rows:
        mask, layers, paper = row["mask"] or "-", row["history_layers"], row["paper_gflops"]
        off = f"{100 * (row['gflops'] / paper - 1):+.2f}%" if paper else "-"
        layers = "-" if layers is None else layers
        line = f"{row['row']:<30}{row['loss']:>5}{row['steps']:>5}{mask:>6}{layers:>4}"
        print(f"{line}{row['gflops']:>10.1f}{paper or '-':>9}{off:>9}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    cli.main(build_parser(), run)
