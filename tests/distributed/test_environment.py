"""Who this process is, what several processes answer with, and what cannot work."""

from __future__ import annotations

import pytest

from tests.several import run_in
from treadle.distributed.choose import mode_for, resolve_mode
from treadle.distributed.environment import Launch, complete, detect, first_host
from treadle.distributed.launch import gravest
from treadle.distributed.settings import ParallelSettings
from treadle.distributed.world import World
from treadle.errors import ConfigError
from treadle.recipe import Layer, compose
from treadle.training.resolve import batch_sizes


def test_a_single_process() -> None:
    assert detect({}) == Launch() and detect({"WORLD_SIZE": "1"}) == Launch()


def test_torchrun() -> None:
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert detect(environ) == Launch(5, 8, 1, 4, "torchrun")


def test_a_slurm_step() -> None:
    environ = {
        "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "gpu[07-09,12]", "SLURM_JOB_ID": "123456",
    }  # fmt: skip
    launch = detect(environ)
    assert launch == Launch(6, 8, 2, 4, "slurm")
    complete(environ, launch)
    assert environ["MASTER_ADDR"] == "gpu07" and environ["RANK"] == "6" and environ["WORLD_SIZE"] == "8"
    assert 15000 <= int(environ["MASTER_PORT"]) < 35000
    beside = {**environ, "SLURM_STEP_ID": "1"}
    del beside["MASTER_PORT"]
    complete(beside, launch)
    assert beside["MASTER_PORT"] != environ["MASTER_PORT"], "another step of the same job meets elsewhere"


def test_a_slurm_batch_script_is_one_process() -> None:
    assert detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) == Launch()


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "process 2 of 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK = 'x'"),
        ({"WORLD_SIZE": "2"}, "without RANK"),
    ],
)
def test_a_broken_environment_is_an_error(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        detect(environ)


def test_an_environment_without_a_meeting_place() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        complete({}, Launch(0, 2, 0, 2, "torchrun"))


@pytest.mark.parametrize(
    "nodes, first",
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[07-09,12],cpu1", "gpu07"), ("a[1,3]-ib", "a1-ib"), ("node-[3]", "node-3")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "codes, code",
    [
        ([0, 0], 0), ([75, 71], 71), ([-9, 75], 137), ([143, 143], 143), ([75, 75], 75), ([0, 2], 2), ([143, 75], 143),
        ([76, -9], 76),
    ],
)  # fmt: skip
def test_the_gravest_code(codes: list[int], code: int) -> None:
    assert gravest(codes) == code


@pytest.mark.parametrize(
    "flags, mode",
    [
        ({"parallel": "ddp"}, "ddp"), ({"parallel": "FSDP"}, "fsdp"), ({"use_fsdp": "true"}, "fsdp"),
        ({"use_ddp": "false"}, "auto"), ({"distributed": "true"}, "auto"), ({"parallel.mode": "none"}, "none"),
        ({"use_deepspeed": "true"}, "deepspeed"), ({"strategy": "ddp"}, "ddp"),
    ],
)  # fmt: skip
def test_the_words_for_a_mode(flags: dict[str, str], mode: str) -> None:
    assert compose([Layer(flags, "flag", from_text=True)]).parallel.mode == mode


def test_auto_shards_what_would_not_fit() -> None:
    import torch

    world = World(Launch(0, 2, 0, 2))
    cpu = torch.device("cpu")
    assert resolve_mode(ParallelSettings(), world, 10**6, cpu) == "ddp"
    assert resolve_mode(ParallelSettings(), world, 10**12, cpu) == "fsdp"
    assert resolve_mode(ParallelSettings(mode="fsdp"), World(), 10**6, cpu) == "none"
    assert mode_for(ParallelSettings(), 8, 10**9, lambda: 80e9) == "ddp" and mode_for(ParallelSettings(), 8, 10**9, lambda: 24e9) == "fsdp"
    with pytest.raises(ConfigError, match="there are 2"):
        resolve_mode(ParallelSettings(mode="none"), world, 10**6, cpu)


def test_the_micro_batch_gives_way_where_nobody_asked_for_it() -> None:
    run = Layer({"train": {"per_device_train_batch_size": 16, "global_batch_size": 16}}, "the run", weak=True)
    assert batch_sizes(compose([run]), 1) == (16, 1, 16)
    assert batch_sizes(compose([run]), 4) == (4, 1, 16)
    assert batch_sizes(compose([Layer({"global_batch_size": 12}, "flag")]), 4) == (3, 1, 12)
    with pytest.raises(ConfigError, match="per_device_train_batch_size may be 1, 2, 4, 8"):
        batch_sizes(compose([run, Layer({"batch_size": 16}, "flag")]), 2)
    with pytest.raises(ConfigError, match="multiple of 3"):
        batch_sizes(compose([run]), 3)


def _slow_work(fails: bool) -> tuple[list[int], str]:
    import time

    from treadle.distributed import world as module
    from treadle.distributed.settings import ParallelSettings
    from treadle.errors import DataError, PeerFailed

    module.STILL_SECONDS = 0.05
    world = module.World.open(ParallelSettings())
    signs: list[int] = []
    told = world._told
    world._told = lambda value: (signs.append(1), told(value))[1]  # type: ignore[method-assign]

    def work() -> list[int]:
        time.sleep(0.5)
        if fails:
            raise DataError("gone")
        return [world.rank, 7]

    try:
        found = world.on_main_slowly(work)
    except (DataError, PeerFailed) as problem:
        return [len(signs)], f"{type(problem).__name__}: {problem}"
    return [len(signs), *found], ""


def test_others_hear_that_a_long_work_of_the_first_process_goes_on() -> None:
    for rank, (found, problem) in enumerate(run_in(2, _slow_work, False)):
        assert found[1:] == [0, 7] and found[0] >= 4 and not problem, rank
    found = run_in(2, _slow_work, True)
    assert [problem for _, problem in found] == ["DataError: gone", "PeerFailed: gone"]
