"""The one owner of the trajectory store: few large safetensors shards and a manifest (shards.py).

    DIR/manifest.json          provenance, teacher steps of the stored points among it
    DIR/shard-00000.safetensors
        noise (n, C, H, W)     label (n,) int64
        xt    (n, K, C, H, W)  the teacher's state after each of the K stored steps
        x0    (n, K, C, H, W)  what the teacher predicts x_0 to be from that state; the last point is the sample itself

Trajectory i is a function of (seed, i) alone. Shards are memory-mapped: a batch is gathered from the page cache
straight into one tensor.

    python trajectory.py verify DIR
    python trajectory.py export DIR --out teacher.npz
"""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

import checkpoint
import cli
from cli import UserError
from distributed import Ranks, add_device_option, finish, setup
from models import DiT
from provenance import require_same
from randomness import Shuffle, labels, noise
from shards import ShardStore
from teacher_ode import TeacherODE
from training import autocast
from vae import load_vae

TARGETS = ("x0", "xt")
GRIDS = ("even", "authors")


def grid_steps(steps: int, grid: str = "even", teacher_steps: int = 25) -> list[int]:
    """After which teacher steps the S points of a student's trajectory lie, noisiest first, the last is the sample.

    "even": round(n k / S), so that S = 1, 2, 4 share points (6, 12, 19, 25 of 25). "authors": the released code's
    10, 15, 20, 25 of 25 for S = 4. Raises ``ValueError`` for a grid that does not exist.
    """
    if grid == "even" and 1 <= steps <= teacher_steps:
        return [round(teacher_steps * k / steps) for k in range(1, steps + 1)]
    if grid == "authors" and (steps, teacher_steps) == (4, 25):
        return [10, 15, 20, 25]
    if grid == "authors":
        raise ValueError(f"the authors' grid has 4 student steps of 25 teacher steps, not {steps} of {teacher_steps}")
    raise ValueError(f"grid {grid!r} has no {steps} student steps of {teacher_steps} teacher steps")


def pick_points(x: torch.Tensor, x0: torch.Tensor, points: list[int]) -> dict[str, torch.Tensor]:
    """The points of a student's grid out of a full teacher trajectory.

    x: (B, n+1, C, H, W) states and x0: (B, n, C, H, W) predictions of ``ddim_trajectory`` -> {"xt", "x0"}: (B, K, C, H,
    W) each. The predicted x_0 at a point is the one made from that state; at the end it is the sample.
    """
    predicted = torch.cat([x0, x[:, -1:]], dim=1)
    return {"xt": x[:, points], "x0": predicted[:, points]}


