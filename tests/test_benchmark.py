"""What is there for speed changes no result: compiled blocks, recomputed activations, writing in a thread."""

import copy
import json
import os
import platform
import shlex
import threading
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, call, losses, random_teacher, spawn

from models_ard import ARD
from runtime.files import WriteBehind
from runtime.precision import compile_blocks
from stores import checkpoints


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile with all but code generation, which takes a minute on a CPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def student(mask: str = "M4") -> ARD:
    return ARD.from_teacher(random_teacher(), mask=mask, history_layers=2)


def gradients(model: ARD, batch: int = 3) -> list[torch.Tensor]:
    """Predictions and all gradients of a fixed loss."""
    torch.manual_seed(0)
    model.zero_grad()
    predictions = model(torch.randn(batch, model.steps, 1, 8, 8), torch.arange(batch))
    predictions.square().mean().backward()
    return [predictions.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_recomputed_activations_give_the_same_gradients():
    plain = student()
    saving = copy.deepcopy(plain)
    saving.checkpoint_activations = True
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        wanted, few = gradients(plain), len(kept)
        found = gradients(saving)
    assert len(kept) - few < few / 2
    assert len(wanted) == len(found) and all(torch.equal(a, b) for a, b in zip(wanted, found))


def test_compiled_blocks_give_the_same_gradients_without_recompiling(quick_compiler):
    plain = student()
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert copy.deepcopy(compiled).blocks[0]._compiled_call_impl is None  # as the EMA is made
    wanted = gradients(plain)
    gradients(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for a, b in zip(wanted, gradients(compiled)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["M2", "M4"])
def test_compiled_sampling_is_the_same(mask, quick_compiler):
    plain = student(mask)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled)
    noise, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    compiled.sample(noise, y)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled.sample(noise, y), plain.sample(noise, y), rtol=0, atol=1e-6)


def test_trainers_take_both_options(store, tmp_path, quick_compiler):
    fast = ("--compile", "--checkpoint-activations")
    for name, options in {"plain": (), "fast": fast}.items():
        call("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 3, "--run-dir", tmp_path / name, *options)
    np.testing.assert_allclose(losses(tmp_path / "fast"), losses(tmp_path / "plain"), rtol=1e-5)
    plain, fast = (checkpoints.load(tmp_path / run / "checkpoints/0000003.pt", "") for run in ("plain", "fast"))
    assert list(plain["ema"]) == list(fast["ema"]) and plain["config"] == fast["config"]


@pytest.mark.slow
def test_compiled_blocks_train_on_two_ranks_as_plain_ones_on_one(store, tmp_path):
    script = tmp_path / "quickly_compiled.py"
    script.write_text(
        "import functools, torch, train_ARD\n"
        "from runtime import cli\n"
        "torch.compile = functools.partial(torch.compile, backend='aot_eager')\n"
        "cli.main(train_ARD.build_parser(), train_ARD.run)\n"
        "assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2  # blocks with history and without\n"
    )
    options = ("--data-path", store, *SMALL, "--iterations", 3)
    call("train_ARD.py", *options, "--run-dir", tmp_path / "plain")
    done = spawn(script, *options, "--compile", "--device", "cpu", "--run-dir", tmp_path / "fast", ranks=2,
                 env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "fast"), losses(tmp_path / "plain"), rtol=1e-5)


def test_compiled_sampler_fills_up_its_last_batch(student_file, tmp_path, quick_compiler, monkeypatch):
    seen = set()
    monkeypatch.setattr(ARD, "sample", lambda self, z, y, sample=ARD.sample: seen.add(len(z)) or sample(self, z, y))
    for name, options in {"plain": (), "fast": ("--compile",)}.items():
        seen.clear()
        call("sample_ARD.py", "--ckpt-path", student_file, "--num-samples", 11, "--per-proc-batch-size", 4,
             "--save-latents", "--out", tmp_path / f"{name}.npz", *options)  # fmt: skip
    assert seen == {4}
    with np.load(tmp_path / "plain.npz") as plain, np.load(tmp_path / "fast.npz") as fast:
        np.testing.assert_allclose(plain["latents"], fast["latents"], atol=1e-5)
        assert (plain["arr_1"] == fast["arr_1"]).all() and len(fast["arr_0"]) == 11


