"""The metrics follow their definitions: ADM's own figures, independent computations, and what holds for any data.

Against ADM's golden file; the Frechet distance against scipy and by its laws; the inception score of known
distributions; precision and recall against their definition; what each of them refuses.
"""

import numpy as np
import pytest
from helpers import GOLDEN, arrays
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from evaluations.metrics import frechet_distance, inception_score, precision_recall, statistics

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def golden():
    return arrays(GOLDEN / "adm_metrics.npz")


def fid(a, b):
    return frechet_distance(*statistics(a), *statistics(b))


def two_sets(seed, count=60, width=5):
    """Two overlapping correlated clouds, (count, width) and (count + 7, width)."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(2, width, width))
    a, b = (
        rng.normal(size=(count, width)) @ mix[0],
        rng.normal(size=(count + 7, width)) @ mix[1] + rng.normal(size=width),
    )
    return a.astype(np.float32), b.astype(np.float32)


def test_metrics_equal_adms_on_its_golden_file(golden):
    assert fid(golden["ref"], golden["sample"]) == pytest.approx(float(golden["fid"]), rel=1e-4)
    assert fid(golden["ref_spatial"], golden["sample_spatial"]) == pytest.approx(float(golden["sfid"]), rel=1e-4)
    assert inception_score(golden["sample_probs"]) == pytest.approx(float(golden["inception_score"]), rel=1e-4)
    precision, recall = precision_recall(golden["ref"], golden["sample"])
    assert precision == pytest.approx(float(golden["precision"]), abs=0.005)
    assert recall == pytest.approx(float(golden["recall"]), abs=0.005)


def test_statistics_are_mean_and_covariance():
    features, _ = two_sets(0)
    mu, sigma = statistics(features)
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features, rowvar=False), atol=1e-12)
    assert mu.dtype == sigma.dtype == np.float64
    with pytest.raises(ValueError, match="at least 2"):
        statistics(features[:1])


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_frechet_distance_equals_the_general_matrix_root(seed):
    (mu1, sigma1), (mu2, sigma2) = map(statistics, two_sets(seed))
    root = sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_frechet_distance_of_one_dimension_is_that_of_means_and_deviations():
    one = np.ones(1)
    assert frechet_distance(one, 4 * np.eye(1), 3 * one, 9 * np.eye(1)) == pytest.approx(2**2 + (2 - 3) ** 2)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_frechet_distance_is_symmetric_not_negative_and_blind_to_rotation(seed):
    a, b = two_sets(seed)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(a.shape[1], a.shape[1])))
    distance = fid(a, b)
    assert distance >= 0
    assert fid(b, a) == pytest.approx(distance, rel=1e-6, abs=1e-6)
    turned = fid(a.astype(np.float64) @ rotation, b.astype(np.float64) @ rotation)
    assert turned == pytest.approx(distance, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("count", [20, 300])  # with 20 images of 64 features the covariances are singular
def test_identical_features_have_no_distance_and_cover_each_other(count):
    features = np.random.default_rng(0).normal(size=(count, 64)).astype(np.float32) + 5
    assert fid(features, features) < 1e-3
    assert precision_recall(features, features) == (1, 1)


def test_frechet_distance_refuses_what_is_no_gaussian():
    mu, sigma = np.zeros(3), np.eye(3)
    nan = np.where(np.eye(3) > 0, np.nan, 0)
    lopsided = sigma + np.triu(np.ones((3, 3)), 1)
    for bad, match in (
        ((mu, nan), "not finite"),
        ((np.array([0, np.inf, 0]), sigma), "not finite"),
        ((mu, np.diag([1.0, 1.0, -0.1])), "negative eigenvalues"),
        ((mu, lopsided), "not symmetric"),
        ((mu, np.eye(4)), r"\(D, D\)"),
        ((np.zeros(4), np.eye(4)), "dimensions"),
    ):
        with pytest.raises(ValueError, match=match):
            frechet_distance(mu, sigma, *bad)
        with pytest.raises(ValueError, match=match):
            frechet_distance(*bad, mu, sigma)


def test_inception_score_of_known_distributions():
    assert inception_score(np.eye(10)) == pytest.approx(10)  # sure of each image, all classes alike; holds zeros
    assert inception_score(np.full((7, 10), 0.1)) == pytest.approx(1)
    halves = np.repeat(np.eye(2), 3, axis=0)  # three images of each class: a split of three knows one class only
    assert inception_score(halves, split_size=3) == pytest.approx(1)
    assert inception_score(halves, split_size=4) == pytest.approx(
        (np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)) + 1) / 2
    )
    for bad in (np.eye(10) * 2, np.full((2, 2), np.nan), np.ones(3)):
        with pytest.raises(ValueError, match="probabilities"):
            inception_score(bad)


def by_definition(reference, samples, k):
    """Precision and recall from all distances in float64."""

    def covered(points, centres):
        radii = np.sort(cdist(centres, centres), axis=1)[:, k]  # column 0 is the point itself
        return (cdist(points, centres) <= radii).any(axis=1).mean()

    reference, samples = reference.astype(np.float64), samples.astype(np.float64)
    return covered(samples, reference), covered(reference, samples)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, k=st.integers(1, 5), block=st.integers(5, 80))
def test_precision_recall_follows_its_definition_whatever_the_order_and_block_size(seed, k, block):
    # Whole numbers: distances tie often, and those that do not tie differ by far more than rounding.
    reference, samples = (np.rint(8 * features) for features in two_sets(seed))
    expected = precision_recall(reference, samples, k)
    assert expected == pytest.approx(by_definition(reference, samples, k), abs=1e-9)
    rng = np.random.default_rng(seed)
    assert precision_recall(rng.permutation(reference), rng.permutation(samples), k, block=block) == expected


def test_copies_lie_inside_manifolds_of_radius_zero():
    """Whole clusters of equal points far from the origin: radii are zero, and rounding must not push copies out."""
    rng = np.random.default_rng(0)
    reference = np.repeat(rng.normal(size=(10, 2048)) * 3 + 100, 5, axis=0).astype(np.float32)
    samples = rng.permutation(reference)[:23]
    assert precision_recall(reference, samples, block=7)[0] == 1
    away = samples + np.float32(0.01)
    assert precision_recall(reference, away)[0] == 0


def test_precision_recall_refuses_what_has_no_answer():
    a = np.zeros((10, 2), dtype=np.float32)
    for bad, match in ((a[:3], "more than 3"), (a[:, :1], "features"), (a + np.nan, "not finite")):
        with pytest.raises(ValueError, match=match):
            precision_recall(a, bad)
