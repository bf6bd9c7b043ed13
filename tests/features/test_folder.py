"""Test that cached features give the same batches as video, and that damage is an error.

The real writer creates them, but without an encoder.
"""

import dataclasses
import gc
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from flallm_ds.batch import FeatureBatch
from flallm_ds.data.index import Index, load_index, read_manifest
from flallm_ds.data.loader import BrokenClips, Loader, open_loader
from flallm_ds.data.mixture import open_indexes
from flallm_ds.data.plan import Plan
from flallm_ds.data.readers import FeatureReader
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.errors import RankError, UserError
from flallm_ds.features.facts import OPTIONS, from_npy, to_npy
from flallm_ds.features.folder import FeatureFolder, share
from flallm_ds.features.sequences import FeatureMasks, resample, resampled_lengths
from flallm_ds.sharding.preview import preview
from flallm_ds.sharding.verify import verify
from tests.helpers.http_server import Server

WIDTH, VIEWS = 6, 3
SAMPLING = FrameSampling(2)
VALUES = {"keep_every": 2, "target_fps": None, "max_frames": 512, "cap": "uniform"}
VALUES |= {"frame_size": 32, "crop_size": 28, "augment": True}


def features_of(index: Index, row: int, view: int, dtype: str = "float32") -> np.ndarray:
    """Return (S, WIDTH) numbers that identify split, row, view and place."""
    kept = SAMPLING.num_kept(index.num_frames[[row]], index.arrays["fps"][[row]])[0]
    places = np.arange(kept * WIDTH).reshape(kept, WIDTH) / 1000
    of_split = 0 if index.split == "train" else 0.5
    return (places + row + 100 * view + of_split).astype(dtype)


def rows_by_key(index: Index) -> dict[str, int]:
    return {key: row for row, key in enumerate(index.strings("key"))}


def keys_of(batches) -> list[str]:
    """Return the keys of all clips in order."""
    found = []
    for batch in batches:
        found += batch.keys
    return found


def clips_of(batch: FeatureBatch):
    """Return (key, features_SD) of each clip of a batch."""
    parts = torch.split(batch.features_ND, batch.num_frames_B.tolist())
    return zip(batch.keys, parts, strict=True)


