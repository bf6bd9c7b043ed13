import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from flallm_ds.dist import (
    World,
    all_reduce_sum,
    broadcast_object,
    check_same_device,
    cores_of_rank,
    free_port,
    gather_objects,
    gather_values,
    locked_by_main,
    main_first,
    on_each_machine,
    on_every_rank,
    rank_environment,
    set_timeouts,
    start,
    stop,
)
from flallm_ds.errors import RankError, UserError

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29511"}
ALONE = World(rank=0, size=1, local_rank=0, local_size=1)


def found(env: dict[str, str]) -> tuple[int, ...]:
    ranks = rank_environment(env)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return tuple(int(ranks[name]) for name in names)


def test_variables_of_the_deepspeed_launcher_are_read():
    env = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", **MASTER}
    assert found(env) == (3, 4, 1, 2)
    assert (
        rank_environment(env)["MASTER_ADDR"] == "node1"
        and rank_environment(env)["MASTER_PORT"] == "29511"
    )


def test_variables_of_torchrun_are_read():
    env = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        **MASTER,
    }
    assert found(env) == (5, 8, 1, 4)


@pytest.mark.parametrize(
    ("per_node", "local_size"),
    [("2(x2)", 2), ("4", 4), ("2,2", 2), ("2(x3),1", 2), ("16(x128)", 16)],
)
def test_variables_of_srun_are_read(per_node, local_size):
    env = {
        "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": per_node, **MASTER,
    }  # fmt: skip
    assert found(env) == (1, 4, 1, local_size)


@pytest.mark.parametrize(
    "srun", [{}, {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}]
)
def test_variables_of_open_mpi_are_read_even_if_srun_started_its_daemons(srun):
    mpirun = {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    env = {f"OMPI_COMM_WORLD_{name}": value for name, value in mpirun.items()}
    assert found({**srun, **env, **MASTER}) == (3, 4, 1, 2)


def test_an_unknown_launcher_is_refused():
    with pytest.raises(UserError, match="must be set if PMI_SIZE is 2, got none"):
        rank_environment({"PMI_SIZE": "2", "PMI_RANK": "1"})


def test_a_launcher_in_an_srun_step_has_precedence_over_srun():
    srun = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert found({**srun, **torchrun, **MASTER}) == (3, 4, 1, 2)


@pytest.mark.parametrize(
    "env", [{}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_JOB_ID": "7"}]
)
def test_a_plain_process_has_world_size_1_and_its_own_port(env):
    assert found(env) == (0, 1, 0, 1)
    master = rank_environment(env)
    assert master["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 <= int(master["MASTER_PORT"]) < 65536


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"},
    ],
)
def test_ranks_without_a_master_address_are_refused(env, missing):
    master = {name: value for name, value in MASTER.items() if name != missing}
    with pytest.raises(UserError, match=f"{missing} must be set if the world size is 2"):
        rank_environment({**env, **master})


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        ({"RANK": "1", "LOCAL_RANK": "1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_LOCALID"),
    ],
)
def test_a_launcher_that_sets_only_some_variables_is_refused(env, missing):
    """With defaults, every rank would run with world size 1 or on the first GPU."""
    with pytest.raises(UserError, match=f"{missing} must be set"):
        rank_environment({**env, **MASTER})


@pytest.mark.parametrize(
    ("step", "cores", "local_size", "found"),
    [
        # deepspeed, torchrun: all ranks of a machine may use the same cores
        ({}, 32, 4, 8),
        ({}, 2, 4, 1),
        # srun bound each task
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_CPUS_PER_TASK": "8"}, 8, 4, 8),
        # srun did not bind the tasks
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_CPUS_PER_TASK": "8"}, 32, 4, 8),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_CPUS_PER_TASK": "32"},
            32,
            4,
            8,
        ),  # deepspeed in a task
    ],
)
def test_a_rank_uses_its_own_cores_or_its_share(
    monkeypatch, step, cores, local_size, found
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert cores_of_rank(local_size, step) == found


def test_ranks_with_and_without_a_gpu_are_refused_before_they_wait_for_each_other():
    store = torch.distributed.HashStore()
    check_same_device(store, "cuda", rank=0)
    check_same_device(store, "cuda", rank=1)
    with pytest.raises(
        RankError, match=r"^Cannot start: rank 2 on .* has device cpu, rank 0"
    ):
        check_same_device(store, "cpu", rank=2)


def test_a_free_port_can_be_bound():
    with socket.socket() as s:
        s.bind(("127.0.0.1", free_port()))


def test_world_size_1_needs_no_process_group():
    assert not torch.distributed.is_initialized()
    assert all_reduce_sum([1, 2.5], ALONE) == [1.0, 2.5]
    assert gather_values([1, 2.5], ALONE) == [[1.0, 2.5]]
    assert gather_objects("x", ALONE) == ["x"]
    assert broadcast_object({"a": 1}, ALONE) == {"a": 1}
    assert main_first(lambda: 5, ALONE) == 5


def test_an_error_of_rank_0_is_raised():
    def fails() -> None:
        raise UserError("x must be 1, got 2.")

    with pytest.raises(UserError, match="x must be 1, got 2"):
        main_first(fails, ALONE)


def test_an_action_runs_once_per_machine_and_its_error_is_raised_on_all_ranks():
    calls: list[int] = []
    on_each_machine(lambda: calls.append(1), ALONE)
    assert calls == [1]

    def fails() -> None:
        raise UserError("x must be 1, got 2.")

    with pytest.raises(UserError, match="x must be 1, got 2"):
        on_each_machine(fails, ALONE)


def test_only_rank_0_is_main():
    assert ALONE.is_main and not World(1, 2, 1, 2).is_main


def test_a_process_group_leaves_no_master_address_behind():
    before = dict(os.environ)
    start()
    # DeepSpeed keeps such a reference, and the store keeps listening.
    held = torch.distributed.group.WORLD
    stop()
    assert dict(os.environ) == before
    start()
    assert held is not torch.distributed.group.WORLD
    stop()


@pytest.mark.parametrize(("minutes", "seconds"), [(None, 1800), ("7", 420)])
def test_all_groups_have_the_timeout_that_deepspeed_is_given(
    minutes: str | None, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    if minutes is not None:
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", minutes)
    start()
    groups = [torch.distributed.group.WORLD]
    groups.append(torch.distributed.new_group([0], timeout=timedelta(minutes=1)))
    set_timeouts()
    for group in groups:
        backend = group._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == seconds
    stop()


@pytest.mark.parametrize("run", [main_first, on_each_machine, on_every_rank])
@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (
            "/dev/full",
            "No space left on device. Free some space and run the same command again.",
        ),
        ("/dev", "Is a directory. Fix this and run the same command again."),
        ("/proc/version/none", "Not a directory. Fix this"),
    ],
)
def test_an_os_error_of_one_rank_is_a_user_error_of_all_ranks(
    run: Callable[..., None], path: str, sentence: str
) -> None:
    """Else the other ranks would wait for the failed one."""
    with pytest.raises(UserError) as caught:
        run(lambda: Path(path).write_text("text"), ALONE)
    assert str(caught.value).startswith("Cannot read or write ") and sentence in str(
        caught.value
    )


def test_a_lock_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"Cannot read or write .*file"),
        locked_by_main(tmp_path / "file" / ".lock", "it", "wait", ALONE),
    ):
        pass