def test_writing_keeps_the_order_and_runs_beside_the_making():
    written, threads = [], set()

    def write(item, made):
        threads.add(threading.get_ident())
        written.append((item, made))

    with WriteBehind() as behind:
        for item in range(20):
            behind.submit(write, item, item**2)
    assert written == [(i, i**2) for i in range(20)]
    assert len(threads) == 1 and threading.get_ident() not in threads


@pytest.mark.parametrize("culprit", ["make", "write"])
def test_errors_of_both_sides_surface_and_nothing_is_written_after_them(culprit):
    written = []

    def make(item):
        if culprit == "make" and item == 3:
            raise RuntimeError("cannot make 3")
        return item

    def write(item, made):
        if culprit == "write" and item == 3:
            raise OSError("cannot write 3")
        written.append(item)

    with pytest.raises((RuntimeError, OSError), match=f"cannot {culprit} 3"), WriteBehind() as behind:
        for item in range(10):
            behind.submit(write, item, make(item))
    assert written == [0, 1, 2]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again(tmp_path):
    script = tmp_path / "freed.py"
    script.write_text(
        "import resource, torch\n"
        "from runtime import distributed\n"
        "def pages():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    [torch.ones(2**21) for _ in range(20)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "returned = [pages() for _ in range(4)]\n"
        "distributed.setup('cpu')\n"
        "kept = [pages() for _ in range(10)]\n"
        "print(returned, kept)\n"
        "assert max(kept[-3:]) < min(returned) / 10\n"
    )
    # By default glibc adapts its threshold to what it has seen; a given one returns each tensor's memory every time.
    done = spawn(script, env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": str(2**20)})
    assert done.returncode == 0, done.stdout + done.stderr


NANO = ("--model", "DiT-Nano/2", "--input-size", 4, "--batch-size", 3, "--repeats", 2)
BENCHMARKS = {
    "train": (*NANO, "--stack", 2, "--accumulation", 2, "--checkpoint-activations"),
    "sample": (*NANO, "--stack", 2, "--vs", "--stack 0 --steps 2"),
    "trajectories": NANO,
    "store": ("--rows", 40, "--batch-size", 7, "--repeats", 2),
}


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmark_measures_each_stage(command, capsys):
    call("benchmark.py", command, *BENCHMARKS[command], "--device", "cpu")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(lines) == (2 if "--vs" in BENCHMARKS[command] else 1)
    for line in lines:
        assert 0 < line["fastest"] <= line["seconds"] <= line["slowest"] and line["peak_memory_gb"] > 0
        assert ("mfu" in line) == (command != "store")
    if command == "sample":
        plain, variant = lines
        assert (plain["stack"], plain["steps"], variant["stack"], variant["steps"]) == (2, 4, 0, 2)
        assert plain["tflops"] > 2 * variant["tflops"] and variant["ratio"] > 0
    if command == "store":
        assert lines[0]["over_files"] > 0 and lines[0]["over_copy"] > 0


def test_every_gpu_case_is_a_command_line():
    from benchmark import GPU_CASES, build_parser

    for line in GPU_CASES.strip().splitlines():
        build_parser().parse_args([*shlex.split(line), "--device", "cuda"])


def test_a_training_step_counts_as_three_forwards(capsys):
    for command in ("train", "sample"):
        call("benchmark.py", command, *NANO, "--stack", 0, "--device", "cpu")
    train, sample = (json.loads(x)["tflops"] for x in capsys.readouterr().out.splitlines() if x.startswith("{"))
    assert 2.8 < train / sample < 3.2