def times_by_tar(folder: Path) -> dict[str, int]:
    """Return when each tar was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def write(source: Path, out: Path, dtype: str = "float32", splits=("train", "dev")) -> Path:
    assert set(VALUES) == set(OPTIONS)
    sources = {split: load_index(source, split) for split in splits}
    folder = FeatureFolder(out, sources, {"train": VIEWS, "dev": 1})
    folder.begin({"data.keep_every": 2})
    for job in folder.left():
        clips = []
        for row in job.rows.tolist():
            clips.append(features_of(sources[job.split], row, job.view, dtype))
        folder.write(job, clips)
    facts = {
        "source": str(source),
        "encoder": "ab" * 32,
        "made_by": "runs/visual",
        "width": WIDTH,
    }
    folder.finish(
        facts | {"dtype": dtype, "options": VALUES, "seed": 0}, read_manifest(source)
    )
    folder.end()
    return out


@pytest.fixture(scope="module")
def features(tiny_corpus: Path, tmp_path_factory) -> Path:
    return write(tiny_corpus / "shards", tmp_path_factory.mktemp("features") / "features")


@pytest.fixture
def copy(features: Path, tmp_path: Path) -> Path:
    """Copy the features, for a test that damages them."""
    return Path(shutil.copytree(features, tmp_path / "features"))


def batches(shards, epoch=0, split="train", **more):
    loader = open_loader(
        shards, split, sampling=SAMPLING, epoch=epoch, train=split == "train", **more
    )
    return list(loader)


# --- the same batches as on video


def test_the_index_has_the_rows_of_the_video_in_the_same_order(features, tiny_corpus):
    video = load_index(tiny_corpus / "shards", "train")
    cached = load_index(features, "train")
    assert cached.fingerprint == video.fingerprint
    for name in (
        "shard",
        "num_frames",
        "fps",
        "height",
        "width",
        "key",
        "text",
        "text_ends",
    ):
        assert np.array_equal(cached.arrays[name], video.arrays[name]), name
    assert (cached.corpus, cached.options, cached.frame_hw) == (
        video.corpus,
        video.options,
        video.frame_hw,
    )
    assert len(cached.shards) == VIEWS * len(video.shards) and cached.num_shards == len(
        video.shards
    )


@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 7])
def test_an_epoch_reads_its_view_in_the_batches_of_video(features, tiny_corpus, epoch):
    index = load_index(features, "train")
    row_of = rows_by_key(index)
    video, cached = batches(tiny_corpus / "shards", epoch), batches(features, epoch)
    for ours, theirs in zip(cached, video, strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.num_frames_B, theirs.num_frames_B)
        assert torch.equal(ours.draws_B9, theirs.draws_B9)
        assert ours.texts == theirs.texts and ours.languages == theirs.languages
        assert isinstance(ours, FeatureBatch) and ours.features_ND.dtype == torch.float32
        for key, part in clips_of(ours):
            expected = features_of(index, row_of[key], epoch % VIEWS)
            assert np.array_equal(part.numpy(), expected)


def test_evaluation_reads_its_own_view_longest_first(features, tiny_corpus):
    index = load_index(features, "dev")
    row_of = rows_by_key(index)
    video = batches(tiny_corpus / "shards", split="dev")
    cached = batches(features, split="dev")
    for ours, theirs in zip(cached, video, strict=True):
        assert ours.keys == theirs.keys
        for key, part in clips_of(ours):
            assert np.array_equal(part.numpy(), features_of(index, row_of[key], 0))


def test_the_default_sampling_is_that_of_the_features(features):
    (first, *_) = open_loader(features)
    assert first.features_ND.shape == (int(first.num_frames_B.sum()), WIDTH)


def test_features_in_float16_are_loaded_in_float16(features, tiny_corpus, tmp_path):
    half = write(tiny_corpus / "shards", tmp_path / "half", "float16")
    for ours, whole in zip(batches(half), batches(features), strict=True):
        assert ours.features_ND.dtype == torch.float16
        assert torch.equal(ours.features_ND, whole.features_ND.half())


def test_several_folders_are_mixed_as_their_videos_are(
    features, tiny_corpus, second_corpus, tmp_path
):
    second = write(second_corpus, tmp_path / "second")
    weights = (1.0, 1.0)
    for epoch in (0, 1, 5):
        video = batches([tiny_corpus / "shards", second_corpus], epoch, weights=weights)
        cached = batches([features, second], epoch, weights=weights)
        for ours, theirs in zip(cached, video, strict=True):
            assert ours.keys == theirs.keys
            assert torch.equal(ours.draws_B9, theirs.draws_B9)


def test_each_pass_of_a_mixture_reads_the_next_view(features, second_corpus, tmp_path):
    second = write(second_corpus, tmp_path / "second")
    index = open_indexes([features, second], "train")
    loader = open_loader([features, second], sampling=SAMPLING, weights=(1, 1), epoch=1)
    rows, passes = loader.plan.order, loader.plan.passes
    assert passes[index.arrays["corpus"][rows] == 1].max() >= 2, "the small one is repeated"
    alone = {}
    for number, root in enumerate((features, second)):
        one = load_index(root, "train")
        for row, key in enumerate(one.strings("key")):
            alone[f"{number}_{key}"] = one, row
    for step, (batch,) in enumerate(loader.steps()):
        (places,) = loader.plan.places_of(step)
        for place, (key, part) in zip(places, clips_of(batch), strict=True):
            one, row = alone[key]
            expected = features_of(one, row, int(passes[place]) % VIEWS)
            assert np.array_equal(part.numpy(), expected)


def test_a_clip_of_a_mixture_has_the_draws_that_it_has_alone(tiny_corpus, second_corpus):
    alone = open_loader([second_corpus], sampling=SAMPLING).reader
    roots = [tiny_corpus / "shards", second_corpus]
    mixed = open_loader(roots, sampling=SAMPLING).reader
    begin = len(mixed.index) - len(alone.index)
    for row in range(len(alone.index)):
        both = zip(mixed.draws(begin + row, 3), alone.draws(row, 3), strict=True)
        for ours, theirs in both:
            assert np.array_equal(ours, theirs)


def test_video_and_features_are_not_mixed(features, second_corpus):
    with pytest.raises(
        UserError,
        match=r"all video or all cached features, got video in .*second.* and features in ",
    ):
        open_indexes([second_corpus, features], "train")


# --- the format of a tar


def test_plain_webdataset_and_numpy_can_read_a_tar(features):
    index = load_index(features, "train")
    tar = features / "train-000001.view2.tar"
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode())
    rows = np.flatnonzero(index.arrays["shard"] == 1)
    assert [s["__key__"] for s in samples] == [index.strings("key")[row] for row in rows]
    for row, sample in zip(rows, samples, strict=True):
        assert np.array_equal(sample["npy"], features_of(index, row, 2))
        assert sample["json"]["text"] == index.strings("text")[row]


def test_a_member_must_be_in_the_plain_format_of_numpy(tmp_path):
    features_SD = np.arange(6, dtype=np.float32).reshape(3, 2)
    member = to_npy(features_SD)
    (tmp_path / "one.npy").write_bytes(member)
    assert np.array_equal(np.load(tmp_path / "one.npy", allow_pickle=False), features_SD)
    assert np.array_equal(from_npy(memoryview(member), (3, 2), "float32"), features_SD)
    wrong = {
        r"shape \(3, 2\), got .*'shape': \(2, 3\)": to_npy(features_SD.T),
        "float32 of shape .*'<f8'": to_npy(features_SD.astype(np.float64)),
        r"float32 of shape .*'\|O'": to_npy_of_objects(),
        "got 151 bytes": member[:-1],
        "numpy's format 1.0": member[:100],
        "numpy's format": b"RIFF" + member,
        "finite": to_npy(np.full((3, 2), np.nan, np.float32)),
    }
    for word, content in wrong.items():
        with pytest.raises(ValueError, match=word):
            from_npy(memoryview(content), (3, 2), "float32")
    huge = member.replace(b"(3, 2), }" + 11 * b" ", b"(3, 99999999999), }" + b" ")
    assert len(huge) == len(member) and b"99999999999" in huge
    with pytest.raises(ValueError, match=r"'shape': \(3, 99999999999\)"):
        from_npy(memoryview(huge), (3, 2), "float32")


def test_many_threads_can_read_members_at_once():
    """numpy parses headers with `ast`, which fails if another thread runs meanwhile; here a
    callback of the garbage collector lets them run."""
    member = memoryview(to_npy(np.arange(6, dtype=np.float32).reshape(3, 2)))
    thresholds = gc.get_threshold()

    def let_others_run(*_) -> None:
        time.sleep(0)

    gc.set_threshold(20)
    gc.callbacks.append(let_others_run)
    try:
        with ThreadPoolExecutor(4) as pool:
            many = [pool.submit(from_npy, member, (3, 2), "float32") for _ in range(200)]
            assert all(np.array_equal(one.result()[2], (4, 5)) for one in many)
    finally:
        gc.callbacks.remove(let_others_run)
        gc.set_threshold(*thresholds)


def to_npy_of_objects() -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, np.array([[1, "a"], [2, "b"], [3, "c"]], dtype=object), allow_pickle=True)
    return file.getvalue()


# --- broken features, remote ones


def test_broken_features_are_replaced_and_counted_like_broken_clips(copy, tiny_corpus):
    index = load_index(copy, "train")
    row = 13
    tar = copy / index.tar(row, 1).file
    with tar.open("r+b") as file:
        file.seek(int(index.arrays["offset"][row]) + 200)
        file.write(np.float32(np.nan).tobytes())
    key, following = index.strings("key")[row], index.strings("key")[row + 1]
    for epoch in (0, 2):
        assert key in keys_of(batches(copy, epoch))
    loader = open_loader(copy, sampling=SAMPLING, epoch=1)
    keys = keys_of(loader)
    assert key not in keys and keys.count(following) == 2
    assert list(loader.broken.reasons) == [key]
    with pytest.raises(RankError, match=f"Cannot decode clip {key} .*must be finite"):
        none = Loader(loader.reader, loader.plan, broken=BrokenClips(0))
        list(none)


def test_a_clip_that_is_broken_in_all_views_counts_once(copy, tiny_corpus):
    """On video, a run reads the same bytes in every epoch."""
    index = load_index(copy, "train")
    for view in range(VIEWS):
        with (copy / index.tar(13, view).file).open("r+b") as file:
            file.seek(int(index.arrays["offset"][13]) + 200)
            file.write(np.float32(np.nan).tobytes())
    broken = BrokenClips(1)
    for epoch in range(VIEWS):
        loader = open_loader(copy, sampling=SAMPLING, epoch=epoch)
        list(Loader(loader.reader, loader.plan, broken=broken))
    assert len(broken.reasons) == 1


def test_a_missing_view_is_found_at_the_start(copy):
    (copy / "train-000002.view1.tar").unlink()
    index = load_index(copy, "train")
    with pytest.raises(
        UserError, match=r"train-000002\.view1\.tar must have .* got no file"
    ):
        index.check_files()


def test_features_at_an_address_give_the_batches_of_the_folder(
    features, tmp_path, monkeypatch
):
    monkeypatch.setenv("FLALLM_CACHE", str(tmp_path / "cache"))
    with Server(features) as server:
        for ours, theirs in zip(batches(server.url, 1), batches(features, 1), strict=True):
            assert ours.keys == theirs.keys and torch.equal(
                ours.features_ND, theirs.features_ND
            )
    names = sorted(p.name.split("-", 1)[1] for p in (tmp_path / "cache").rglob("*.tar"))
    # Only the view of the epoch is fetched.
    assert names == [f"train-{number:06d}.view1.tar" for number in range(5)]


def test_an_index_with_wrong_facts_of_features_is_an_error(copy):
    manifest = json.loads((copy / "index.json").read_text())
    for change in (
        {"dtype": "object"},
        {"views": 2},
        {"odd": 1},
        {"width": 0.5},
        {"options": {}},
    ):
        (copy / "index.json").write_text(
            json.dumps(manifest | {"features": manifest["features"] | change})
        )
        with pytest.raises(
            UserError, match=r"must describe the features.*launch/features\.py"
        ):
            load_index(copy, "train")


# --- wrong values in index.json


@pytest.mark.parametrize(
    "change",
    [
        {"width": 10**9},
        {"width": 0},
        {"width": True},
        {"seed": -1},
        {"source": None},
        {"encoder": 3},
        {"options": {"keep_every": 0}},
        {"options": {"keep_every": "4"}},
        {"options": {"max_frames": 2.5}},
        {"options": {"target_fps": float("nan")}},
        {"options": {"target_fps": -1}},
        {"options": {"target_fps": "25"}},
        {"options": {"cap": "even"}},
        {"options": {"cap": ["uniform"]}},
    ],
    ids=str,
)
def test_impossible_values_are_an_error(copy, change):
    manifest = json.loads((copy / "index.json").read_text())
    own = manifest["features"]
    if "options" in change:
        change = {"options": own["options"] | change["options"]}
    (copy / "index.json").write_text(json.dumps(manifest | {"features": own | change}))
    with pytest.raises(UserError, match=r"must describe the features.*launch/features\.py"):
        load_index(copy, "train")


def test_a_width_that_does_not_fit_the_bytes_is_found_at_the_start(copy):
    manifest = json.loads((copy / "index.json").read_text())
    manifest["features"]["width"] *= 4
    (copy / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError,
        match=r"size must be at least [\d,]+ for [\d,]+ features of width .* row 0",
    ):
        load_index(copy, "train")


def test_verify_reads_features_and_finds_broken_ones(copy, capsys):
    verify(copy, workers=1)
    assert "all is well: 49 clips" in capsys.readouterr().out
    tar = sorted(copy.glob("train-*.view1.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[512 + 200 : 512 + 204] = np.float32(np.nan).tobytes()
    tar.write_bytes(content)
    with pytest.raises(UserError, match=r"2 fault"):
        verify(copy, workers=1)
    assert "is broken: features must be finite" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"--repair must be given video shards.*launch/features\.py"
    ):
        verify(copy, workers=1, repair="drop")


def test_preview_refuses_features(features, tmp_path):
    with pytest.raises(
        UserError,
        match=r"preview\.py must be given video shards, got .* with cached features of ",
    ):
        preview(features, out=tmp_path / "sheet")


# --- the folder during the writing


def test_the_same_command_writes_the_same_bytes(features, tiny_corpus, tmp_path):
    again = write(tiny_corpus / "shards", tmp_path / "again")
    names = {p.name for p in features.iterdir()}
    assert names == {p.name for p in again.iterdir()}
    for name in names - {".begun"}:
        assert (again / name).read_bytes() == (features / name).read_bytes(), name


def test_only_a_deleted_tar_is_written_again(copy, tiny_corpus):
    path = copy / "train-000003.view0.tar"
    content = path.read_bytes()
    path.unlink()
    others = times_by_tar(copy)
    write(tiny_corpus / "shards", copy)
    assert path.read_bytes() == content
    assert others.items() <= times_by_tar(copy).items()


def test_another_plan_other_content_and_a_second_writer_are_refused(
    features, tmp_path, tiny_corpus
):
    sources = {"train": load_index(tiny_corpus / "shards", "train")}
    with pytest.raises(UserError, match=r"\(data\.keep_every 2, got 4\).*--out"):
        FeatureFolder(features, sources, {"train": 1}).begin({"data.keep_every": 4})
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="with other content"):
        FeatureFolder(tmp_path, sources, {"train": 1}).begin({"data.keep_every": 4})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    first = FeatureFolder(tmp_path / "out", sources, {"train": 1})
    second = FeatureFolder(tmp_path / "out", sources, {"train": 1})
    first.begin({})
    with pytest.raises(UserError, match="is in use by another command"):
        second.begin({})
    first.end()
    second.begin({})
    second.end()


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_ranks_share_all_tars_in_consecutive_parts(tiny_corpus, tmp_path, world_size):
    train, dev = (load_index(tiny_corpus / "shards", split) for split in ("train", "dev"))
    sources = {"train": train, "dev": dev}
    jobs = FeatureFolder(tmp_path, sources, {"train": VIEWS, "dev": 1}).jobs()
    sizes = {"train": train.num_frames, "dev": dev.num_frames}
    names, loads, largest = [], [], 0
    for rank in range(world_size):
        load = 0
        for job in share(jobs, sizes, rank, world_size):
            frames = int(sizes[job.split][job.rows].sum())
            names.append(job.name)
            load += frames
            largest = max(largest, frames)
        loads.append(load)
    assert names == [job.name for job in jobs]
    if world_size < 4:
        assert max(loads) - min(loads) <= largest


# --- another frame rate


def test_resampled_features_have_the_lengths_of_the_plan(features):
    index = load_index(features, "train")
    reader = FeatureReader(index, SAMPLING, 0, True, feature_fps=5.0)
    lengths = reader.num_places()
    assert (lengths < dataclasses.replace(reader, feature_fps=None).num_places()).all()
    row_of = rows_by_key(index)
    for batch in Loader(reader, reader.plan(batch_clips=8, num_micro_batches=2).epoch(0)):
        for key, part in clips_of(batch):
            stored = torch.from_numpy(features_of(index, row_of[key], 0))[None]
            expected, (expected_length,) = resample(
                stored, torch.tensor([stored.shape[1]]), 12.5, 5.0
            )
            assert len(part) == expected_length == lengths[row_of[key]]
            assert torch.allclose(part, expected[0], atol=1e-4)


def test_resampled_lengths_are_those_of_resample():
    rng = np.random.default_rng(0)
    lengths, rates = (
        rng.integers(1, 300, 200),
        rng.choice([6.25, 7.5, 12.5, 14.985, 25, 30, 50], 200),
    )
    for to_fps in (5.0, 12.5, 25.0):
        foreseen = resampled_lengths(lengths, rates, to_fps)
        for length, rate, expected in zip(
            lengths.tolist(), rates.tolist(), foreseen.tolist(), strict=True
        ):
            _, (got,) = resample(
                torch.zeros(1, length, 1), torch.tensor([length]), rate, to_fps
            )
            assert got == expected


def test_a_rate_that_is_too_low_is_an_error(features):
    with pytest.raises(UserError, match=r"to data\.feature_fps=0\.1: .*24 times"):
        FeatureReader(
            load_index(features, "train"), SAMPLING, 0, True, feature_fps=0.1
        ).num_places()


def test_rates_of_kept_frames_follow_the_stride_and_the_cap():
    num, fps = np.array([100, 100, 40]), np.array([25.0, 50.0, 25.0])
    assert FrameSampling(4).rates(num, fps).tolist() == [6.25, 12.5, 6.25]
    assert FrameSampling(1, target_fps=12.5).rates(num, fps).tolist() == [12.5, 12.5, 12.5]
    assert FrameSampling(2, max_frames=25).rates(num, fps).tolist() == [6.25, 12.5, 12.5]


# --- masks


def masked(lengths: list[int], draws: torch.Tensor, **more: int) -> list[torch.Tensor]:
    masks = FeatureMasks(
        **{"times": 2, "time_width": 4, "channels": 1, "channel_width": 5} | more
    )
    out = masks(torch.ones(sum(lengths), 16), torch.tensor(lengths), draws)
    return list(torch.split(out, lengths))


def test_masks_of_a_clip_come_from_its_draws_alone():
    torch.manual_seed(0)
    draws = torch.rand(3, 9)
    state = torch.get_rng_state()
    together = masked([20, 1, 33], draws)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    for place, length in enumerate((20, 1, 33)):
        (alone,) = masked([length], draws[place : place + 1])
        assert torch.equal(alone, together[place])
    num_equal = 0
    for _ in range(20):
        (other,) = masked([33], torch.rand(1, 9))
        num_equal += torch.equal(other, together[2])
    assert num_equal < 5


def test_masks_are_spans_of_places_and_channels_up_to_their_width():
    torch.manual_seed(1)
    widths: set[int] = set()
    for _ in range(300):
        (out,) = masked([12], torch.rand(1, 9), times=1)
        times, channels = out.any(dim=1), out.any(dim=0)
        assert torch.equal(out, times[:, None] * channels[None] * 1.0)
        for kept in (times, channels):
            lost = torch.nonzero(~kept).flatten()
            assert len(lost) == 0 or int(lost[-1] - lost[0]) + 1 == len(lost)
        widths.add(int((~times).sum()))
    assert widths == {0, 1, 2, 3, 4}


def test_a_mask_never_covers_a_whole_clip_and_without_masks_nothing_changes():
    torch.manual_seed(2)
    for _ in range(100):
        draws = torch.rand(3, 9)
        for out in masked([1, 2, 3], draws, times=1, time_width=50, channels=0):
            assert out.any()
    features_ND = torch.ones(4, 2)
    assert FeatureMasks()(features_ND, torch.tensor([4]), torch.rand(1, 9)) is features_ND


def plan_of(root: Path) -> Plan:
    index = load_index(root, "train")
    digest = index.features_digest
    shards = index.arrays["shard"]
    return Plan(index.fingerprint, index.num_frames, shards, 0, 8, 2, features=digest)


def test_the_state_of_a_plan_includes_the_digest_of_the_features(features, tiny_corpus):
    video, cached = plan_of(tiny_corpus / "shards"), plan_of(features)
    saved = cached.state(0, 3)
    cached.state(1, 0).check_same_plan(saved)
    with pytest.raises(
        UserError,
        match=r"The features of the data must be '[0-9a-f]{16}' as in the checkpoint, got ''",
    ):
        video.state(0, 0).check_same_plan(saved)
    assert np.array_equal(video.epoch(1).order, cached.epoch(1).order)
    assert dataclasses.replace(video, features="x").state(0, 0).features == "x"
