"""train_ARD.py: its first loss by hand, trajectories without a store, options that make it faster."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, SMALL, call, checkpoint, losses, refused, spawn

import models
from models_ard import ARD
from runtime.randomness import Shuffle
from stores.trajectories import TrajectoryStore


def test_training_online_needs_no_store(teacher_file, tmp_path, capsys):
    call("train_ARD.py", "--online", "--teacher", teacher_file, *SMALL, "--iterations", 2,
         "--run-dir", tmp_path / "run")  # fmt: skip
    assert checkpoint(tmp_path / "run", 2)["config"]["provenance"]["online"] is True
    for wrong in (("--online",), ("--online", "--data-path", tmp_path), ("--teacher", teacher_file)):
        refused(capsys, "train_ARD.py", *wrong, "--run-dir", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_history_without_stack_is_a_share_of_the_depth(store, capsys):
    capsys.readouterr()
    call("train_ARD.py", "--data-path", store, *SMALL[2:], "--dry-run")
    assert json.loads(capsys.readouterr().out)["model"]["history_layers"] == 1  # of three blocks
    call("train_ARD.py", "--preset", "ard-n6-m4-s4", "--data-path", "absent", "--dry-run")
    with_preset = json.loads(capsys.readouterr().out)
    call("train_ARD.py", "--model", "DiT-XL/2", "--preset", "ard-n28-m4-s4", "--data-path", "absent", "--dry-run")
    assert (with_preset["options"]["stack"], json.loads(capsys.readouterr().out)["options"]["stack"]) == (6, 28)


@pytest.mark.parametrize("target", ["x0", "xt"])
def test_the_losses_are_those_of_the_targets_points(target, store, tmp_path):
    """The first step's loss by hand: the first eight rows of the order, a student that is still its teacher."""
    call("train_ARD.py", "--data-path", store, *SMALL, "--mask", "M3", "--target", target, "--iterations", 1,
         "--run-dir", tmp_path)  # fmt: skip
    opened = TrajectoryStore(store)
    teacher, _ = opened.load_teacher()
    trajectory, y = opened.read(Shuffle(len(opened), 0).rows(0, 8), target, [0, 1, 2, 3])
    predictions = ARD.from_teacher(teacher, steps=4, mask="M3", history_layers=2)(trajectory[:, :-1], y)
    assert losses(tmp_path) == pytest.approx([(predictions - trajectory[:, 1:]).square().mean().item()], rel=1e-4)


def test_compiled_blocks_and_recomputed_activations_change_no_result(store, tmp_path, quick_compiler, monkeypatch):
    recomputed, real = [], models.checkpoint
    monkeypatch.setattr(models, "checkpoint", lambda *args, **options: recomputed.append(1) or real(*args, **options))
    fast = ("--compile", "--checkpoint-activations")
    for name, options in {"plain": (), "fast": fast}.items():
        assert not recomputed and not quick_compiler()
        call("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 3, "--run-dir", tmp_path / name, *options)
    assert len(recomputed) == 3 * 3 and quick_compiler() == 2  # blocks with history and without
    np.testing.assert_allclose(losses(tmp_path / "fast"), losses(tmp_path / "plain"), rtol=1e-5)
    plain, fast = checkpoint(tmp_path / "plain", 3), checkpoint(tmp_path / "fast", 3)
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


SECONDS = {"timm", "torchvision", "diffusers", "transformers", "matplotlib", "sklearn"}


def test_what_takes_seconds_to_import_is_imported_by_those_who_need_it(store, student_file, tmp_path):
    """Torch's compiler as well; torch itself imports it for any optimiser."""
    script = tmp_path / "two_commands.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "def run(script, *words):\n"
        "    sys.argv = [script, *words]\n"
        f"    runpy.run_path({str(ROOT)!r} + '/' + script, run_name='__main__')\n"
        f"run('sample_ARD.py', '--ckpt-path', {str(student_file)!r}, '--num-samples', '3', '--out', 's.npz')\n"
        "assert 'torch._dynamo' not in sys.modules and 'sympy' not in sys.modules\n"
        f"run('train_ARD.py', '--data-path', {str(store)!r}, '--stack', '1', '--iterations', '1', '--run-dir', 'run')\n"
        f"print('imported:', sorted({SECONDS!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"
