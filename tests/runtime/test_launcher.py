"""Which process of a run this is: half-set variables are refused by every command, GPUs are chosen or refused."""

import json
import os

import pytest
from helpers import SHIPPED_TEACHER, spawn

from runtime.errors import UserError
from runtime.launcher import Place, choose_gpu, place

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_LOCALID",
         "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")  # fmt: skip
MEETING = "MASTER_ADDR=localhost MASTER_PORT=29500"
HALF = {
    "RANK=1": "RANK=1: WORLD_SIZE is not set",
    "RANK=0": "RANK=0: WORLD_SIZE is not set",
    "WORLD_SIZE=2": "WORLD_SIZE=2: RANK is not set",
    f"WORLD_SIZE=2 RANK= {MEETING}": "WORLD_SIZE=2: RANK is not set",
    "WORLD_SIZE=2 RANK=0": "WORLD_SIZE=2: MASTER_ADDR, where the ranks meet, is not set",
    "WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost": "WORLD_SIZE=2: MASTER_PORT is not set",
    "WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=0": "WORLD_SIZE=2: MASTER_PORT=0 is no port",
    "WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=http": "MASTER_PORT=http: must be a whole number",
    f"WORLD_SIZE=2 RANK=2 {MEETING}": "RANK=2: must be one of 0 .. WORLD_SIZE - 1 = 1",
    f"WORLD_SIZE=2 RANK=-1 {MEETING}": "RANK=-1: must be one of",
    "WORLD_SIZE=1 RANK=1": "RANK=1: must be one of 0 .. WORLD_SIZE - 1 = 0",
    "WORLD_SIZE=0": "WORLD_SIZE=0: must be at least 1",
    "WORLD_SIZE=two": "WORLD_SIZE=two: must be a whole number",
    "LOCAL_RANK=3": "LOCAL_RANK=3: RANK and WORLD_SIZE are not set",
    f"WORLD_SIZE=2 RANK=0 LOCAL_RANK=2 {MEETING}": "LOCAL_RANK=2: must be one of 0 .. 1",
    f"WORLD_SIZE=2 RANK=0 LOCAL_RANK=1 LOCAL_WORLD_SIZE=1 {MEETING}": "LOCAL_RANK=1: must be one of 0 .. 0",
    f"WORLD_SIZE=2 RANK=0 LOCAL_WORLD_SIZE=3 {MEETING}": "LOCAL_WORLD_SIZE=3: must be 1 .. WORLD_SIZE = 2",
}
WHOLE = {
    "": Place(),
    "RANK= WORLD_SIZE= LOCAL_RANK=": Place(),
    "RANK=0 WORLD_SIZE=1": Place(),
    "WORLD_SIZE=1": Place(),
    "MASTER_ADDR=localhost SLURM_LOCALID=5 LOCAL_RANK=0": Place(),  # left over, and harm nobody
    f"RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 {MEETING}": Place(3, 4, 1, 2),
    f"RANK=3 WORLD_SIZE=4 SLURM_LOCALID=1 {MEETING}": Place(3, 4, 1),
    f"RANK=3 WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 {MEETING}": Place(3, 4, 1, 2),
}


def variables(text: str) -> dict[str, str]:
    return dict(word.split("=") for word in text.split())


@pytest.fixture
def environment(monkeypatch):
    def set_to(text: str) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables(text).items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize("text", HALF)
def test_what_is_half_set_is_refused(text, environment):
    environment(text)
    with pytest.raises(UserError) as error:
        place()
    assert str(error.value).startswith(HALF[text]) and "torchrun" in str(error.value)


@pytest.mark.parametrize("text", WHOLE)
def test_what_is_whole_says_which_process_this_is(text, environment):
    environment(text)
    assert place() == WHOLE[text]


def test_a_plan_needs_the_number_of_ranks_alone(environment):
    environment("WORLD_SIZE=8")
    assert place(planning=True) == Place(0, 8)
    environment("WORLD_SIZE=8 RANK=8")
    with pytest.raises(UserError, match="^RANK=8: "):
        place(planning=True)


COMMANDS = {
    "dump": ("sample_trajectory.py", "--teacher", SHIPPED_TEACHER, "--num-trajectories", 9, "--out", "OUT/store"),
    "plan": ("sample_trajectory.py", "--teacher", SHIPPED_TEACHER, "--num-trajectories", 9, "--out", "OUT/store",
             "--dry-run"),
    "evaluator": ("evaluations.evaluator", "a.npz", "b.npz", "--json", "OUT/m.json"),
    "reference": ("evaluations.digits", "reference", "--out", "OUT/digits.npz"),
}  # fmt: skip


@pytest.mark.parametrize(
    "command", ["plan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dump", "evaluator", "reference"))]
)
def test_every_command_refuses_a_rank_without_others(command, tmp_path):
    script, *words = COMMANDS[command]
    options = [str(word).replace("OUT", str(tmp_path)) for word in words]
    done = spawn(script, *options, env=os.environ | {"RANK": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert "error: RANK=1: WORLD_SIZE is not set; start the command with torchrun" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_machine_that_nobody_knows_is_not_waited_for(tmp_path):
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "no.such.machine.invalid", "MASTER_PORT": "29500"}
    script, *words = COMMANDS["dump"]
    done = spawn(script, *(str(word).replace("OUT", str(tmp_path)) for word in words), env=os.environ | told)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "error: MASTER_ADDR=no.such.machine.invalid: no machine of that name is found" in done.stderr


@pytest.mark.slow
def test_the_word_of_an_older_launcher_names_torchrun():
    done = spawn("train_ARD.py", "--data-path", "x", "--local-rank=0")
    assert done.returncode == 2 and "start the command with torchrun" in done.stderr


def test_empty_variables_plan_for_one(tmp_path):
    script, *words = COMMANDS["plan"]
    empty = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "")
    done = spawn(script, *(str(word).replace("OUT", str(tmp_path)) for word in words), env=os.environ | empty)
    assert done.returncode == 0 and json.loads(done.stdout)["count"] == 9, done.stderr


@pytest.mark.parametrize(
    "index, at, visible, wanted",
    [
        (None, Place(), 8, 0),
        (3, Place(), 8, 3),
        (None, Place(3, 8, 3, 8), 8, 3),
        (None, Place(9, 16, 1), 8, 1),  # of Slurm, say
        (None, Place(3, 8, 3, 8), 1, 0),  # one is shown to each process: CUDA_VISIBLE_DEVICES of its own
        (None, Place(3, 8), 1, 0),
        (2, Place(1, 2, 0, 1), 8, 2),  # one process on each machine
        (0, Place(1, 2, 1, 2), 8, "share that GPU, give --device cuda"),
        (0, Place(1, 2), 8, "share that GPU, give --device cuda"),
        (None, Place(1, 2), 8, "LOCAL_RANK: is not set, so which of the 8 GPUs is rank 1's is not known"),
        (None, Place(5, 8, 5, 8), 4, r"\(LOCAL_RANK=5\): this machine shows 4 CUDA devices"),
        (8, Place(), 8, "this machine shows 8 CUDA devices"),
        (1, Place(), 1, "this machine shows 1 CUDA device;"),
        (None, Place(), 0, "this machine shows no CUDA device, give --device cpu"),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own_or_says_why_not(index, at, visible, wanted):
    device = "cuda" if index is None else f"cuda:{index}"
    if isinstance(wanted, int):
        assert choose_gpu(device, index, at, visible) == wanted
        return
    with pytest.raises(UserError, match=wanted):
        choose_gpu(device, index, at, visible)
