"""Shards in a plain webdataset pipeline, as docs/data.md shows it."""

import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
import webdataset

from flallm_ds.data.codecs.avi import pack_frames
from flallm_ds.data.codecs.decode import decode_frames, extension_of
from flallm_ds.data.codecs.h264 import encode_h264
from flallm_ds.data.index import load_index
from flallm_ds.data.wds import decode_clip
from tests.helpers.paths import ROOT

HW = (32, 24)


def frames_of(number: int) -> np.ndarray:
    """Return the 5 + number frames of a clip; frame t has the grey value 10 t."""
    return np.stack([np.full((*HW, 3), 10 * t, np.uint8) for t in range(5 + number)])


def facts_of(number: int) -> dict:
    words = {
        "id": f"id.{number}",
        "text": f"satz {number} ä",
        "signer": "anna",
        "video": f"v{number}",
    }
    numbers = {"num_frames": 5 + number, "fps": 25.0, "width": HW[1], "height": HW[0]}
    return words | numbers | {"language": "de", "gloss": "SATZ"}


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def clip_of(number: int, kind: str) -> bytes:
    if kind == "mp4":
        return encode_h264(frames_of(number), 25.0, 4, 10)
    return pack_frames(
        [simplejpeg.encode_jpeg(f, 95) for f in frames_of(number)], 25.0, HW[1], HW[0]
    )


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write four tars of two clips each; every second tar has mp4 members."""
    folder = tmp_path_factory.mktemp("tars")
    tars = []
    for shard in range(4):
        kind = "mp4" if shard % 2 else "avi"
        members = {}
        for number in (2 * shard, 2 * shard + 1):
            members[f"{number:08d}.{kind}"] = clip_of(number, kind)
            members[f"{number:08d}.json"] = json.dumps(facts_of(number)).encode()
        tars.append(write_tar(folder / f"train-{shard:06d}.tar", members))
    return tars


def pipeline(tars: list[str], **options) -> webdataset.WebDataset:
    return webdataset.WebDataset(tars, shardshuffle=False).map(decode_clip(**options))


def test_every_clip_has_its_frames_and_its_json(tars):
    clips = list(pipeline(tars))
    assert [clip["key"] for clip in clips] == [f"{n:08d}" for n in range(8)]
    for number, clip in enumerate(clips):
        assert {name: clip[name] for name in facts_of(number)} == facts_of(number)
        assert clip["__key__"] == clip["key"] and clip["__url__"] == tars[number // 2]
        assert clip["frames"].dtype == np.uint8 and clip["frames"].shape == (
            5 + number,
            *HW,
            3,
        )
        assert np.abs(clip["frames"].astype(int) - frames_of(number)).max() <= 3


@pytest.mark.parametrize(
    ("options", "picks"),
    [
        ({"keep_every": 4}, [0, 4, 8]),
        ({"keep_every": 2, "max_frames": 3}, [0, 4, 8]),
        ({"target_fps": 12.5}, [0, 2, 4, 6, 8, 10]),
        ({"max_frames": 4, "cap": "segment"}, [1, 4, 7, 10]),
    ],
)
def test_frames_are_picked_before_decoding(tars, options, picks):
    clip = list(pipeline(tars, **options))[7]
    assert clip["num_frames"] == 12
    assert clip["frames"].mean(axis=(1, 2, 3)).round(-1).tolist() == [
        10 * n for n in clip["picks"]
    ]
    assert clip["picks"].tolist() == picks


def test_training_draws_a_frame_of_each_group_from_pythons_random(tars):
    def draw(seed: int) -> list[list[int]]:
        random.seed(seed)
        return [clip["picks"].tolist() for clip in pipeline(tars, keep_every=4, train=True)]

    assert draw(0) == draw(0) != draw(1)
    for picks, num_frames in zip(draw(0), range(5, 13), strict=True):
        assert [n // 4 for n in picks] == list(range((num_frames + 3) // 4)) and picks[
            -1
        ] < num_frames


@pytest.mark.parametrize(("method", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_a_data_loader_decode(tars, method, num_workers):
    loader = torch.utils.data.DataLoader(
        pipeline(tars, keep_every=2, train=True),
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=method,
        persistent_workers=True,
    )
    epochs = [{clip["key"]: clip for clip in loader} for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == [f"{n:08d}" for n in range(8)]
        for clip in epoch.values():
            grey = np.asarray(clip["frames"]).mean(axis=(1, 2, 3)).round(-1)
            assert (grey == 10 * np.asarray(clip["picks"])).all()
    drawn = [
        np.concatenate([np.asarray(epoch[key]["picks"]) for key in sorted(epoch)])
        for epoch in epochs
    ]
    assert (drawn[0] != drawn[1]).any()


def test_real_shards_give_the_clips_of_the_index(tiny_corpus):
    shards = tiny_corpus / "shards"
    index = load_index(shards, "dev")
    tars = [str(shards / shard.file) for shard in index.shards]
    clips = list(pipeline(tars, keep_every=4))
    assert [clip["key"] for clip in clips] == list(index.strings("key"))
    assert [clip["text"] for clip in clips] == list(index.strings("text"))
    for row, clip in enumerate(clips):
        path = shards / index.shards[int(index.arrays["shard"][row])].file
        member = path.read_bytes()[int(index.arrays["offset"][row]) :][
            : int(index.arrays["size"][row])
        ]
        expected = np.empty_like(clip["frames"])
        decode_frames(
            member,
            np.arange(0, clip["num_frames"], 4),
            clip["num_frames"],
            expected,
            (79, 64),
        )
        assert (clip["frames"] == expected).all()


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_nothing_is_unpickled(tmp_path):
    bomb = pickle.dumps(_Bomb(tmp_path / "exploded"))
    strange = {
        "a.avi": clip_of(0, "avi"),
        "a.json": json.dumps(facts_of(0)).encode(),
        "a.pkl": bomb,
    }
    strange |= {"a.pth": bomb, "b.avi": bomb, "b.json": json.dumps(facts_of(1)).encode()}
    clips = iter(pipeline([write_tar(tmp_path / "strange.tar", strange)]))
    first = next(clips)
    assert set(first) == {
        *facts_of(0),
        "key",
        "frames",
        "picks",
        "__key__",
        "__url__",
        "__local_path__",
    }
    with pytest.raises(ValueError, match=r"Cannot decode b of .*strange\.tar: .* AVI"):
        next(clips)
    assert not (tmp_path / "exploded").exists()


BAD_JSON = {
    "not JSON": b"{",
    "not UTF-8": b'{"text": "\xff"}',
    "no object": b"[1]",
    "no text": json.dumps({k: v for k, v in facts_of(0).items() if k != "text"}).encode(),
    "a string as a number": json.dumps(facts_of(0) | {"num_frames": "5"}).encode(),
    "other frames": json.dumps(facts_of(0) | {"num_frames": 6}).encode(),
    "no frames": json.dumps(facts_of(0) | {"num_frames": 0}).encode(),
    "too many frames": json.dumps(facts_of(0) | {"num_frames": 10**15}).encode(),
    "another size": json.dumps(facts_of(0) | {"width": 32}).encode(),
    "a huge size": json.dumps(facts_of(0) | {"width": 10**9, "height": 10**9}).encode(),
    "a negative size": json.dumps(facts_of(0) | {"width": -1}).encode(),
}


@pytest.mark.parametrize("bad", BAD_JSON.values(), ids=BAD_JSON)
def test_a_damaged_clip_is_named_and_can_be_skipped(tmp_path, bad):
    members = {"a.avi": clip_of(0, "avi"), "a.json": bad}
    members |= {"b.avi": clip_of(1, "avi"), "b.json": json.dumps(facts_of(1)).encode()}
    tar = write_tar(tmp_path / "train.tar", members)
    with pytest.raises(ValueError, match=r"Cannot decode a of .*train\.tar: "):
        list(pipeline([tar]))
    tolerant = webdataset.WebDataset([tar], shardshuffle=False).map(
        decode_clip(), handler=webdataset.ignore_and_continue
    )
    assert [clip["key"] for clip in tolerant] == ["b"]


def test_the_error_of_a_sample_without_a_clip_lists_its_members(tmp_path):
    members = {"a.png": b"?", "a.json": json.dumps(facts_of(0)).encode()}
    with pytest.raises(ValueError, match=r"must have a member avi or mp4, got .*png"):
        list(pipeline([write_tar(tmp_path / "train.tar", members)]))
    decoded = webdataset.WebDataset(
        [str(tmp_path / "train.tar")], shardshuffle=False
    ).decode(only="json")
    with pytest.raises(ValueError, match=r"without \.decode\(\)"):
        list(decoded.map(decode_clip()))


def test_impossible_values_are_refused_at_once():
    with pytest.raises(ValueError, match="keep_every"):
        decode_clip(keep_every=0)


def test_the_loop_of_the_documentation_runs(tiny_corpus, tmp_path):
    """Run the code block of docs/data.md as it is, with shards at the path that it names."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    code = (
        text.split("### With a plain webdataset pipeline")[1]
        .split("```python\n")[1]
        .split("```")[0]
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(tiny_corpus / "shards")
    (tmp_path / "loop.py").write_text(
        code + "\nprint(clip['frames'].shape, webdataset.utils.enforce_security)\n"
    )
    done = subprocess.run(
        [sys.executable, "loop.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2].endswith("79, 64, 3]) True")


