"""Stores with a real HTTP server that fails on request, and with real processes and disks."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flallm_ds.data.index import COLUMNS, STRING_COLUMNS, load_index, write_table
from flallm_ds.data.storage.fetch import Patience
from flallm_ds.data.storage.store import (
    CacheOptions,
    LocalStore,
    RemoteStore,
    Shard,
    open_store,
)
from flallm_ds.errors import RankError, UserError
from tests.helpers.http_server import Server

NUM_BYTES = 40_000
PATIENCE = Patience(
    attempts=4, first_wait_s=0.01, longest_wait_s=0.02, total_s=20, connect_s=2, stall_s=1
)
SPAWN = multiprocessing.get_context("spawn")
FORK = multiprocessing.get_context("fork")


def content(number: int, num_bytes: int = NUM_BYTES) -> bytes:
    return np.random.default_rng(number).bytes(num_bytes)


def shard_of(path: Path) -> Shard:
    data = path.read_bytes()
    return Shard(path.name, len(data), hashlib.sha256(data).hexdigest(), 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a shard folder of six tars with 40,000 random bytes each."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        dict.fromkeys(COLUMNS, 1)
        | {"shard": number}
        | {name: f"{name} {number}" for name in STRING_COLUMNS}
        for number in range(6)
    ]
    entry = write_table(folder / "train.safetensors", rows)
    for number in range(6):
        (folder / f"train-{number:06d}.tar").write_bytes(content(number))
    entry["shards"] = [vars(shard_of(path)) for path in sorted(folder.glob("*.tar"))]
    manifest = {"format": "flallm_ds shards 1", "corpus": "toy", "splits": {"train": entry}}
    (folder / "index.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def shards(folder: Path) -> list[Shard]:
    return [shard_of(path) for path in sorted(folder.glob("*.tar"))]


@pytest.fixture
def server(folder: Path):
    with Server(folder) as server:
        yield server


def cache_of(tmp_path: Path, num_shards: float = 100) -> CacheOptions:
    return CacheOptions(tmp_path / "cache", max_gb=num_shards * NUM_BYTES / 1e9)


@pytest.fixture
def store(server: Server, tmp_path: Path) -> RemoteStore:
    return RemoteStore(server.url, cache_of(tmp_path), PATIENCE)


def read(store, shard: Shard) -> bytes:
    with store.open(shard) as file:
        return os.pread(file.fileno(), 10 * NUM_BYTES, 0)


def cached(tmp_path: Path) -> list[str]:
    """Return the server's names of the tars in the cache; parts end in .part."""
    return sorted(
        path.name.split("-", 1)[1] for path in (tmp_path / "cache").glob("*/shards/*")
    )


def wait_for(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.01)


# One fetch


def test_a_shard_is_fetched_once_and_read_at_an_offset(store, server, shards):
    for _ in range(3):
        with store.open(shards[2]) as file:
            assert os.pread(file.fileno(), 100, 1000) == content(2)[1000:1100]
    assert server.gets == [("train-000002.tar", None)]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "fault",
    ["drop", "truncated", "hang up", "500", "503", "429", "corrupt", "longer", "stall"],
)
def test_a_temporary_fault_is_not_noticed(store, server, shards, fault, ranges):
    server.ranges = ranges
    server.faults["train-000000.tar"] = [fault, fault]
    assert read(store, shards[0]) == content(0)
    assert server.num_gets("train-000000.tar") == 3


def test_a_dropped_connection_is_continued_where_it_broke(store, server, shards):
    server.faults["train-000000.tar"] = ["drop", "truncated"]
    assert read(store, shards[0]) == content(0)
    assert [asked for _, asked in server.gets] == [None, "bytes=20000-", "bytes=30000-"]
    assert server.sent == NUM_BYTES


