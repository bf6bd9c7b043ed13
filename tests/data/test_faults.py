"""When something is broken: each line of the table in docs/data_way.md, on real shards."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import simplejpeg

from flallm_ds.batch import Batch
from flallm_ds.data.index import Index, load_index
from flallm_ds.data.loader import BrokenClips, Loader, open_loader
from flallm_ds.data.plan import Plan
from flallm_ds.data.storage.fetch import Patience
from flallm_ds.data.storage.store import CacheOptions, LocalStore, RemoteStore, Shard
from flallm_ds.errors import RankError, UserError
from flallm_ds.sharding.verify import verify
from flallm_ds.sharding.writer import SHARD_NAME, ShardWriter, write_index
from tests.helpers.http_server import Server

NUM_CLIPS = 2000
PATIENCE = Patience(
    attempts=4, first_wait_s=0.01, longest_wait_s=0.02, total_s=10, connect_s=2, stall_s=0.5
)


def write_shards(folder: Path, num_clips: int, clips_per_shard: int = 100) -> Path:
    """Shards of the real writer; clips of 6 to 8 frames of 32x32 pixels, each another colour."""
    folder.mkdir()
    rows, tars = [], []
    for first in range(0, num_clips, clips_per_shard):
        path = folder / SHARD_NAME.format(split="train", number=len(tars))
        with ShardWriter(path, len(tars)) as tar:
            for number in range(first, min(first + clips_per_shard, num_clips)):
                frame = np.full((32, 32, 3), number % 251, np.uint8)
                jpegs = [simplejpeg.encode_jpeg(frame, 90)] * (6 + number % 3)
                facts = {
                    "id": str(number),
                    "text": f"satz {number}",
                    "signer": "",
                    "video": "",
                    "language": "de",
                }
                rows.append(
                    tar.add(f"{number:08d}", jpegs, fps=25.0, height=32, width=32, **facts)
                )
        tars.append(tar.shard_entry)
    write_index(
        folder, corpus="toy", language="de", options={}, splits={"train": (rows, tars)}
    )
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("faults") / "shards", NUM_CLIPS)


@pytest.fixture
def shards(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def loader_of(index: Index, max_broken: int) -> Loader:
    plan = Plan(index.fingerprint, index.num_frames, index.arrays["shard"], 0, 50, 2)
    loader = open_loader(index.root, batch_clips=50)
    return Loader(
        replace(loader.reader, index=index),
        plan.epoch(0),
        threads=2,
        broken=BrokenClips(max_broken),
    )


def break_clips(folder: Path, rows: list[int]) -> None:
    index = load_index(folder, "train")
    for row in rows:
        path = index.shard_path(int(index.arrays["shard"][row]))
        with path.open("r+b") as file:
            file.seek(int(index.arrays["offset"][row]))
            file.write(bytes(64))


def all_keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def digest(batches: list[Batch]) -> str:
    content = hashlib.sha256()
    for batch in batches:
        content.update(repr(batch.keys).encode() + batch.frames_NHWC.numpy().tobytes())
    return content.hexdigest()


# --- shards


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_shard_is_found_at_the_start(shards, damage):
    path = shards / "train-000003.tar"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-700])
    index = load_index(shards, "train")
    with pytest.raises(
        UserError, match=r"train-000003.tar must have .* bytes as its index says"
    ):
        index.store.check(index.shards)


def test_a_flipped_byte_is_found_by_verify_and_by_check_shards(shards):
    index = load_index(shards, "train")
    path = shards / "train-000003.tar"
    content = bytearray(path.read_bytes())
    content[int(index.arrays["offset"][310]) + int(index.arrays["size"][310]) // 2] ^= 4
    path.write_bytes(content)
    index.store.check(index.shards)  # sizes are right
    with pytest.raises(UserError, match=r"train-000003.tar must have sha256"):
        index.store.check(index.shards, checksums=True)
    with pytest.raises(UserError, match=r"train-000003.tar must have the checksum"):
        verify(shards, workers=1)


def test_a_flipped_byte_that_breaks_a_clip_is_replaced_and_any_other_leaves_its_order(
    shards,
):
    """Each byte of a clip in turn: either it is noticed, or the batches hold the same clips."""
    index = load_index(shards, "train")
    path = index.shard_path(0)
    content = path.read_bytes()
    begin, size = int(index.arrays["offset"][5]), int(index.arrays["size"][5])
    out = np.empty((int(index.num_frames[5]), 32, 32, 3), np.uint8)
    reader = open_loader(shards, batch_clips=50).reader
    noticed = 0
    for place in range(begin, begin + size, 7):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            reader.read_into(out, 5, np.arange(len(out)))
        except ValueError:
            noticed += 1
    assert noticed > size // 7 // 20


def test_a_shard_that_goes_while_it_is_read(shards):
    """What was open stays readable; the rest is replaced, until it is too much."""
    index = load_index(shards, "train")
    loader = loader_of(index, max_broken=20)
    steps = iter(loader)
    next(steps)
    (shards / "train-000007.tar").unlink()
    with pytest.raises(
        RankError, match=r"broken clips must be at most 20, got 21.*train-000007.tar"
    ):
        list(steps)


def test_an_index_of_another_build_is_refused(shards, tmp_path):
    other = write_shards(tmp_path / "other", 120)
    shutil.copy(other / "train.safetensors", shards)
    with pytest.raises(UserError, match=r"Cannot use the table of split train"):
        load_index(shards, "train")
    shutil.copy(other / "index.json", shards)
    index = load_index(shards, "train")
    with pytest.raises(UserError, match=r"must have .* bytes as its index says"):
        index.store.check(index.shards)


def test_a_run_is_not_resumed_on_another_build(whole, tmp_path):
    mine, other = (
        load_index(root, "train") for root in (whole, write_shards(tmp_path / "other", 120))
    )
    plans = [
        Plan(i.fingerprint, i.num_frames, i.arrays["shard"], 0, 8, 2) for i in (mine, other)
    ]
    with pytest.raises(UserError, match="The fingerprint of the data must be"):
        plans[1].state(0, 0).check_same_plan(plans[0].state(0, 7))


# --- clips


def test_one_clip_in_a_thousand_is_replaced_and_named(shards, capfd):
    broken = [17, 1234]
    break_clips(shards, broken)
    index = load_index(shards, "train")
    loader = loader_of(index, max_broken=NUM_CLIPS // 100)
    keys = all_keys(list(loader))
    expected = [k for k in index.strings("key") if int(k) not in broken] + [
        f"{row + 1:08d}" for row in broken
    ]
    assert sorted(keys) == sorted(expected)
    assert len(loader.broken.reasons) == 2
    said = capfd.readouterr().out
    assert all(said.count(f"clip {row:08d} in train-") == 1 for row in broken)


def test_one_clip_in_twenty_stops_the_run(shards):
    break_clips(shards, list(range(0, NUM_CLIPS, 20)))
    loader = loader_of(load_index(shards, "train"), max_broken=NUM_CLIPS // 100)
    with pytest.raises(
        RankError, match=r"broken clips must be at most 20, got 21.*verify.py"
    ):
        list(loader)
    assert len(loader.broken.reasons) == 21


# --- slow and dying places


@dataclass(frozen=True)
class SlowDisk(LocalStore):
    """A folder on a disk that takes its time."""

    def open(self, shard: Shard) -> BinaryIO:
        time.sleep(0.002)
        return super().open(shard)


def test_a_slow_disk_gives_the_same_batches(whole):
    index = load_index(whole, "train")
    fast = digest(list(loader_of(index, 0)))
    assert digest(list(loader_of(replace(index, store=SlowDisk(str(whole))), 0))) == fast


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with Server(shards) as server:
        yield server


def remote(index: Index, server: Server, cache: Path) -> Index:
    return replace(index, store=RemoteStore(server.url, CacheOptions(cache), PATIENCE))


def test_a_server_that_fails_now_and_then_gives_the_same_batches(server, shards, tmp_path):
    index = load_index(shards, "train")
    kinds = ["drop", "truncated", "500", "corrupt", "hang up", "stall", "503"]
    for number, shard in enumerate(index.shards):
        server.faults[shard.file] = [kinds[number % len(kinds)]] * (1 + number % 2)
    expected = digest(list(loader_of(index, 0)))
    assert digest(list(loader_of(remote(index, server, tmp_path / "cache"), 0))) == expected
    assert len(list((tmp_path / "cache").glob("*/shards/*.tar"))) == len(index.shards)


def test_a_server_that_dies_ends_the_run_with_its_address(server, shards, tmp_path):
    index = remote(load_index(shards, "train"), server, tmp_path / "cache")
    for shard in index.shards[4:]:
        server.faults[shard.file] = ["drop"] * 1000
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        list(loader_of(index, NUM_CLIPS))
    assert server.url in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - begin < 30


def test_a_shard_that_the_server_has_not_is_told_at_the_start(server, shards, tmp_path):
    index = remote(load_index(shards, "train"), server, tmp_path / "cache")
    (shards / "train-000009.tar").unlink()
    with pytest.raises(UserError, match=r"train-000009.tar"):
        index.store.check(index.shards)


def test_index_json_of_another_format_is_refused(shards):
    manifest = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(
        json.dumps(manifest | {"format": "flallm_ds shards 9"})
    )
    with pytest.raises(UserError, match=r"index\.json must have format"):
        load_index(shards, "train")