def test_importing_the_decoder_imports_no_large_package():
    script = (
        "import sys, flallm_ds.data.wds\nprint(*[name for name in ('torch', 'av', 'cv2', "
        "'webdataset') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_the_extension_of_a_member_follows_its_format():
    assert [extension_of(clip_of(0, kind)) for kind in ("avi", "mp4")] == ["avi", "mp4"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_frames": 10**9},
        {"num_frames": 0},
        {"num_frames": -5},
        {"height": 65_535, "width": 65_535},
        {"height": -1},
        {"width": 0},
        {"fps": float("nan")},
        {"fps": float("inf")},
        {"fps": -25},
        {"fps": 0},
    ],
    ids=str,
)
def test_a_number_out_of_range_in_the_json_is_a_damaged_clip(tmp_path, wrong):
    members = {
        "a.avi": clip_of(0, "avi"),
        "a.json": json.dumps(facts_of(0) | wrong).encode(),
    }
    tar = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(
        ValueError, match=f"a of .*{next(iter(wrong))} in the JSON must be from"
    ):
        list(pipeline([tar], target_fps=12.5))


def test_a_deeply_nested_json_is_a_damaged_clip(tmp_path):
    tar = write_tar(
        tmp_path / "a.tar", {"a.avi": clip_of(0, "avi"), "a.json": b"[" * 10**6}
    )
    with pytest.raises(ValueError, match="Cannot decode a of"):
        list(pipeline([tar]))
