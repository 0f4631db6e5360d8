"""KID, the kernel distance of two sets of features (Binkowski et al. 2018), without FID's bias in their number.

The squared maximum mean discrepancy under the kernel (x . y / D + 1)^3, estimated without bias, so that it may come out
a little below zero. As is usual, it is the mean over 100 pairs of random subsets of 1000 features, fewer where a set is
smaller. The subsets are those that torch-fidelity draws, which gives the same figure from the same features.
"""

import numpy as np
import torch
from tqdm import trange

SUBSETS, SIZE, SEED = 100, 1000, 2020  # torch-fidelity's


def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The kernel of all pairs: (N, D), (M, D) -> (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def squared_mmd(a: torch.Tensor, b: torch.Tensor) -> float:
    """The unbiased estimate, (n, D), (n, D): no feature is compared with itself."""
    n, within = len(a), 0.0
    for x in (a, b):
        table = kernel(x, x)
        within += (table.sum() - table.trace()).item() / (n * (n - 1))
    return within - 2 * kernel(a, b).mean().item()


def kid(
    samples: np.ndarray, reference: np.ndarray, device: str | torch.device = "cpu", subsets: int = SUBSETS
) -> dict[str, float]:
    """KID of features (N, D) against (M, D): "mean" and "std" over subsets, their count and size. In float64.

    Raises ``ValueError`` on other shapes, fewer than two rows, or values that are not finite.
    """
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), got {samples.shape} and {reference.shape}")
    sets, size = (samples, reference), min(SIZE, len(samples), len(reference))
    if size < 2:
        raise ValueError(f"KID needs two images of each, got {len(samples)} and {len(reference)}")
    if not all(np.isfinite(features).all() for features in sets):
        raise ValueError("features hold a value that is not finite")
    draw, values = np.random.RandomState(SEED), []
    for _ in trange(subsets, desc="KID", disable=None, leave=False):
        rows = [features[draw.choice(len(features), size, replace=False)] for features in sets]
        values.append(squared_mmd(*(torch.from_numpy(part).to(device).double() for part in rows)))
    about = {"subsets": subsets, "subset_size": size, "seed": SEED}
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), **about}
