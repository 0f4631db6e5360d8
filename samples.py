"""The one owner of sample files: ADM's .npz, written in place by many ranks, resumable; PNG grids.

``arr_0`` (N, H, W, 3) uint8 images, ``arr_1`` (N,) int64 labels, ``provenance`` JSON text; on request ``latents``
(N, C, h, w) float32, the samples before decoding and rounding.
"""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

import cli
from cli import UserError
from data import to_uint8
from distributed import Ranks, add_device_option
from models import DiT
from overlap import write_behind
from provenance import require_same
from randomness import LABEL_POLICIES, labels, noise
from training import PRECISIONS, add_compile_option, autocast, compile_blocks
from vae import PRECISIONS as VAE_PRECISIONS
from vae import full_name, load_vae


def add_sampling_options(parser) -> None:
    """The options that the samplers of teacher and student share."""
    group = parser.add_argument_group("samples")
    group.add_argument("--out", help="the .npz; the default is named after the checkpoint and lies beside it")
    group.add_argument("--num-samples", type=cli.positive, default=50_000, help="how many, exactly")
    group.add_argument("--seed", type=cli.not_negative, default=0, help="sample i depends on (seed, i) alone")
    group.add_argument("--label-policy", choices=LABEL_POLICIES, default="balanced", help="how labels are chosen")
    group.add_argument("--class-labels", type=int, nargs="+", metavar="LABEL", help="these in turn instead")
    group.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which weights of the checkpoint")
    group.add_argument("--vae", help="decoder: ema, mse, folder or hub id; the default is the model's own")
    group.add_argument("--vae-precision", choices=VAE_PRECISIONS, default="fp32", help="of the decoder")
    group.add_argument("--save-latents", action="store_true", help="keep the samples before decoding, as float32")
    group = parser.add_argument_group("run")
    group.add_argument("--per-proc-batch-size", type=cli.positive, default=64, help="samples of a rank at once")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of matrix products")
    add_compile_option(group)
    group.add_argument("--dry-run", action="store_true", help="check everything, print the plan as JSON, do nothing")
    add_device_option(group)


def sample_to_file(
    args,
    ranks: Ranks,
    model: DiT,
    draw: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    config: dict,
    source: Path,
) -> None:
    """All of a sampler but its model: noise and labels by index, decoding, the file, its provenance.

    ``draw`` maps noise (B, C, H, W) and labels (B,) to latents of the same shape; ``config`` is the checkpoint's, from
    the file ``source``.
    """
    classes = args.class_labels
    if classes and not all(0 <= label < max(model.num_classes, 1) for label in classes):
        raise UserError(f"--class-labels {classes}: this model has labels 0..{model.num_classes - 1}")
    if args.vae and config["vae"] is None and args.vae != "none":
        raise UserError(f"--vae {args.vae}: this model works on pixels, leave the option out")
    if args.vae == "none" and config["vae"] is not None:
        raise UserError(f"--vae none: this model works on latents of {config['vae']}, leave the option out")
    provenance = config["provenance"] | {
        "sample_seed": args.seed,
        "sample_labels": classes or args.label_policy,
        "sample_precision": args.precision,
        "weights": args.weights,
        "decoder": full_name(args.vae or config["vae"]),
        "decoder_precision": args.vae_precision,
    }
    out = Path(args.out or f"{source.with_suffix('')}-{args.weights}-seed{args.seed}-{args.num_samples}.npz")
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: the file's name must end in .npz")
    if args.dry_run:
        cli.show_plan(provenance | {"out": str(out), "count": args.num_samples}, args)
        return
    vae = load_vae(args.vae or config["vae"], ranks.device, args.vae_precision)
    model.to(ranks.device)
    if args.compile:
        compile_blocks(model)

    @torch.no_grad()
    def draw_indices(indices):
        z = noise(args.seed, "sample", indices, model.latent_shape)
        if classes:
            y = torch.tensor([classes[i % len(classes)] for i in indices])
        else:
            y = labels(args.seed, indices, model.num_classes, args.label_policy)
        # Compiled code is made for one batch size, so a smaller batch is filled up with zeros.
        missing = args.per_proc_batch_size - len(y) if args.compile else 0
        inputs = torch.cat([z, z.new_zeros(missing, *z.shape[1:])]), torch.cat([y, y.new_zeros(missing)])
        with autocast(args.precision, ranks.device):
            latents = draw(*(x.to(ranks.device) for x in inputs))[: len(y)].float()
        return latents, vae.decode(latents), y

    written = write_samples(
        out, args.num_samples, draw_indices, provenance, ranks, args.per_proc_batch_size, args.save_latents
    )
    if ranks.main:
        print(f"{out}: {args.num_samples} samples" + ("" if written else ", already there"))


