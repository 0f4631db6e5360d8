"""Features in, figures out: Frechet distance, Inception Score, precision and recall, as ADM's evaluator defines them.

Numpy arrays in, floats out. N and M count images, D is the width of the features, K the number of classes.
"""

import numpy as np
import torch
from scipy.linalg import lapack
from tqdm import tqdm

from runtime.precision import own_products

# How far, relative to the largest variance, a covariance may be from symmetric and positive semi-definite: room for one
# that somebody computed or stored in float32.
TOLERANCE = 1e-5

# Distances come from |a|^2 + |b|^2 - 2ab in float32, which is this exact relative to |a|^2 + |b|^2. A distance that
# exceeds a radius by less counts as equal to it, so that a point lies in the ball of its own copy of radius zero.
ROUNDING = 8 * torch.finfo(torch.float32).eps


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (unbiased) covariance of features.

    features: (N, D), N of at least 2. Returns mu (D,) and sigma (D, D), float64. Raises ``ValueError`` on other shapes.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"statistics need features (N, D) of at least 2 images, got shape {features.shape}")
    centred = features.astype(np.float64)
    mu = centred.mean(axis=0)
    centred -= mu
    return mu, centred.T @ centred / (len(features) - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians, |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    mu: (D,), sigma: (D, D). Heusel et al. 2017 (FID), in float64. With sigma1 = A A^T, the product sigma1 sigma2 has
    the eigenvalues of the symmetric matrix A^T sigma2 A, so the trace of its root is a sum of real square roots: no
    complex numbers, and covariances that are singular (fewer images than D) need no special case. Raises
    ``ValueError`` if shapes differ, a value is not finite, or a sigma is not symmetric and positive semi-definite up to
    rounding.
    """
    (mu1, sigma1), (mu2, sigma2) = _gaussian("1", mu1, sigma1), _gaussian("2", mu2, sigma2)
    if mu1.shape != mu2.shape:
        raise ValueError(f"mu1 has {len(mu1)} dimensions and mu2 {len(mu2)}")
    root = _square_root(sigma1)
    trace = np.sqrt(np.linalg.eigvalsh(root.T @ sigma2 @ root).clip(min=0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)  # a distance: below zero by rounding only


def _square_root(sigma: np.ndarray) -> np.ndarray:
    """A (D, rank) with A A^T = sigma: a Cholesky factor with pivoting, which ends where only rounding is left."""
    factor, pivots, rank, _ = lapack.dpstrf(sigma, lower=1)
    root = np.empty((len(sigma), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    return root


def _gaussian(which: str, mu: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mu (D,) and sigma (D, D), checked, in float64."""
    mu, sigma = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mu{which} {mu.shape} and sigma{which} {sigma.shape} are not (D,) and (D, D)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"mu{which} or sigma{which} holds a value that is not finite")
    scale = max(np.abs(np.diagonal(sigma)).max(), np.finfo(np.float64).tiny)
    if np.abs(sigma - sigma.T).max() > TOLERANCE * scale:
        raise ValueError(f"sigma{which} is not symmetric, so it is no covariance")
    try:  # A Cholesky factor exists if and only if no eigenvalue is below -shift: far cheaper than the eigenvalues.
        np.linalg.cholesky(sigma + TOLERANCE * scale * np.eye(len(mu)))
    except np.linalg.LinAlgError:
        raise ValueError(f"sigma{which} has clearly negative eigenvalues, so it is no covariance") from None
    return mu, sigma


def inception_score(probs: np.ndarray, split_size: int = 5000) -> float:
    """Mean over splits of exp(mean over images of KL(p(y|x) || p(y))). Salimans et al. 2016; splits as in ADM.

    probs: (N, K), every row a distribution. Consecutive splits of ``split_size`` rows, the last one may be shorter.
    Raises ``ValueError`` on anything that is not a table of probabilities.
    """
    if probs.ndim != 2 or not len(probs):
        raise ValueError(f"inception_score needs probabilities (N, K), got shape {probs.shape}")
    if not (np.isfinite(probs).all() and probs.min() >= 0 and np.allclose(probs.sum(axis=1), 1, atol=1e-3)):
        raise ValueError("inception_score needs rows of probabilities: finite, not negative, summing to 1")
    scores = []
    for start in range(0, len(probs), split_size):
        part = probs[start : start + split_size].astype(np.float64)
        marginal = part.mean(axis=0)
        # Where p = 0 the term p log(p / q) is 0; there the ratio is set to 1 to keep the logarithm finite.
        ratio = np.divide(part, marginal, out=np.ones_like(part), where=part > 0)
        scores.append(np.exp((part * np.log(ratio)).sum(axis=1).mean()))
    return float(np.mean(scores))


