"""From images to their features: extracted by all ranks, kept beside the file they are of."""

import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from evaluations.features import Extractor
from runtime.cli import UserError
from runtime.distributed import DistributedContext
from runtime.files import read_ahead, require_replaceable
from runtime.precision import own_products
from stores.image_arrays import AnyImages, write_whole


def extract(images: AnyImages, network: Extractor, batch_size: int, context: DistributedContext) -> dict[str, Any]:
    """Features of all images on every rank: name -> (N, width) float32; each rank extracts its share.

    The next batch is read while the network works.
    """
    table = {name: np.zeros((images.count, width), dtype=np.float32) for name, width in network.widths.items()}
    rows = context.share(images.count)
    progress = tqdm(total=len(rows), desc=images.path.name, disable=None if context.is_main else True)
    with own_products("tf32" if network.tf32 else "fp32", context.device), progress:
        for start, batch in read_ahead(images.batches(rows, batch_size)):
            outputs = network(batch)
            for name, values in table.items():
                values[start : start + len(batch)] = outputs[name]
            progress.update(len(batch))
    if context.world_size > 1:  # everyone's rows are zero but its own, so the sum is the whole table, exactly
        for name, values in table.items():
            table[name] = context.all_reduce(torch.from_numpy(values).to(context.device)).cpu().numpy()
    return table


def features(
    images: AnyImages, digest: str, network: Extractor, batch_size: int, context: DistributedContext, cache: bool
) -> dict:
    """The same from the file kept beside the images if it fits them and the network, else extracted and kept.

    Complete on the main rank. The other ranks' may be empty.
    """
    path = images.features_path(network.name) if cache else None
    key = json.dumps(dict(images=digest, weights=network.weights_sha256) | (dict(tf32=True) if network.tf32 else {}))
    kept = read_cache(path, key, network.widths) if path and context.is_main else None
    if context.broadcast_object(kept is not None):
        return kept or {}
    table = extract(images, network, batch_size, context)
    if path and context.is_main:
        try:
            require_replaceable("features", path, "a file of features", lambda path: not is_other_npz(path))
            write_whole("features", path, lambda file: np.savez(file, key=np.array(key), **table))
        except (UserError, OSError) as error:  # a read-only folder or a full disk costs time, not the result
            print(f"warning: the features are not kept ({error})", file=sys.stderr)
    return table


def read_cache(path: Path, key: str, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """The features of these names in the file, or None unless it is readable and was written under this key."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names} if file["key"] == key else None
    except Exception:  # absent, truncated, not ours: it will be written anew
        return None


def is_other_npz(path: Path) -> bool:
    """Whether a file is an .npz, but none of features; a damaged one may have been."""
    return zipfile.is_zipfile(path) and "key.npy" not in zipfile.ZipFile(path).namelist()