class TrajectoryStore(ShardStore):
    """A finished store of trajectories, open for random reads."""

    kind = "trajectory store"

    def __init__(self, folder: str | Path, option: str = "--data-path"):
        """``UserError`` naming ``option`` when the store is missing, unfinished, truncated or of something else."""
        super().__init__(folder, option)
        if "points" not in self.provenance:
            raise UserError(f"{option} {folder}: this store holds no trajectories; sample_trajectory.py makes one")
        self.points = self.provenance["points"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each point."""
        return tuple(self.tensors[0]["noise"].shape[1:])

    def load_teacher(self, path: str | None = None) -> tuple[DiT, dict]:
        """The teacher whose trajectories these are, from ``path`` or where the store says; another one is refused."""
        teacher, config = checkpoint.load_teacher(path or self.provenance["teacher"])
        mine = {name: config["provenance"][name] for name in ("teacher_hash", "vae")}
        require_same(f"--data-path {self.folder}: these trajectories are another teacher's", self.provenance, mine)
        return teacher, config

    def point_columns(self, wanted: list[int], target: str) -> list[int]:
        """Where the points of a student's grid are stored. ``UserError`` when the dump lacks them, or the target."""
        if target not in self.tensors[0]:
            has = ", ".join(name for name in TARGETS if name in self.tensors[0])
            raise UserError(f"--target {target}: the store {self.folder} has only {has}")
        missing = [step for step in wanted if step not in self.points]
        if missing:
            raise UserError(
                f"--steps {len(wanted)} needs the points after teacher steps {wanted}, but the store {self.folder} has "
                f"{self.points}: choose --steps and --grid to match, or dump again with them"
            )
        return [self.points.index(step) for step in wanted]

    def read(self, rows: np.ndarray, target: str, columns: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole student trajectories: rows (B,) -> (B, S+1, C, H, W) float32, noisiest first, and labels (B,) int64.

        Point 0 is the noise; the next ones are the stored ``columns`` of "x0" or "xt".
        """
        out = np.empty((len(rows), 1 + len(columns), *self.latent_shape), self.arrays[0]["noise"].dtype)
        y = np.empty(len(rows), np.int64)
        whole = columns == list(range(len(self.points)))
        for i, (start, points, (shard, row)) in enumerate(zip(out[:, 0], out[:, 1:], self.locate(rows))):
            arrays = self.arrays[shard]
            start[...] = arrays["noise"][row]
            points[...] = arrays[target][row] if whole else arrays[target][row, columns]
            y[i] = arrays["label"][row]
        return torch.from_numpy(out).float(), torch.from_numpy(y)


class TrajectoryBatches(Dataset):
    """Item n is this rank's share of step n: trajectories (b, S+1, C, H, W), noisiest first, and labels (b,)."""

    def __init__(self, store: TrajectoryStore, points: list[int], target: str, args, ranks: Ranks):
        """``points`` and ``target`` as a student has them; ``args`` has seed and global_batch_size."""
        self.store, self.target, self.args, self.ranks = store, target, args, ranks
        self.columns = store.point_columns(points, target)
        self.shuffle = Shuffle(len(store), args.seed)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        first = step * self.args.global_batch_size
        share = self.ranks.share(self.args.global_batch_size)
        rows = self.shuffle.rows(first + share.start, first + share.stop)
        trajectory, y = self.store.read(rows, self.target, self.columns)
        return {"trajectory": trajectory, "y": y}

    def complete(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Nothing to add: the trajectories were stored."""
        return batch


class OnlineBatches(Dataset):
    """The same without a store: item n has noise and labels only, and ``complete`` solves the teacher's ODE for them.

    Every step has trajectories that were never seen before: those that a dump with this seed would go on to write.
    """

    def __init__(self, ode: TeacherODE, points: list[int], target: str, args, ranks: Ranks):
        self.ode, self.points, self.target, self.args, self.ranks = ode, points, target, args, ranks

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        first = step * self.args.global_batch_size
        share = self.ranks.share(self.args.global_batch_size)
        indices, teacher = range(first + share.start, first + share.stop), self.ode.teacher
        z = noise(self.args.seed, "trajectory", indices, teacher.latent_shape)
        return {"noise": z, "y": labels(self.args.seed, indices, teacher.num_classes)}

    def complete(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Noise (b, C, H, W) and labels (b,) -> trajectories (b, S+1, C, H, W), noisiest first, and the labels."""
        with autocast(self.args.precision, self.ranks.device):
            points = pick_points(*self.ode(batch["noise"], batch["y"]), self.points)[self.target]
        return {"trajectory": torch.cat([batch["noise"][:, None], points], dim=1), "y": batch["y"]}


def verify(args) -> None:
    """Check a whole store: sizes, checksums, counts, finiteness, labels; print a one-line summary."""
    store = TrajectoryStore(args.folder, "DIR")
    size, p = store.verify("DIR"), store.provenance
    print(
        f"{args.folder}: ok, {len(store)} trajectories of {store.latent_shape}, points after steps {p['points']} of "
        f"{p['solver_steps']}, {p['num_classes']} classes, guidance {p['cfg_scale']}, teacher {p['teacher_hash']}, "
        f"{size / 1e6:.1f} MB"
    )


def export(args) -> None:
    """Write the teacher's final samples to ADM's .npz: they cost nothing more than decoding."""
    from samples import write_samples  # the store itself knows nothing of images

    store = TrajectoryStore(args.folder, "DIR")
    count = args.num_samples or len(store)
    if count > len(store):
        raise UserError(f"--num-samples {count}: the store {args.folder} has only {len(store)} trajectories")
    ranks = setup(args.device)
    vae = load_vae(store.provenance["vae"], ranks.device)
    target = next(name for name in TARGETS if name in store.tensors[0])  # the last point is the sample in both

    def draw(indices):
        points, y = store.read(np.array(indices), target, [len(store.points) - 1])
        return points[:, 1], vae.decode(points[:, 1].to(ranks.device)), y

    write_samples(Path(args.out), count, draw, store.provenance, ranks, args.per_proc_batch_size)
    finish(ranks)


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Look after a trajectory store.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=cli.Parser)
    command = commands.add_parser("verify", help="check counts, checksums and finiteness")
    command.add_argument("folder", metavar="DIR", help="the store")
    command.set_defaults(run=verify)
    command = commands.add_parser("export", help="write the final samples to ADM's .npz")
    command.add_argument("folder", metavar="DIR", help="the store")
    command.add_argument("--out", required=True, help="the .npz")
    command.add_argument("--num-samples", type=cli.positive, help="the first so many only")
    command.add_argument("--per-proc-batch-size", type=cli.positive, default=64, help="samples decoded at once")
    add_device_option(command)
    command.set_defaults(run=export)
    return parser


def run(args) -> None:
    args.run(args)


if __name__ == "__main__":
    cli.main(build_parser(), run)