@torch.no_grad()
def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, device: str | torch.device = "cpu", block: int = 2048
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eqs. 1-2) with k nearest neighbours; ADM uses k=3.

    reference: (N, D), samples: (M, D), both of more than k rows. The manifold of a set is the union of balls around its
    points, each reaching to the point's k-th nearest other point. Precision is the share of samples inside the
    reference's manifold, recall the share of reference points inside the samples'. Exact in float32, computed in blocks
    of ``block`` x ``block`` distances. Raises ``ValueError`` on too few rows, other shapes or non-finite values.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), got {reference.shape} and {samples.shape}")
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"k={k} needs more than {k} images in each set, got {len(reference)} and {len(samples)}")
    # The mean of the reference goes to the origin: distances stay, the norms that cancel in them become small.
    centre = reference.mean(axis=0, dtype=np.float64)
    ref, sam = (torch.from_numpy((f - centre).astype(np.float32)).to(device) for f in (reference, samples))
    if not (ref.isfinite().all() and sam.isfinite().all()):
        raise ValueError("features hold a value that is not finite")
    with own_products("fp32", ref.device):
        return _precision_recall(ref, sam, k, block)


def _precision_recall(ref: torch.Tensor, sam: torch.Tensor, k: int, block: int) -> tuple[float, float]:
    ref_radius, sam_radius = _squared_radii(ref, k, block), _squared_radii(sam, k, block)
    sam_inside = torch.zeros(len(sam), dtype=torch.bool, device=sam.device)
    ref_inside = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
    for i in tqdm(range(0, len(ref), block), desc="precision, recall", disable=None, leave=False):
        rows = slice(i, i + block)
        for j in range(0, len(sam), block):
            cols = slice(j, j + block)
            distance = _squared_distances(ref[rows], sam[cols], rounding=ROUNDING)
            sam_inside[cols] |= (distance <= ref_radius[rows, None]).any(dim=0)
            ref_inside[rows] |= (distance <= sam_radius[None, cols]).any(dim=1)
    return sam_inside.double().mean().item(), ref_inside.double().mean().item()


def _squared_distances(a: torch.Tensor, b: torch.Tensor, rounding: float = 0.0) -> torch.Tensor:
    """Squared distances of all pairs less ``rounding`` * (|a|^2 + |b|^2): (N, D), (M, D) -> (N, M), perhaps below 0."""
    norm_a, norm_b = (x.square().sum(dim=1) * (1 - rounding) for x in (a, b))
    return torch.addmm(norm_b, a, b.T, alpha=-2).add_(norm_a[:, None])


def _squared_radii(points: torch.Tensor, k: int, block: int) -> torch.Tensor:
    """Squared distance of each point to its k-th nearest other point: (N, D) -> (N,)."""
    nearest = torch.full((len(points), k), torch.inf, device=points.device)  # (N, k), ascending
    for i in tqdm(range(0, len(points), block), desc="neighbours", disable=None, leave=False):
        rows = slice(i, i + block)
        for j in range(i, len(points), block):  # the matrix is symmetric: its upper half serves both sides
            cols = slice(j, j + block)
            distance = _squared_distances(points[rows], points[cols])
            if i == j:
                distance.fill_diagonal_(torch.inf)  # a point is not its own neighbour
            else:
                nearest[cols] = _smallest(k, nearest[cols], distance.T)
            nearest[rows] = _smallest(k, nearest[rows], distance)
    return nearest[:, -1].clamp(min=0)


def _smallest(k: int, *tables: torch.Tensor) -> torch.Tensor:
    """The k smallest entries of each row, ascending: tables (N, any) -> (N, k)."""
    return torch.cat(tables, dim=1).topk(k, dim=1, largest=False).values
