"""Operations are counted on the models' own code, and are those that the paper publishes."""

import json

import pytest
import torch
from helpers import call, random_teacher

from costs.flops import count_flops, count_table, sampling_gflops
from models_ard import ARD


def test_a_multiply_accumulate_counts_as_two_operations():
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_history_costs_attention_only_and_guidance_doubles_a_step():
    teacher = random_teacher()
    one = sampling_gflops(teacher, 1)
    assert sampling_gflops(teacher, 25) == pytest.approx(25 * one)
    plain, history = (ARD.from_teacher(teacher, 4, "M4", layers) for layers in (0, 3))
    four = sampling_gflops(plain, 4)
    assert four == pytest.approx(4 * one / 2, rel=0.02)  # the embedding of the time is computed once for all
    tokens, width, blocks = 16, 32, 3
    more = blocks * 2 * tokens * tokens * width * (1 + 2 + 3)  # two products of each pair of tokens, earlier points
    assert sampling_gflops(history, 4) - four == pytest.approx(more / 1e9)


def test_the_table_has_a_row_for_each_of_the_papers(tmp_path, capsys):
    call("costs.flops", "--model", "DiT-Micro/2", "--json", tmp_path / "flops.json")
    assert len(capsys.readouterr().out.splitlines()) == 14
    rows = json.loads((tmp_path / "flops.json").read_text())
    assert len(rows) == 13 and all(row["gflops"] > 0 and row["paper_gflops"] is None for row in rows)


@pytest.mark.slow
def test_gflops_are_those_of_table_1():
    rows = count_table("DiT-XL/2")
    assert len(rows) == 13
    for row in rows:
        bound = 0.005 if row["mask"] is None else 0.002
        assert abs(row["gflops"] / row["paper_gflops"] - 1) < bound, row