def test_a_file_that_became_shorter_is_fetched_from_its_beginning(
    store, server, shards, folder
):
    server.faults["train-000000.tar"] = ["drop"]
    (folder / "train-000000.tar").write_bytes(content(0)[:100])
    with pytest.raises(RankError, match="only 100 of 40,000 bytes arrived"):
        read(store, shards[0])
    (folder / "train-000000.tar").write_bytes(content(0))
    assert read(store, shards[0]) == content(0)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "the server answered 500"),
        (
            "corrupt",
            r"sha256 must be [0-9a-f]{16}\.\.\. as the index says, got [0-9a-f]{16}\.\.\.",
        ),
        ("longer", "more than 40,000 bytes arrived"),
        ("hang up", "ServerDisconnectedError"),
        ("stall", "no data arrived in time"),
    ],
)
def test_a_lasting_fault_is_one_sentence_after_the_last_attempt(
    store, server, shards, tmp_path, fault, reason
):
    server.faults["train-000000.tar"] = [fault] * 99
    with pytest.raises(
        RankError, match=rf"fetch .*/data/train-000000\.tar after 4 attempts: .*{reason}"
    ):
        store.open(shards[0])
    # aiohttp sends a request again when a server closes the connection without an answer.
    assert server.num_gets("train-000000.tar") == (8 if fault == "hang up" else 4)
    assert "train-000000.tar" not in cached(tmp_path)


@pytest.mark.parametrize(
    ("fault", "reason"), [("404", "there is no train-000000.tar"), ("403", "answered 403")]
)
def test_a_final_error_ends_at_once(store, server, shards, fault, reason):
    server.faults["train-000000.tar"] = [fault]
    with pytest.raises(RankError, match=reason):
        store.open(shards[0])
    assert len(server.gets) == 1


def test_a_server_that_stalls_does_not_block_a_run(server, shards, tmp_path):
    server.faults["train-000000.tar"] = ["stall"] * 99
    patience = Patience(attempts=99, first_wait_s=0.01, total_s=0.5, stall_s=0.2)
    began = time.monotonic()
    with pytest.raises(RankError, match="Cannot fetch"):
        RemoteStore(server.url, cache_of(tmp_path), patience).open(shards[0])
    assert time.monotonic() - began < 5


def test_user_password_and_query_are_sent_to_the_server_alone(
    server, shards, tmp_path, capfd
):
    address = server.url.replace("//", "//anna:s3cret@") + "?sig=a%2Fb%3D"
    store = RemoteStore(address, cache_of(tmp_path), PATIENCE)
    assert read(pickle.loads(pickle.dumps(store)), shards[0]) == content(0)
    assert server.headers[-1]["Authorization"] == "Basic YW5uYTpzM2NyZXQ="
    assert server.headers[-1]["path"] == "/data/train-000000.tar?sig=a%2Fb%3D"
    server.faults = {name: ["500"] * 9 for name in ("train-000001.tar", "index.json")} | {
        "train-000002.tar": ["404"]
    }
    texts = [repr(store), store.root, str(list((tmp_path / "cache").rglob("*")))]
    for call in (
        lambda: store.open(shards[1]),
        lambda: store.open(shards[2]),
        lambda: store.file("index.json"),
    ):
        with pytest.raises(UserError) as error:
            call()
        texts.append(str(error.value))
    server.server_close()  # the error of a refused connection names the address too
    with pytest.raises(UserError, match="Cannot find the shards") as error:
        pickle.loads(pickle.dumps(store)).check(shards[3:])
    text = " ".join([*texts, str(error.value), *capfd.readouterr()])
    assert f"127.0.0.1:{server.server_port}/data" in text
    assert not re.search("anna|s3cret|YW5u|sig=|a%2Fb", text)


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_other_protocols_of_fsspec_are_read_the_same_way(
    protocol, folder, shards, tmp_path
):
    root = f"{protocol}://{folder}"
    if protocol == "memory":
        import fsspec

        for path in folder.iterdir():
            fsspec.filesystem("memory").pipe_file(
                f"{folder}/{path.name}", path.read_bytes()
            )
    index = load_index(root, "train", cache_of(tmp_path))
    index.check_files()
    assert [read(index.store, shard) for shard in index.shards] == [
        content(number) for number in range(6)
    ]
    with pytest.raises(
        RankError,
        match=r"Cannot fetch .*train-000009\.tar: there is no train-000009\.tar\.",
    ):
        index.store.open(Shard("train-000009.tar", 3, "aa", 1))


# The index


def test_an_index_over_http_equals_that_of_the_folder(server, folder, tmp_path):
    local, remote = (
        load_index(folder, "train"),
        load_index(server.url, "train", cache_of(tmp_path)),
    )
    assert remote.fingerprint == local.fingerprint and remote.shards == local.shards
    assert list(remote.strings("text")) == list(local.strings("text"))
    load_index(server.url, "train", cache_of(tmp_path))
    assert server.num_gets("index.json") == 2 and server.num_gets("train.safetensors") == 1
    with pytest.raises(UserError, match="must be in a local folder"):
        remote.shard_path(0)


