"""Processes and devices: shares of the work, memory that stays with a process, devices that are not there."""

import inspect
import os
import platform
import socket

import pytest
import torch
from helpers import ROOT, spawn
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist

from runtime.cli import RunError, UserError
from runtime.distributed import DistributedContext, find_launcher, group_options, require_own_gpu, setup


def ranks(world_size: int) -> list[DistributedContext]:
    return [DistributedContext(rank, world_size) for rank in range(world_size)]


@given(world_size=st.integers(1, 40), count=st.integers(0, 300))
def test_shares_lose_nothing_hold_nothing_twice_and_differ_by_one_at_most(world_size, count):
    shares = [context.share(count) for context in ranks(world_size)]
    assert [index for share in shares for index in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(world_size=st.integers(1, 9), batch=st.integers(1, 40), first=st.integers(0, 10**6), steps=st.integers(1, 4))
def test_the_steps_of_all_ranks_together_are_the_global_batches_in_order(world_size, batch, first, steps):
    indices = [
        index
        for step in range(first, first + steps)
        for context in ranks(world_size)
        for index in context.step_indices(step, batch)
    ]
    assert indices == list(range(first * batch, (first + steps) * batch))


@given(world_size=st.integers(1, 9), batch=st.integers(1, 40))
def test_a_ranks_share_is_as_large_in_every_step(world_size, batch):
    for context in ranks(world_size):
        assert {len(context.step_indices(step, batch)) for step in range(5)} == {len(context.share(batch))}


def test_a_single_process_is_the_main_one_and_waits_for_nobody():
    context = DistributedContext()
    assert context.is_main and not DistributedContext(1, 2).is_main
    assert context.all_reduce(torch.ones(2)).tolist() == [1, 1] and context.broadcast_object("mine") == "mine"
    context.barrier()
    assert context.describe_batch(8) == "global batch 8 = 8 on each of 1 x cpu"
    assert DistributedContext(0, 3).describe_batch(8) == "global batch 8 = 2 or 3 on each of 3 x cpu"


@pytest.mark.parametrize("device", ["tpu", "mps:0", "cuda:77"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(UserError, match=f"^--device {device}: "):
        setup(device)
    assert setup("cpu").device.type == "cpu"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again_by_the_process(tmp_path):
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


def test_a_rank_that_starts_after_torchrun_has_died_does_not_wait_for_it(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (told | {"MASTER_PORT": str(server.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        find_launcher()
    with pytest.raises(RunError, match="^torchrun has died; run the same command again$"):
        find_launcher()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")  # without torchrun, the main rank will listen there
    find_launcher()


def test_nccl_is_told_the_gpu_so_that_it_connects_at_the_start():
    """No group is made here, for want of a GPU; the arguments' names are torch's."""
    gpu = torch.device("cuda", 1)
    told = [group_options(DistributedContext(1, 2, device)) for device in (gpu, torch.device("cpu"))]
    assert [(own["backend"], own.get("device_id")) for own in told] == [("nccl", gpu), ("gloo", None)]
    known = inspect.signature(dist.init_process_group).parameters
    assert all(own.keys() <= known.keys() and (own["rank"], own["world_size"]) == (1, 2) for own in told)


def test_two_ranks_with_one_gpu_are_told_so_by_the_later():
    store, gpu = dist.HashStore(), torch.device("cuda", 0)
    for rank, uuid in enumerate(("a", "b", "a")):
        store.set(f"gpu {rank}", uuid)
    (
        require_own_gpu(DistributedContext(0, 3, gpu), "a", store),
        require_own_gpu(DistributedContext(1, 3, gpu), "b", store),
    )
    with pytest.raises(UserError, match="^--device cuda:0: ranks 0 and 2 have the same GPU; start one each$"):
        require_own_gpu(DistributedContext(2, 3, gpu), "a", store)


MEETING = """
import sys
import torch
from runtime import distributed
from runtime.cli import UserError
context = distributed.setup("cpu")
def work():
    if sys.argv[1] == "refuse":
        raise UserError("--out x: no")
    return [context.rank, "done"]
try:
    said = context.on_main(work)
except UserError as error:
    said = str(error)
weights = torch.tensor([0.1, 0.2]).double().sum()
other = weights + context.rank * 1e-15
nothing = torch.tensor(float("nan"))
with open(f"{sys.argv[2]}/{context.rank}", "w") as file:
    print(said, context.agree(weights), context.agree(other), context.agree(nothing), file=file)
distributed.finish(context)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case, said", [("refuse", "--out x: no"), ("return", "[0, 'done']")])
def test_ranks_hear_what_the_main_rank_found_and_whether_they_agree(case, said, tmp_path):
    script = tmp_path / "meeting.py"
    script.write_text(MEETING)
    done = spawn(script, case, tmp_path, ranks=2, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert (tmp_path / rank).read_text() == f"{said} True False False\n"


def test_a_single_process_agrees_with_itself():
    context = DistributedContext()
    assert context.agree(torch.tensor(0.1)) and context.on_main(lambda: 3) == 3
    with pytest.raises(UserError, match="^--out x: no$"):
        context.on_main(lambda: (_ for _ in ()).throw(UserError("--out x: no")))
