"""The benchmark: every stage is measured, every case of a GPU runs, FLOPs are those of the work."""

import json
import shlex

import pytest
import torch
from helpers import call, refused

from bench import benchmark, cases

NANO = ("--model", "DiT-Nano/2", "--input-size", 4, "--batch-size", 3, "--repeats", 2)
BENCHMARKS = {
    "train": (*NANO, "--stack", 2, "--accumulation", 2, "--checkpoint-activations"),
    "sample": (*NANO, "--stack", 2, "--vs", "--stack 0 --steps 2"),
    "trajectories": NANO,
    "store": ("--rows", 40, "--batch-size", 7, "--repeats", 2),
}


def reports(out: str) -> list[dict]:
    """The lines of JSON in what a benchmark has printed."""
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("command", BENCHMARKS)
def test_each_stage_is_measured(command, capsys):
    call("bench", command, *BENCHMARKS[command], "--device", "cpu")
    lines = reports(capsys.readouterr().out)
    assert len(lines) == (2 if "--vs" in BENCHMARKS[command] else 1)
    for line in lines:
        assert 0 < line["fastest"] <= line["seconds"] <= line["slowest"] and 0 < line["cpu_seconds"] <= line["seconds"]
        assert line["peak_memory_gb"] > 0 and ("mfu" in line) == (command != "store")
    if command == "sample":
        plain, variant = lines
        assert (plain["stack"], plain["steps"], variant["stack"], variant["steps"]) == (2, 4, 0, 2)
        assert plain["tflops"] > 2 * variant["tflops"] and variant["ratio"] > 0
    if command == "store":
        assert lines[0]["over_files"] > 0 and lines[0]["over_copy"] > 0


@torch.no_grad()
@pytest.mark.parametrize(("mask", "stack"), [("M4", 2), ("M3", 1), ("M1", 2), ("M4", 0)])
def test_the_dense_student_gives_the_same(mask, stack):
    options = {"model": "DiT-Nano/2", "input_size": 4, "steps": 4, "mask": mask, "stack": stack}
    plain, dense = (cases.build_model(options | {"dense": d}, torch.device("cpu")) for d in (False, True))
    dense.load_state_dict(plain.state_dict())
    history, y = torch.randn(3, 4, *plain.latent_shape), torch.arange(3)
    torch.testing.assert_close(dense(history, y), plain(history, y), rtol=0, atol=1e-5)
    torch.testing.assert_close(dense.sample(history[:, 0], y), plain.sample(history[:, 0], y), rtol=0, atol=1e-5)


def test_the_dense_student_is_timed_beside_ours(capsys):
    call("bench", "train", *NANO, "--stack", 2, "--vs=--dense", "--device", "cpu")
    assert [line["dense"] for line in reports(capsys.readouterr().out)] == [False, True]


STUDENT = "--model DiT-Nano/2 --input-size 4 --batch-size 3 --stack 2 --repeats 1"
TINY = {
    "train": STUDENT,
    "gan": STUDENT,
    "sample": STUDENT,
    "ddp": STUDENT + " --no-compile",  # in a process of its own, with the real compiler, it takes a minute
    "trajectories": "--model DiT-Nano/2 --input-size 4 --batch-size 3 --repeats 1",
    "decode": "--width 4 --input-size 4 --batch-size 3 --repeats 1",
    "features": "--image-size 8 --batch-size 3 --repeats 1 --no-profile",
    "store": "--rows 20 --batch-size 4 --repeats 1",
    "metrics": "--samples 20 --reference 30 --repeats 1",
}
CHANGES = {"--stack 0": {"stack": 0}, "--no-compile": {"compile": False}, "--cuda-graph": {"cuda_graph": True}}
CHANGES |= {"--tf32": {"tf32": True}}


SLOW = ("gan", "features", "ddp", "train", "trajectories", "decode")


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # of diffusers' code
@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=[pytest.mark.slow] if line.startswith(SLOW) else [])
        for line in benchmark.GPU_CASES.strip().splitlines()
    ],
)
def test_every_gpu_case_runs_with_a_tiny_model(line, quick_compiler, monkeypatch, capfd):
    command, *options = shlex.split(line)
    monkeypatch.setattr(benchmark, "GPU_CASES", f"{line} {TINY[command]}\n")  # of two values the later one counts
    call("bench", "gpu", "--device", "cpu")
    out = capfd.readouterr().out
    found = reports(out)
    variants = [option.removeprefix("--vs=") for option in options if option.startswith("--vs=")]
    names = {"metrics": ["frechet", "precision_recall"], "ddp": ["train"]}
    names = names.get(command, [command, *(f"{command} {variant}" for variant in variants)])
    assert [case["case"] for case in found] == names, out
    for variant in variants:
        assert CHANGES[variant].items() <= found[1].items() and not CHANGES[variant].items() <= found[0].items()
    if "--compile" in options and command != "ddp":
        assert found[0]["compile"] and quick_compiler()
    if "precision" in found[0]:
        assert {case["precision"] for case in found} == {"bf16"} and found[0]["mfu"] > 0
    assert found[0].get("checkpoint_activations", False) == ("--checkpoint-activations" in options)
    assert all(case["batch_size"] == 3 for case in found if command in benchmark.CASES or command == "ddp")


def test_a_case_that_fails_costs_none_of_the_others(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "GPU_CASES", f"sample {TINY['sample']} --stack 7\nstore {TINY['store']}\n")
    call("bench", "gpu", "--device", "cpu")
    out = capsys.readouterr().out
    assert "history layers 7 must be between 0" in out and [case["case"] for case in reports(out)] == ["store"]
    call("bench", "gpu", "--device", "cpu", "--minutes", 0)
    out = capsys.readouterr().out
    assert not reports(out) and out.count("not started") == 2


def test_the_table_shows_every_line_of_a_run(tmp_path, capsys):
    lines = [{"case": "sample", "batch_size": 3, "seconds": 0.12345, "mfu": 0.5}, {"case": "store"}]
    where = {"on": "CPU", "torch": "2.0", "date": "2025-01-01"}
    text = "\n".join(["to read", *(json.dumps(line | where) for line in lines)])
    (tmp_path / "run.txt").write_text(text)
    call("bench", "report", tmp_path / "run.txt")
    out = capsys.readouterr().out
    assert "| sample | 3 | - | 0.123 |" in out and "| store | - |" in out and "CPU, torch 2.0, 2025-01-01" in out
    for broken, words in (("to read", "holds no line of a benchmark"), (text[:-5], "a line of it is damaged")):
        (tmp_path / "run.txt").write_text(broken)
        assert words in refused(capsys, "bench", "report", tmp_path / "run.txt")


def test_a_training_step_counts_as_three_forwards(capsys):
    for command in ("train", "sample"):
        call("bench", command, *NANO, "--stack", 0, "--device", "cpu")
    train, sample = (case["tflops"] for case in reports(capsys.readouterr().out))
    assert 2.8 < train / sample < 3.2
