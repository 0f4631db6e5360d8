"""Where artefacts come from: the hash of a model's weights, and the refusal of those that do not match."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from runtime.cli import UserError

# Keys of provenance that artefacts of earlier versions have under another name.
RENAMED_KEYS = {"points": "solver_indices", "classes": "class_names"}
# Keys that they lack: beside which one each stands, and its meaning where it lacks.
ADDED_KEYS: list[tuple[str, str, Callable[[dict], Any]]] = [
    ("gan_weight", "d_clip", lambda training: training.get("clip")),  # the heads were clipped as the student
    ("ema_decay", "ema_warmup", lambda training: False),
]
# Keys that do not decide which images they are, where the hash of their listing is known.
IGNORED_IF_LISTING_MATCHES = {"data", "class_names"}


def with_current_keys(config: dict) -> dict:
    """A config or a provenance as this version would write it, read from an artefact of any version."""
    current = {
        RENAMED_KEYS.get(key, key): with_current_keys(value) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    for beside, key, meant in ADDED_KEYS:
        if beside in current and key not in current:
            current[key] = meant(current)
    return current


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    """16 hex digits that name these weights: a hash of names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        digest.update(state[name].detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def differences(found: dict, wanted: dict, prefix: str = "") -> str:
    """The values in which two nested dicts differ, as text; empty where they are equal.

    Autoencoders are told apart by "vae_hash" where both sides have one, else by "vae", their name or path. Images are
    the same where their listings are, wherever they lie; what an earlier version wrote of a folder has no such hash,
    and goes by its path and the number of images.
    """
    parts, keys = [], found.keys() | wanted.keys()
    hashes = found.get("vae_hash"), wanted.get("vae_hash")
    if wanted.get("listing"):
        keys = keys - IGNORED_IF_LISTING_MATCHES if found.get("listing") else found.keys() - {"listing", "class_names"}
    for key in sorted(keys - {"vae_hash"}):
        a, b = found.get(key), wanted.get(key)
        if key == "vae" and all(hashes):
            if hashes[0] != hashes[1]:
                parts.append(f"{prefix}vae is {a!r} ({hashes[0]}) there and {b!r} ({hashes[1]}) here")
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            parts += [text for text in [differences(a, b, f"{prefix}{key}.")] if text]
        elif a != b:
            parts.append(f"{prefix}{key} is {a!r} there and {b!r} here")
    return ", ".join(parts)


def require_same(what: str, found: dict, wanted: dict) -> None:
    """Raise a ``UserError`` that lists the values of ``wanted`` that ``found`` has otherwise, or not at all."""
    text = differences({key: found.get(key) for key in wanted}, wanted)
    if text:
        raise UserError(f"{what}: {text}")
