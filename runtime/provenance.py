"""Where artefacts come from: the hash of a model's weights, and the refusal of those that do not match."""

import hashlib

import torch

from runtime.cli import UserError

MOST_SHOWN = 3  # values that a sentence lists
# Keys that do not decide which images they are, where the hash of their listing is known.
IGNORED_IF_LISTING_MATCHES = {"data", "class_names"}


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    """16 hex digits that name these weights: a hash of names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        digest.update(state[name].detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def differences(found: dict, wanted: dict) -> str:
    """Some values in which two nested dicts differ, and how many more do, as text; empty where they are equal.

    Values that both have come first.
    """
    parts = [text for _, text in sorted(_differing(found, wanted), key=lambda part: part[0])]
    rest = f", and {len(parts) - MOST_SHOWN} more differ" if len(parts) > MOST_SHOWN else ""
    return ", ".join(parts[:MOST_SHOWN]) + rest


def _differing(found: dict, wanted: dict, prefix: str = "") -> list[tuple[bool, str]]:
    """Of each value in which they differ, whether one of them lacks it, and a text.

    Autoencoders are told apart by "vae_hash" where both sides have one, else by "vae", their name or path. Images are
    the same where their listings are, wherever they lie.
    """
    parts: list[tuple[bool, str]] = []
    keys = found.keys() | wanted.keys()
    hashes = found.get("vae_hash"), wanted.get("vae_hash")
    if found.get("listing") and wanted.get("listing"):
        keys = keys - IGNORED_IF_LISTING_MATCHES
    for key in sorted(keys - {"vae_hash"}):
        a, b = found.get(key), wanted.get(key)
        if key == "vae" and all(hashes):
            if hashes[0] != hashes[1]:
                parts.append((False, f"{prefix}vae is {a!r} ({hashes[0]}) there and {b!r} ({hashes[1]}) here"))
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            parts += _differing(a, b, f"{prefix}{key}.")
        elif a != b:
            there, here = (text if len(text) <= 200 else f"{text[:200]} ..." for text in (repr(a), repr(b)))
            parts.append((a is None or b is None, f"{prefix}{key} is {there} there and {here} here"))
    return parts


def require_same(what: str, found: dict, wanted: dict) -> None:
    """Raise a ``UserError`` that lists some values of ``wanted`` that ``found`` has otherwise, or not at all."""
    text = differences({key: found.get(key) for key in wanted}, wanted)
    if text:
        raise UserError(f"{what}: {text}")
