"""What a GPU would be told, without one: on a pretended device nothing mixes, no step waits, and weights are the CPU's.

And a step's memory is what its plan says. docs/gpu.md tells how, and what only a GPU can tell.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

FOLDER = ROOT / "tests/pretended_cuda"
sys.path.append(str(FOLDER))
from preload import environment, lacking  # noqa: E402

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())


def output(tmp_path: Path, script: str, *words: str | Path) -> str:
    """What a script of that folder prints, behind the driver that stands in for CUDA's."""
    command = [sys.executable, "-W", "ignore", str(FOLDER / script), *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_pipeline_mixes_no_devices_waits_in_no_step_and_gives_the_cpus_weights(tmp_path):
    """Teacher, dump, R, R online, R+D and both samplers, in fp32. A mixture of devices is an error, as on a GPU.

    R takes a snapshot on its way: it asks how many steps were skipped, and waits once for all copies to pinned memory.
    """
    lines = output(tmp_path, "stages.py", tmp_path / "runs").splitlines()
    found = [line for line in lines if "waits in steps" in line]
    others = [f"{run}: 0 waits in steps" for run in ("teacher", "online", "R+D")]
    assert found == [others[0], "R: 2 waits in steps _local_scalar_dense synchronize", *others[1:]]
    compared, of, apart = re.fullmatch(r"(\d+) of (\d+) tensors, at most (\S+) apart", lines[-1]).groups()
    assert compared == of and int(of) > 400 and float(apart) < 1e-5  # the heads' batched products sum in another order


@pytest.mark.slow
def test_a_plan_is_within_15_percent_of_a_steps_memory(tmp_path):
    lines = output(tmp_path, "memory.py", "R:64", "R:8:compiled", "R+D:6", "t2i-1024:8:ckpt").splitlines()
    assert len(lines) == 4
    for line in lines:
        planned, tracked = map(float, line.partition(",")[0].split()[1:])
        assert tracked > 10 and planned == pytest.approx(tracked, rel=0.15), line
