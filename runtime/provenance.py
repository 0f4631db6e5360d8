"""Where artefacts come from: the hash of a model's weights, and the refusal of those that do not match."""

import hashlib

import torch

from runtime.cli import UserError

# Keys that do not decide which images they are, where the hash of their listing is known.
IGNORED_IF_LISTING_MATCHES = {"data", "class_names"}


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
    the same where their listings are, wherever they lie.
    """
    parts, keys = [], found.keys() | wanted.keys()
    hashes = found.get("vae_hash"), wanted.get("vae_hash")
    if found.get("listing") and wanted.get("listing"):
        keys = keys - IGNORED_IF_LISTING_MATCHES
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
