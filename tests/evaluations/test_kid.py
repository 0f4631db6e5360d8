"""KID: torch-fidelity's figure from the same features, and the definition pair by pair."""

import json

import numpy as np
import pytest
import torch
from helpers import arrays, call
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from evaluations import features
from evaluations.evaluator import evaluate
from evaluations.kid import kid, squared_mmd


def two_sets(n: int, m: int, width: int = 16, apart: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return tuple(draw.standard_normal((count, width), np.float32) + i * apart for i, count in enumerate((n, m)))


def test_equals_torch_fidelity():
    samples, reference = two_sets(1300, 1100)
    theirs = kid_features_to_metric(
        torch.from_numpy(samples), torch.from_numpy(reference), kid_subsets=4, verbose=False
    )
    ours = kid(samples, reference, subsets=4)
    assert ours["mean"] == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-4)
    assert ours["std"] == pytest.approx(theirs[KEY_METRIC_KID_STD], rel=1e-3)
    assert (ours["subsets"], ours["subset_size"], ours["seed"]) == (4, 1000, 2020)


def test_the_estimate_is_the_mean_over_pairs_without_those_of_a_feature_with_itself():
    a, b = (torch.from_numpy(x).double() for x in two_sets(5, 5, 3))

    def k(x, y):
        return (sum(u * v for u, v in zip(x.tolist(), y.tolist())) / 3 + 1) ** 3

    within = [np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j]) for x in (a, b)]
    between = np.mean([k(x, y) for x in a for y in b])
    assert squared_mmd(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-12)


def test_equal_distributions_give_zero_on_average_however_few_there_are():
    draw = np.random.default_rng(1)
    found = [kid(*draw.standard_normal((2, 30, 8), np.float32), subsets=1)["mean"] for _ in range(200)]
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found)) < 4 * error and min(found) < 0 < max(found)
    biased = 2 * np.mean([1 + 3 / 8 + 3 * (1 / 8 + 2 / 64)]) / 30  # about what the diagonals would add
    assert biased > 8 * error


def test_the_evaluator_says_on_which_features(digit_files, tmp_path, capsys):
    call("evaluations.evaluator", *digit_files, "--features", "digits", "--device", "cpu", "--no-cache", "--kid",
         "--json", tmp_path / "out.json")  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())["kid"]
    network = features.extractor("digits").load()
    real, drawn = (network(arrays(path)["arr_0"])["pool"] for path in digit_files)
    wanted = kid(drawn, real)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert found["features"] == "digits" and found["subset_size"] == 400 and found["mean"] > 0
    assert f"KID (digits features, 100 subsets of 400): {found['mean']:.6g}, " in capsys.readouterr().out
    assert "kid" not in evaluate(*digit_files, cache=False)


def test_what_are_no_features_is_refused():
    good = np.ones((4, 3), np.float32)
    for bad in (good[0], good[:, :2], good[:1], good * np.nan):
        with pytest.raises(ValueError):
            kid(good, bad)
