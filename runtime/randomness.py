"""Noise, labels and orders that depend on (seed, index) alone: never on batch size, ranks, device or earlier draws.

Philox is a counter-based generator: the key names the stream, the counter the index, so that any item can be drawn
without drawing those before it. Each use has a stream of its own, so that a student is never tested on the noise it
was trained on, whatever the seeds.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

STREAMS = {
    "sample": 0, "trajectory": 1, "training": 2, "label": 3, "order": 4, "augmentation": 5, "preview": 6,
    "posterior": 7, "real": 8, "discriminator": 9, "scene": 10,
}  # fmt: skip
LABEL_POLICIES = ("balanced", "random")


def generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """The random generator of item ``index`` of a stream; two items never share numbers."""
    return np.random.Generator(np.random.Philox(key=[seed, STREAMS[stream]], counter=[0, 0, 0, index]))


def noise(seed: int, stream: str, indices: Iterable[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise of the items ``indices``: (B, *shape) float32 on the CPU."""
    rows = [generator(seed, stream, int(i)).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)


def labels(seed: int, indices: Sequence[int], num_classes: int, policy: str = "balanced") -> torch.Tensor:
    """Class labels of the items ``indices``: (B,) int64. Without classes (0) the label is 0, the null label.

    "balanced": any ``num_classes`` consecutive items hold every class once (index modulo classes).
    "random": drawn uniformly and independently.
    """
    if policy not in LABEL_POLICIES:
        raise ValueError(f"label policy {policy!r} is not one of {LABEL_POLICIES}")
    if num_classes == 0:
        return torch.zeros(len(indices), dtype=torch.int64)
    if policy == "balanced":
        return torch.as_tensor([int(i) % num_classes for i in indices], dtype=torch.int64)
    drawn = [generator(seed, "label", int(i)).integers(num_classes) for i in indices]
    return torch.as_tensor(drawn, dtype=torch.int64)


class Conditions(Protocol):
    """The meaning of labels: a model is given ``conditions(labels)``. Label ``count`` is null, others are smaller."""

    count: int
    about: dict  # their entry in the provenance of artefacts made with them
    max_text_tokens: int  # tokens of y, 0 for classes

    def __call__(self, label: torch.Tensor) -> torch.Tensor:
        """label: (B,) int64 -> the model's y, (B, ...)."""

    def text(self, label: int) -> str:
        """What a label stands for, in words; "" where it has none."""


class Classes:
    """Classes stand for themselves. (The other conditions are captions, stores/captions.py.)"""

    def __init__(self, count: int, names: Sequence[str] | None = None):
        self.count, self.names = count, names or [""] * count
        self.about, self.max_text_tokens = dict[str, Any](), 0

    def __call__(self, label: torch.Tensor) -> torch.Tensor:
        """(B,) int64 -> the same."""
        return label

    def text(self, label: int) -> str:
        """The class's name, "" where it has none."""
        return self.names[label]


class Shuffle:
    """An endless shuffled order of ``count`` rows in which every epoch holds every row exactly once.

    A function of (seed, position) alone: resuming needs the position only, and any number of ranks can share one order.
    One permutation (8 bytes a row) is in memory at a time. Two data sets of one run take different streams.
    """

    def __init__(self, count: int, seed: int, stream: str = "order"):
        self.count, self.seed, self.stream = count, seed, stream
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Row numbers at positions ``start .. stop - 1`` of the order: (stop - start,) int64."""
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            epoch, offset = divmod(start, self.count)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, generator(self.seed, self.stream, epoch).permutation(self.count)
            parts.append(self._order[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)