def test_an_index_that_changed_on_the_server_is_seen_at_the_next_start(
    server, folder, tmp_path
):
    before = load_index(server.url, "train", cache_of(tmp_path))
    assert read(before.store, before.shards[0]) == content(0)
    (folder / "train-000000.tar").write_bytes(content(77))
    manifest = json.loads((folder / "index.json").read_text())
    manifest["splits"]["train"]["shards"][0] = vars(shard_of(folder / "train-000000.tar"))
    (folder / "index.json").write_text(json.dumps(manifest))
    after = load_index(server.url, "train", cache_of(tmp_path))
    assert after.fingerprint != before.fingerprint
    assert read(after.store, after.shards[0]) == content(77)


def test_the_copy_in_the_cache_is_used_while_a_server_does_not_answer(
    server, folder, tmp_path, capfd
):
    store = RemoteStore(server.url, cache_of(tmp_path), PATIENCE)
    content_before = store.file("index.json").read_bytes()
    server.faults["index.json"] = ["500"] * 99
    assert store.file("index.json").read_bytes() == content_before
    assert re.search(
        r"warning: .*index\.json after .* 500.*The copy in the cache is used",
        capfd.readouterr().err,
    )
    server.faults["index.json"] = ["404"]
    with pytest.raises(UserError, match=r"there is no index\.json"):
        store.file("index.json")


def test_a_server_that_never_answers_is_one_sentence(server, tmp_path):
    server.shutdown()
    server.server_close()
    store = RemoteStore(server.url, cache_of(tmp_path), PATIENCE)
    with pytest.raises(UserError, match=r"Cannot fetch .*index\.json after 4 attempts"):
        store.file("index.json")


def test_another_table_is_refused_and_a_damaged_copy_is_fetched_again(
    server, folder, tmp_path
):
    index = load_index(server.url, "train", cache_of(tmp_path))
    (copy,) = (tmp_path / "cache").glob("*/tables/*")
    copy.write_bytes(b"damaged")
    assert (
        load_index(server.url, "train", cache_of(tmp_path)).fingerprint == index.fingerprint
    )
    copy.unlink()
    (folder / "train.safetensors").write_bytes(b"another")
    store = RemoteStore(server.url, cache_of(tmp_path), PATIENCE)
    entry = json.loads((folder / "index.json").read_text())["splits"]["train"]
    with pytest.raises(RankError, match=r"train\.safetensors after .*: sha256 must be"):
        store.file("train.safetensors", entry["table_sha256"])
    with pytest.raises(UserError, match="must give the sha256"):
        store.file("train.safetensors", "../../../../../aa")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a b",
        "a;b",
        "$(a)",
        "`a`",
        "-n",
        ".a",
        "a\n",
        "",
        "ä",
        3,
        None,
    ],
)
def test_an_index_names_no_file_outside_its_folder_and_no_command(name, tmp_path):
    with pytest.raises(UserError, match=r"File names in index\.json must consist"):
        Shard(name, 1, "aa", 1)
    with pytest.raises(UserError, match=r"File names in index\.json must consist"):
        LocalStore(str(tmp_path)).file(name)
    for fields in [
        ("a.tar", "1", "aa"),
        ("a.tar", -1, "aa"),
        ("a.tar", 1, "../aa"),
        ("a.tar", 1, None),
    ]:
        with pytest.raises(UserError, match="must give the size and sha256"):
            Shard(*fields, 1)


# The cache


def test_the_cache_keeps_its_bound_and_removes_the_least_recently_used(
    server, shards, tmp_path
):
    store = RemoteStore(server.url, cache_of(tmp_path, 3), PATIENCE)
    held = store.open(shards[1])
    for number in (0, 1, 2, 0):
        read(store, shards[number])
        time.sleep(0.01)
    read(store, shards[3])
    assert cached(tmp_path) == [f"train-{number:06d}.tar" for number in (0, 2, 3)]
    assert os.pread(held.fileno(), NUM_BYTES, 0) == content(1)
    held.close()
    read(store, shards[1])
    assert cached(tmp_path) == [f"train-{number:06d}.tar" for number in (0, 1, 3)]