@torch.no_grad()
def preview_images(student, vae, indices: range, precision: str = "fp32") -> torch.Tensor:
    """A student's samples of the "preview" noises of these indices: (B, 1 or 3, H, W) uint8 on its device."""
    device = next(student.parameters()).device
    z = noise(0, "preview", indices, student.latent_shape).to(device)
    y = labels(0, indices, student.num_classes).to(device)
    with autocast(precision, device):
        latents = student.sample(z, y)[:, -1].float()
    return to_uint8(vae.decode(latents))


def to_rgb(images: torch.Tensor) -> np.ndarray:
    """images: (B, 1 or 3, H, W) uint8 -> (B, H, W, 3) uint8, grey repeated."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path: str | Path, images: torch.Tensor, columns: int | None = None) -> None:
    """Write images (B, 1 or 3, H, W) uint8 as one PNG; small ones are enlarged by whole factors."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(images.cpu().float(), nrow=columns or round(len(images) ** 0.5), padding=1, pad_value=128)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy().astype(np.uint8))
    factor = max(1, 48 // images.shape[-1])
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(path)


def read_provenance(path: str | Path) -> dict:
    """The provenance that a sample file carries, {} where it has none."""
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file["provenance"])) if "provenance" in file.files else {}


def write_samples(
    path: str | Path,
    count: int,
    draw: Callable[[range | list[int]], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    provenance: dict,
    ranks: Ranks,
    batch_size: int,
    keep_latents: bool = False,
) -> bool:
    """Fill ``path`` with exactly ``count`` samples, and a PNG grid of the first 100 beside it.

    ``draw`` maps sample indices to latents (B, C, h, w), images (B, 1 or 3, H, W) in [-1, 1], labels (B,). A file that
    is there already is left alone (returns False) if its provenance is the same, refused otherwise; a run that broke
    off is continued, by any number of ranks, without drawing a sample twice.
    """
    path = Path(path)
    wanted = provenance | {"count": count}
    if path.exists():
        require_same(f"--out {path}: the samples there are others", read_provenance(path), wanted)
        return False
    folder = path.with_suffix(".partial")
    arrays = _open_arrays(path, folder, count, draw, wanted, ranks, keep_latents)
    todo = np.flatnonzero(arrays["done"] == 0)[ranks.rank :: ranks.world]
    ranks.barrier()  # everybody has read "done" before anybody changes it
    batches = [todo[i : i + batch_size].tolist() for i in range(0, len(todo), batch_size)]
    with tqdm(total=len(todo), unit="sample", disable=None if ranks.main else True) as bar:

        def write(indices, drawn) -> None:
            _store(arrays, indices, *drawn)
            bar.update(len(indices))

        write_behind(batches, draw, write)
    ranks.barrier()
    if ranks.main:
        _pack(folder, path, wanted)
        first = torch.from_numpy(np.load(folder / "arr_0.npy", mmap_mode="r")[:100].copy())
        save_grid(path.with_suffix(".png"), first.permute(0, 3, 1, 2), columns=10)
        shutil.rmtree(folder)
    ranks.barrier()
    return True


def _open_arrays(path: Path, folder: Path, count: int, draw, wanted: dict, ranks: Ranks, keep_latents: bool) -> dict:
    """The growing arrays of an unfinished file, made by the main rank or found from a run that broke off."""
    note = folder / "provenance.json"
    if note.exists():
        require_same(
            f"--out {path}: {folder} holds the unfinished samples of another run", json.loads(note.read_text()), wanted
        )
    ranks.barrier()
    if ranks.main and not note.exists():
        latents, images, _ = draw([0])
        shapes = {"arr_0": (*images.shape[2:], 3), "arr_1": (), "done": ()}
        kinds = {"arr_0": np.uint8, "arr_1": np.int64, "done": np.uint8, "latents": np.float32}
        if keep_latents:
            shapes["latents"] = tuple(latents.shape[1:])
        folder.mkdir(parents=True, exist_ok=True)
        for name, shape in shapes.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kinds[name], (count, *shape))
        note.write_text(json.dumps(wanted))  # last: its presence says that the arrays are whole
    ranks.barrier()
    return {file.stem: np.load(file, mmap_mode="r+") for file in sorted(folder.glob("*.npy"))}


def _store(arrays: dict[str, np.memmap], indices: list[int], latents, images, y) -> None:
    """Write one batch and only then mark it as done."""
    arrays["arr_0"][indices] = to_rgb(to_uint8(images))
    arrays["arr_1"][indices] = y.cpu().numpy()
    if "latents" in arrays:
        arrays["latents"][indices] = latents.float().cpu().numpy()
    arrays["done"][indices] = 1


def _pack(folder: Path, path: Path, wanted: dict) -> None:
    """Stream the finished arrays into an uncompressed .npz."""
    if not np.load(folder / "done.npy").all():
        raise UserError(f"--out {path}: some samples are missing in {folder}; run the same command again")
    np.save(folder / "provenance.npy", np.array(json.dumps(wanted)))
    partial = path.with_suffix(".npz.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for file in sorted(folder.glob("*.npy")):
            if file.stem != "done":
                archive.write(file, file.name)
    partial.replace(path)
