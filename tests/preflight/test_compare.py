"""Each check of the facts of two nodes, with one planted difference."""

from dataclasses import replace
from pathlib import Path

import pytest

from flallm_ds.dist import World
from flallm_ds.preflight import compare
from flallm_ds.preflight.facts import (
    Device,
    Disk,
    Facts,
    Machine,
    Places,
    Shards,
    gather_facts,
)
from flallm_ds.preflight.results import FAILURE, OK, WARNING, Result, table_of

GPU = Device("NVIDIA H100", 80, "9.0")
DISK = Disk("run folder", "runs/x", free=50 * 10**9, least=10 * 10**9, kind="nfs4")
MACHINE = Machine(
    code="ab" * 32,
    shards={"data/mine": Shards("dev 01, train 02")},
    unseen=(),
    disks=(DISK,),
    driver="580.1",
    compiler=None,
    shared_memory=10**11,
)
VERSIONS = {"python": "3.11.7", "torch": "2.11.0", "deepspeed": "0.19.8"}


def two_nodes(**changed: object) -> list[Facts]:
    """Facts of four ranks on two nodes; `changed` on rank 2, of its node if it is there."""
    facts = []
    for rank in range(4):
        host = "node-a" if rank < 2 else "node-b"
        machine = MACHINE if rank in (0, 2) else None
        one = Facts(rank, host, 1000.0, GPU, VERSIONS, 8, 10**5, machine)
        facts.append(one)
    of_machine = {k: v for k, v in changed.items() if hasattr(MACHINE, k)}
    of_rank = {k: v for k, v in changed.items() if k not in of_machine}
    machine = replace(MACHINE, **of_machine)
    facts[2] = replace(facts[2], machine=machine, **of_rank)
    return facts


@pytest.mark.parametrize("check", compare.OF_DOCTOR)
def test_equal_machines_pass_every_check(check: compare.Check) -> None:
    assert check(two_nodes()).state == OK


@pytest.mark.parametrize(
    ("check", "changed", "state", "found"),
    [
        (
            compare.versions,
            {"versions": VERSIONS | {"torch": "2.10.0"}},
            FAILURE,
            "rank 2 on node-b has torch 2.10.0, rank 0 on node-a has 2.11.0",
        ),
        (
            compare.versions,
            {"versions": {"python": "3.11.7", "torch": "2.11.0"}},
            FAILURE,
            "rank 2 on node-b has deepspeed None, rank 0 on node-a has 0.19.8",
        ),
        (
            compare.code,
            {"code": "cd" * 32},
            FAILURE,
            "rank 2 on node-b runs other code of flallm_ds than rank 0 on node-a",
        ),
        (
            compare.devices,
            {"device": Device("NVIDIA A100", 40, "8.0")},
            WARNING,
            "rank 2 on node-b has NVIDIA A100 (40 GB, compute capability 8.0), rank 0 on",
        ),
        (compare.devices, {"device": Device("CPU")}, FAILURE, "rank 2 on node-b has CPU,"),
        (
            compare.clocks,
            {"clock": 1060.0},
            WARNING,
            "the clock of rank 2 on node-b is 60 s ahead of that of rank 0 on node-a",
        ),
        (compare.clocks, {"clock": 900.0}, WARNING, "is 100 s behind that of rank 0"),
        (compare.clocks, {"clock": 1002.0}, OK, "within 2.0 s on 2 machines"),
        (
            compare.same_shards,
            {"shards": {"data/mine": Shards("dev 01, train 03")}},
            FAILURE,
            "rank 2 on node-b does not see the same shards data/mine as rank 0 on node-a "
            "(the fingerprints differ)",
        ),
        (
            compare.same_shards,
            {"shards": {"data/mine": Shards(error="A shard folder must contain.")}},
            FAILURE,
            "(A shard folder must contain)",
        ),
        (
            compare.run_folder,
            {"unseen": ("runs/x/.preflight-1",)},
            FAILURE,
            "rank 2 on node-b does not see runs/x/.preflight-1, which rank 0 on node-a",
        ),
        (
            compare.free_space,
            {"disks": (replace(DISK, free=10**9),)},
            WARNING,
            "rank 2 on node-b has 1.0 GB free for the run folder runs/x, less than 10.0 GB",
        ),
        (compare.drivers, {"driver": "570.2"}, WARNING, "has driver 570.2, rank 0 on"),
        (compare.compiler, {"compiler": "there is no g++"}, WARNING, "no g++"),
        (compare.shared_memory, {"shared_memory": 64 * 10**6}, WARNING, "0.1 GB in /dev"),
        (compare.open_files, {"open_files": 256}, WARNING, "may open 256 files"),
        (compare.open_files, {"open_files": -1}, OK, "limit 100,000"),
        (compare.cores, {"cores": 1}, WARNING, "rank 2 on node-b has 1, so that"),
    ],
)
def test_a_difference_is_named_with_rank_and_host(
    check: compare.Check, changed: dict[str, object], state: str, found: str
) -> None:
    result = check(two_nodes(**changed))
    assert result.state == state and found in result.found
    assert state == OK or result.remedy.endswith(".")


def test_shards_that_no_machine_can_read_are_left_to_their_own_error() -> None:
    facts = two_nodes(shards={"data/mine": Shards(error="no index.json.")})
    machine = replace(MACHINE, shards={"data/mine": Shards(error="no index.json.")})
    facts[0] = replace(facts[0], machine=machine)
    assert compare.same_shards(facts).state == OK
    assert compare.readable_shards(facts) == Result("shards", FAILURE, "no index.json")


def test_a_rank_alone_describes_itself(tmp_path: Path, tiny_corpus: Path) -> None:
    places = Places((str(tiny_corpus / "shards"),), (tmp_path / "new" / "run",))
    facts = gather_facts(places, World(0, 1, 0, 1))
    for check in compare.BEFORE_A_RUN:
        assert check(facts).state != FAILURE
    assert not list(tmp_path.iterdir())


def test_the_table_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = table_of(
        [
            Result("clocks", OK, "within 0.1 s"),
            Result("code", FAILURE, "differs", "Copy it."),
        ]
    )
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "clocks ok within 0.1 s",
        "code failure differs. Copy it.",
    ]