def test_two_addresses_share_one_bound(server, folder, shards, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    for root in (server.url, f"file://{other}"):
        store = RemoteStore(root, cache_of(tmp_path, 4), PATIENCE)
        for shard in shards[:3]:
            read(store, shard)
    assert (
        sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/shards/*"))
        == 4 * NUM_BYTES
    )


def test_a_shard_that_does_not_fit_the_cache_is_one_sentence(server, shards, tmp_path):
    store = RemoteStore(server.url, cache_of(tmp_path, 0.5), PATIENCE)
    with pytest.raises(
        UserError,
        match=r"must fit into the cache of 20,000 bytes, got 40,000.*cache_gb",
    ):
        store.open(shards[0])
    assert not server.gets


def test_a_full_disk_is_one_sentence(store, shards):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (NUM_BYTES // 2, hard))
    try:
        with pytest.raises(
            RankError,
            match=r"Cannot write to the cache: File too large.*cache_dir",
        ):
            store.open(shards[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read(store, shards[0]) == content(0)


def test_a_file_instead_of_the_cache_folder_is_one_sentence(server, shards, tmp_path):
    (tmp_path / "cache").write_text("a file")
    store = RemoteStore(server.url, cache_of(tmp_path), PATIENCE)
    for call in (lambda: store.open(shards[0]), lambda: store.file("index.json")):
        with pytest.raises(UserError, match=r"Cannot use the cache folder: File exists"):
            call()


def test_the_cache_folder_may_come_from_the_environment(
    server, shards, tmp_path, monkeypatch
):
    monkeypatch.setenv("FLALLM_CACHE", str(tmp_path / "cache"))
    read(open_store(server.url), shards[0])
    assert cached(tmp_path) == ["train-000000.tar"]


# Several processes


def read_all(store, shards, order, answers) -> None:
    for number in order:
        assert read(store, shards[number]) == content(number)
    answers.put(os.getpid())


@pytest.mark.parametrize("num_cached", [100, 2.5])
def test_processes_share_one_cache(server, shards, tmp_path, num_cached):
    store = RemoteStore(server.url, cache_of(tmp_path, num_cached), PATIENCE)
    answers = FORK.Queue()
    for number in range(6):
        server.faults[f"train-{number:06d}.tar"] = ["drop"]
    orders = [np.random.default_rng(n).permutation(6).tolist() * 2 for n in range(3)]
    processes = [
        FORK.Process(target=read_all, args=(store, shards, order, answers))
        for order in orders
    ]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        # under the lock, a part may become complete, but no fetch begins or ends
        with store._cache._folder_lock():
            paths = [*(tmp_path / "cache").glob("*/shards/*")]
        most = max(most, len({re.sub(r"\.\d+\.part$", "", path.name) for path in paths}))
        time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not [name for name in cached(tmp_path) if name.endswith(".part")]
    if num_cached == 100:
        # one connection was dropped for each shard
        assert [server.num_gets(shard.file) for shard in shards] == [2] * 6
    else:
        assert 1 <= most <= 2


def open_one(store, shard) -> None:
    with contextlib.suppress(RankError):
        store.open(shard).close()


def test_the_part_of_a_killed_process_is_continued_by_the_next_one(
    server, shards, tmp_path
):
    patience = Patience(attempts=4, first_wait_s=0.01, stall_s=20)
    store = RemoteStore(server.url, cache_of(tmp_path), patience)
    server.faults["train-000000.tar"] = ["stall"]
    process = SPAWN.Process(target=open_one, args=(store, shards[0]))
    process.start()
    (part,) = [f"train-000000.tar.{NUM_BYTES}.part"]
    wait_for(
        lambda: (
            part in cached(tmp_path)
            and next((tmp_path / "cache").glob("*/shards/*")).stat().st_size
        ),
        60,
    )
    waiting = threading.Thread(target=open_one, args=(store, shards[0]))
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive() and len(server.gets) == 1  # the other process is fetching it
    os.kill(process.pid, signal.SIGKILL)
    waiting.join(10)
    assert cached(tmp_path) == ["train-000000.tar"]
    assert read(store, shards[0]) == content(0)
    assert [asked for _, asked in server.gets] == [None, "bytes=20000-"]
    process.join()


def test_the_part_of_a_dead_process_is_removed_to_make_room(server, shards, tmp_path):
    store = RemoteStore(server.url, cache_of(tmp_path, 1.2), PATIENCE)
    server.faults["train-000000.tar"] = ["drop", *["500"] * 9]
    with pytest.raises(RankError):
        store.open(shards[0])
    assert cached(tmp_path) == [f"train-000000.tar.{NUM_BYTES}.part"]
    read(store, shards[1])
    assert cached(tmp_path) == ["train-000001.tar"]


def test_waiting_for_a_stalled_process_ends(server, shards, tmp_path):
    slow = Patience(attempts=1, stall_s=20)
    server.faults["train-000000.tar"] = ["stall"]
    first = RemoteStore(server.url, cache_of(tmp_path), slow)
    threading.Thread(target=open_one, args=(first, shards[0]), daemon=True).start()
    wait_for(lambda: server.gets)
    hasty = Patience(attempts=1, total_s=0.1, stall_s=0.2)
    with pytest.raises(
        RankError, match=r"\.part is in use by another process, .* fetched nothing"
    ):
        RemoteStore(server.url, cache_of(tmp_path), hasty).open(shards[0])
    server.go_on.set()


def test_a_store_works_after_a_fork_during_a_fetch(server, shards, tmp_path):
    patience = Patience(attempts=4, first_wait_s=0.01, stall_s=20)
    store = RemoteStore(server.url, cache_of(tmp_path), patience)
    read(store, shards[0])  # opens a connection
    server.faults["train-000001.tar"] = ["stall"]
    store.want(shards[1:])
    wait_for(lambda: server.num_gets("train-000001.tar"))
    answers = FORK.Queue()
    process = FORK.Process(target=read_all, args=(store, shards, [0, 2, 3, 1], answers))
    process.start()
    time.sleep(0.2)
    server.go_on.set()
    process.join(20)
    assert process.exitcode == 0
    assert [read(store, shard) for shard in shards] == [
        content(number) for number in range(6)
    ]


# Reading ahead


def test_wanted_shards_are_read_ahead_into_at_most_half_the_cache(server, shards, tmp_path):
    store = RemoteStore(server.url, cache_of(tmp_path, 4), PATIENCE)
    store.want([shards[3], shards[1], shards[4], shards[0]])
    wait_for(lambda: cached(tmp_path) == ["train-000001.tar", "train-000003.tar"])
    time.sleep(0.1)
    assert sorted(name for name, _ in server.gets) == [
        "train-000001.tar",
        "train-000003.tar",
    ]
    assert read(store, shards[3]) == content(3)
    wait_for(lambda: "train-000004.tar" in cached(tmp_path))
    assert read(store, shards[1]) == content(1)
    wait_for(lambda: "train-000000.tar" in cached(tmp_path))
    assert len(server.gets) == 4
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "read-ahead"])


def test_a_new_list_of_wanted_shards_replaces_the_old_one(server, shards, tmp_path):
    store = RemoteStore(server.url, cache_of(tmp_path, 2), PATIENCE)
    for shard in shards:
        store.want([shard])
        wait_for(lambda shard=shard: shard.file in cached(tmp_path))
    assert len(cached(tmp_path)) == 2


def test_stores_of_one_process_share_the_limit_of_reading_ahead(
    server, folder, shards, tmp_path
):
    roots = [server.url, f"file://{shutil.copytree(folder, tmp_path / 'other')}"]
    stores = [RemoteStore(root, cache_of(tmp_path, 8), PATIENCE) for root in roots]
    server.faults = {shard.file: ["503"] for shard in shards}
    for store in stores:
        with store._lock:  # both have wanted shards before either begins
            store._wanted = dict.fromkeys(shards)
    for store in stores:
        store.want(shards)
    wait_for(lambda: len(cached(tmp_path)) == 4)
    time.sleep(0.2)
    assert len(cached(tmp_path)) == 4


def test_a_fault_while_reading_ahead_is_raised_when_the_shard_is_opened(
    store, server, shards, tmp_path
):
    server.faults["train-000000.tar"] = ["404", "404"]
    store.want(shards[:3])
    wait_for(lambda: cached(tmp_path) == ["train-000001.tar", "train-000002.tar"])
    with pytest.raises(RankError, match=r"there is no train-000000\.tar"):
        store.open(shards[0])
    assert read(store, shards[0]) == content(0)


def want_and_leave(store, shards, cache: Path) -> None:
    store.want(shards)
    wait_for(lambda: any(part.stat().st_size for part in cache.glob("*/shards/*.part")), 30)


def test_reading_ahead_does_not_delay_the_end_of_a_process(server, shards, tmp_path):
    server.faults = {shard.file: ["stall"] for shard in shards}
    store = RemoteStore(server.url, cache_of(tmp_path), Patience(stall_s=60))
    process = SPAWN.Process(target=want_and_leave, args=(store, shards, tmp_path / "cache"))
    process.start()
    wait_for(lambda: server.gets, 60)
    process.join(10)
    assert process.exitcode == 0


# Checks at the start


def test_sizes_are_checked_without_fetching(store, server, shards, folder):
    server.faults["train-000003.tar"] = ["503", "503"]
    store.check(shards)
    assert server.sent < NUM_BYTES
    (folder / "train-000004.tar").write_bytes(b"abc")
    with pytest.raises(
        UserError,
        match=r"/data/train-000004\.tar must have 40,000 bytes .*, got 3\.",
    ):
        store.check(shards)
    (folder / "train-000004.tar").unlink()
    with pytest.raises(
        UserError, match=r"Cannot find the shards of .*: there is no train-000004\.tar"
    ):
        store.check(shards)


def test_a_cache_in_a_folder_of_other_files_is_refused(server, shards, tmp_path):
    """Making room would remove the files, and a config.json from elsewhere may name any folder."""
    mine = tmp_path / "cache" / "corpus" / "shards" / "train-000000.tar"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(bytes(2 * NUM_BYTES))
    store = RemoteStore(server.url, cache_of(tmp_path, 1), PATIENCE)
    for use in (lambda: store.file("index.json"), lambda: store.open(shards[0])):
        with pytest.raises(
            RankError,
            match=r"must be new, empty or a cache already, got .*cache with corpus\.",
        ):
            use()
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == [
        "corpus",
        "shards",
        mine.name,
    ]


def test_an_earlier_cache_and_an_empty_disk_are_accepted(server, shards, tmp_path):
    (tmp_path / "cache" / "lost+found").mkdir(parents=True)
    for _ in range(2):
        assert read(
            RemoteStore(server.url, cache_of(tmp_path), PATIENCE), shards[0]
        ) == content(0)


def test_checksums_are_compared_if_requested(store, server, shards, folder, tmp_path):
    store.check(shards, checksums=True)
    assert len(cached(tmp_path)) == 6
    damaged = next((tmp_path / "cache").glob("*/shards/*train-000002.tar"))
    damaged.write_bytes(content(99))
    store.check(shards, checksums=True)
    assert damaged.read_bytes() == content(2)
    (folder / "train-000005.tar").write_bytes(content(99))
    with pytest.raises(UserError, match=r"train-000005\.tar must have sha256 .*, got "):
        LocalStore(str(folder)).check(shards, checksums=True)
    LocalStore(str(folder)).check(shards)


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "pipe:touch {ran}",
        "pipe:touch {ran} {{file}}",
        "pipe:",
        "simplecache::file://{ran}",
        "reference://::file://{ran}",
        "filecache::reference://::http://host/x",
        "file://{ran}::reference://x",
        "reference://{ran}",
        "dir://{ran}",
        "zip://{ran}",
    ],
)
def test_an_address_never_runs_a_command_and_names_one_file_system(tmp_path, address):
    with pytest.raises(
        UserError, match=r"never run\. Copy the shards|must (name one|begin with its)"
    ):
        load_index(
            address.format(ran=tmp_path / "ran"), "train", CacheOptions(tmp_path / "cache")
        )
    assert not list(tmp_path.iterdir())


def test_a_path_is_a_local_store_and_an_address_is_not(tmp_path):
    assert open_store(tmp_path) == LocalStore(str(tmp_path))
    assert open_store("data/mine").root == "data/mine"
    assert open_store("HTTP://host/data/").root == "http://host/data/"


def test_an_unknown_protocol_or_a_missing_package_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"protocol of fsspec .* got nosuch"):
        open_store("nosuch://user:pw@bucket/x")
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(
            UserError,
            match=r"package for gs:// is not installed\. Run pip install gcsfs",
        ):
            open_store("gs://bucket/x")
