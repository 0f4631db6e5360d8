"""The one owner of the trajectory store: few large safetensors shards and a manifest (shards.py).

    DIR/manifest.json          provenance, among it the solver indices of the stored points
    DIR/shard-00000.safetensors
        noise (n, C, H, W)     label (n,) int64
        xt    (n, K, C, H, W)  the teacher's state after each of the K stored steps
        x0    (n, K, C, H, W)  the teacher's prediction of x_0 from that state; the last point is the sample itself

Trajectory i is a function of (seed, i) alone. Shards are memory-mapped: a batch is gathered from the page cache
straight into one tensor.

    python -m stores.trajectories verify DIR
    python -m stores.trajectories repair DIR
    python -m stores.trajectories export DIR --out teacher.npz
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from diffusion.teacher_ode import TARGETS
from models import DiT
from runtime import cli, distributed
from runtime.cli import UserError
from runtime.distributed import DistributedContext
from runtime.precision import DTYPES
from runtime.provenance import require_same
from runtime.randomness import Classes, Conditions, Shuffle
from runtime.vae import load_same_vae
from stores import checkpoints
from stores.samples import SampleWriter
from stores.shards import ShardStore, store_parser


def row_bytes(shape: tuple[int, ...], points: int, targets: int, dtype: str) -> int:
    """Bytes of a trajectory: latents of ``shape``, the noise and each target at each point, and the label."""
    return torch.Size(shape).numel() * DTYPES[dtype].itemsize * (1 + points * targets) + torch.int64.itemsize


def kept_targets(store: str) -> tuple[str, ...]:
    """The targets in a store that ``--store`` names: "both", or one."""
    return TARGETS if store == "both" else (store,)


# The keys of a store's provenance that its readers need.
NEEDED = ("teacher", "teacher_hash", "teacher_weights", "vae", "num_classes", "solver_steps", "cfg_scale")


class TrajectoryStore(ShardStore):
    """A finished store of trajectories, open for random reads."""

    kind = "trajectory store"

    def __init__(self, folder: str | Path, option: str = "--data-path", verify: bool = False):
        """``UserError`` naming ``option`` when the store is missing, unfinished, truncated or of something else."""
        super().__init__(folder, option, verify)
        if "solver_indices" not in self.provenance:
            raise UserError(f"{option} {folder}: this store holds no trajectories; sample_trajectory.py makes one")
        absent = [name for name in NEEDED if name not in self.provenance]
        if absent:
            raise UserError(f"{option} {folder}/manifest.json: its provenance lacks {', '.join(absent)}; make it again")
        self.require("noise", "label")
        self.solver_indices: list[int] = self.provenance["solver_indices"]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W) of each point."""
        return tuple(self.tensors[0]["noise"].shape[1:])

    def load_teacher(
        self, path: str | None = None, heads: int | None = None, process: str | None = None
    ) -> tuple[DiT, dict]:
        """The teacher whose trajectories these are, from ``path`` or where the store says; another one is refused.

        ``heads`` and ``process`` as for ``checkpoints.load_teacher``, by default the options of the dump.
        """
        own = self.provenance.get("process", "ddpm")
        if process not in (None, own):
            raise UserError(
                f"{checkpoints.PROCESS} {process}: the trajectories of {self.folder} are of the process {own}, leave "
                "the option out"
            )
        weights, heads = self.provenance["teacher_weights"], heads or self.provenance.get("teacher_heads")
        source = path or checkpoints.recorded_teacher(self.provenance["teacher"], self.folder)
        vae = self.provenance["vae"]
        teacher, config = checkpoints.load_teacher(source, weights=weights, heads=heads, vae=vae, process=own)
        mine = {name: config["provenance"].get(name) for name in ("teacher_hash", "vae", "vae_hash")}
        if "teacher_heads" in self.provenance | config["provenance"]:
            mine["teacher_heads"] = teacher.config["num_heads"]
        require_same(f"--data-path {self.folder}: these trajectories are another teacher's", self.provenance, mine)
        return teacher, config

    def point_columns(self, wanted: list[int], target: str) -> list[int]:
        """Where the points after these solver steps are stored; ``UserError`` when one, or the target, is missing."""
        if target not in self.tensors[0]:
            has = ", ".join(name for name in TARGETS if name in self.tensors[0])
            raise UserError(f"--target {target}: the store {self.folder} has only {has}")
        missing = [step for step in wanted if step not in self.solver_indices]
        if missing:
            raise UserError(
                f"--steps {len(wanted)} needs the points after teacher steps {wanted}, but the store {self.folder} has "
                f"{self.solver_indices}: choose --steps and --grid to match, or dump again with them"
            )
        return [self.solver_indices.index(step) for step in wanted]

    def read(self, rows: np.ndarray, target: str, columns: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole student trajectories: rows (B,) -> (B, S+1, C, H, W) float32, noisiest first, and labels (B,) int64.

        Point 0 is the noise; the next ones are the stored ``columns`` of "x0" or "xt".
        """
        out = np.empty((len(rows), 1 + len(columns), *self.latent_shape), self.arrays[0]["noise"].dtype)
        y = np.empty(len(rows), np.int64)
        all_columns = columns == list(range(len(self.solver_indices)))
        for i, (shard, row) in enumerate(self.locate(rows)):
            arrays = self.arrays[shard]
            out[i, 0] = arrays["noise"][row]
            out[i, 1:] = arrays[target][row] if all_columns else arrays[target][row, columns]
            y[i] = arrays["label"][row]
        self.require_finite(rows, out)
        return torch.from_numpy(out).float(), torch.from_numpy(y)


class TrajectoryBatches(Dataset):
    """Item n is this rank's share of step n: "trajectory" (B, S+1, C, H, W), noisiest first, and "y" (B, ...)."""

    def __init__(
        self,
        store: TrajectoryStore,
        solver_indices: list[int],
        target: str,
        *,
        global_batch_size: int,
        seed: int,
        context: DistributedContext,
        conditions: Conditions | None = None,
    ):
        """``solver_indices`` and ``target`` as a student has them; ``conditions`` of a text model are captions."""
        self.store, self.target, self.global_batch_size, self.context = store, target, global_batch_size, context
        self.columns = store.point_columns(solver_indices, target)
        self.shuffle = Shuffle(len(store), seed)
        self.conditions = conditions or Classes(store.provenance["num_classes"], store.provenance.get("class_names"))

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        indices = self.context.step_indices(step, self.global_batch_size)
        rows = self.shuffle.rows(indices.start, indices.stop)
        trajectory, y = self.store.read(rows, self.target, self.columns)
        return {"trajectory": trajectory, "y": self.conditions(y)}


#################################################################################
#                                   Commands                                    #
#################################################################################


def verify(args: argparse.Namespace) -> None:
    """Check a whole store: sizes, checksums, counts, finiteness, labels; print a one-line summary."""
    store = TrajectoryStore(args.folder, "DIR")
    size, p = store.verify("DIR"), store.provenance
    print(
        f"{args.folder}: ok, {len(store)} trajectories of {store.latent_shape}, points after steps "
        f"{store.solver_indices} of {p['solver_steps']}, {p['num_classes']} classes, guidance {p['cfg_scale']}, "
        f"teacher {p['teacher_hash']}, {size / 1e6:.1f} MB"
    )


def export(args: argparse.Namespace) -> None:
    """Write the teacher's final samples to ADM's .npz: they cost nothing more than decoding."""
    store = TrajectoryStore(args.folder, "DIR")
    count = args.num_samples or len(store)
    if count > len(store):
        raise UserError(f"--num-samples {count}: the store {args.folder} has only {len(store)} trajectories")
    context = distributed.setup(args.device)
    vae = load_same_vae(store.provenance["vae"], store.provenance.get("vae_hash"), context.device, args.vae)
    target = "x0" if "x0" in store.tensors[0] else "xt"  # the last point is the sample in both
    last = [len(store.solver_indices) - 1]
    with SampleWriter(args.out, count, store.provenance, context) as writer:
        for indices in writer.missing_batches(args.per_proc_batch_size):
            points, y = store.read(np.array(indices), target, last)
            latents = points[:, 1]
            writer.write(indices, latents, vae.decode(latents.to(context.device)), y)
    distributed.finish(context)


def build_parser() -> cli.Parser:
    parser, commands = store_parser(__doc__, "trajectories", verify)
    command = commands.add_parser("export", help="Write the final samples to ADM's .npz.")
    command.add_argument("folder", metavar="DIR", help="Folder of the store.")
    command.add_argument("--out", type=cli.file, required=True, help="Write this .npz.")
    vae = "Load the teacher's autoencoder from this folder or hub id instead of by name."
    command.add_argument("--vae", type=cli.name, help=vae)
    command.add_argument("--num-samples", type=cli.positive, help="Samples to write, the first ones; without it, all.")
    command.add_argument("--per-proc-batch-size", type=cli.positive, default=64, help="Samples to decode in a batch.")
    distributed.add_device_option(command)
    command.set_defaults(run=export)
    return parser


run = cli.run_command

if __name__ == "__main__":
    cli.main(build_parser(), run)
