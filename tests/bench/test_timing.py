"""Timing: pieces of work in turns, operations by kind. Nothing here depends on how fast a machine is."""

import pytest
import torch

from bench.timing import KINDS, kind_of, peak_flops, profile, seconds, time_in_turns

CPU = torch.device("cpu")


def test_works_take_turns_and_the_first_turns_do_not_count(monkeypatch):
    done, clock = [], [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def work(name: str, seconds_of_a_turn: float) -> None:
        done.append(name)
        clock[0] += seconds_of_a_turn * len(done)

    times = time_in_turns([lambda: work("a", 1), lambda: work("b", 10)], repeats=3, device=CPU, warmup=2)
    assert done == ["a", "b"] * 5 and times.shape == (3, 2, 2)
    assert times[..., 0].tolist() == times[..., 1].tolist() == [[5, 60], [7, 80], [9, 100]]


def test_work_on_a_cpu_is_done_when_its_call_returns():
    done, returned = seconds(lambda: torch.ones(3).sum(), CPU)
    assert done >= returned > 0


def test_the_peak_is_measured_once_for_each_format():
    peak_flops.cache_clear()
    assert peak_flops("fp32", CPU) is peak_flops("fp32", CPU)
    assert peak_flops("fp32", CPU)["best"] >= peak_flops("fp32", CPU)["mean"] > 0


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::addmm", "products"),
        ("sm90_xmma_gemm_bf16bf16", "products"),
        ("aten::native_layer_norm", "reductions"),
        ("Memcpy DtoD", "copies"),
        ("aten::mul", "pointwise"),
        ("aten::_fused_adamw_", "optimiser"),
        ("aten::view", "other"),
    ],
)
def test_operations_are_told_apart_by_their_names(name, kind):
    assert kind_of(name) == kind


def test_a_profile_splits_a_call_by_kinds():
    a = torch.randn(200, 200)
    found = profile(lambda: (a @ a).relu(), CPU)
    assert found["ms"].keys() == {*KINDS, "other"} and found["ms"]["products"] > 0 and found["launches"] >= 2
    assert found["attention"] == ""
    q = torch.randn(1, 2, 16, 8)
    assert "attention" in profile(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), CPU)["attention"]
