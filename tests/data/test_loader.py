"""The loader against the shards that the real builder wrote, damaged by hand where a test
needs it."""

import asyncio
import io
import multiprocessing
import pickle
import tarfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from flallm_ds.batch import Batch
from flallm_ds.data.codecs.avi import frame_spans, pack_frames
from flallm_ds.data.codecs.decode import FAST
from flallm_ds.data.index import Index, Shard, StringColumn, load_index
from flallm_ds.data.loader import BrokenClips, Loader, open_loader
from flallm_ds.data.mixture import open_indexes
from flallm_ds.data.plan import Plan
from flallm_ds.data.readers import VideoReader, open_reader
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.data.storage.store import LocalStore
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Instruction
from flallm_ds.errors import RankError, UserError

SEED = 3


@pytest.fixture(scope="module")
def codec(tiny_corpus):
    texts = load_index(tiny_corpus / "shards", "train").strings("text")
    return TextCodec.for_training_text(
        str(tiny_corpus / "llm"), Instruction(language="de_DE"), texts, trim=True
    )


@pytest.fixture
def train(tiny_corpus):
    return load_index(tiny_corpus / "shards", "train")


def loader_of(
    index: Index,
    codec: TextCodec | None,
    *,
    batch_clips=8,
    num_micro_batches=2,
    train=True,
    epoch=0,
    weights=(),
    keep_jpegs=False,
    **more,
):
    sampling = FrameSampling(4)
    plan = Plan(
        index.fingerprint,
        sampling.num_kept(index.num_frames, index.arrays["fps"]),
        index.arrays["shard"],
        SEED,
        batch_clips,
        num_micro_batches,
        corpus=index.arrays.get("corpus"),
        weights=weights,
    )
    order = plan.epoch(epoch) if train else plan.in_length_order()
    reader = open_reader(index, sampling, SEED, train, keep_jpegs=keep_jpegs)
    return Loader(reader, order, codec, **more)


def same(a: Batch, b: Batch) -> bool:
    assert type(a) is type(b)
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs
    )


def all_same(first: list[list[Batch]], second: list[list[Batch]]) -> bool:
    return len(first) == len(second) and all(
        len(a) == len(b) and all(map(same, a, b))
        for a, b in zip(first, second, strict=True)
    )


def row_of(index: Index, key: str) -> int:
    return list(index.strings("key")).index(key)


def clip_bytes(index: Index, row: int) -> bytes:
    begin, size = int(index.arrays["offset"][row]), int(index.arrays["size"][row])
    return index.shard_path(int(index.arrays["shard"][row])).read_bytes()[
        begin : begin + size
    ]


def break_clip(index: Index, row: int, at: int = 0) -> None:
    """Overwrite 64 bytes of a clip in its tar."""
    path = index.shard_path(int(index.arrays["shard"][row]))
    content = bytearray(path.read_bytes())
    begin = int(index.arrays["offset"][row]) + at
    content[begin : begin + 64] = bytes(64)
    path.write_bytes(content)


def write_clips(root: Path, clips: list[list[np.ndarray]]) -> Index:
    """A tar and the index of it, for clips of any sizes."""
    members, offsets = [], []
    with tarfile.open(root / "train-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, clip in enumerate(clips):
            jpegs = [
                simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=95)
                for frame in clip
            ]
            members.append(pack_frames(jpegs, 25.0, clip[0].shape[1], clip[0].shape[0]))
            info = tarfile.TarInfo(f"clip{number}.avi")
            info.size = len(members[-1])
            offsets.append(tar.offset + 512)
            tar.addfile(info, io.BytesIO(members[-1]))
    arrays = {
        "shard": np.zeros(len(clips), np.int32),
        "offset": np.array(offsets, np.int64),
        "size": np.array([len(m) for m in members], np.int64),
        "num_frames": np.array([len(c) for c in clips], np.int32),
        "height": np.array([c[0].shape[0] for c in clips], np.int32),
        "width": np.array([c[0].shape[1] for c in clips], np.int32),
        "fps": np.full(len(clips), 25, np.float32),
    }
    columns = {"key": [f"clip{number}" for number in range(len(clips))]}
    columns |= {"text": ["regen morgen"] * len(clips), "language": ["de"] * len(clips)}
    for name, strings in columns.items():
        arrays |= StringColumn.columns(name, strings)
    shard = Shard(
        "train-000000.tar", (root / "train-000000.tar").stat().st_size, "00", len(clips)
    )
    return Index(LocalStore(str(root)), "toy", "train", "ab", (shard,), arrays)


# --- what a batch holds


@pytest.mark.parametrize("mode", ["train", "evaluation"])
def test_packed_frames_are_the_stored_ones_at_the_picked_places(train, codec, mode):
    loader = loader_of(train, codec, train=mode == "train")
    num_checked = 0
    for batch in (b for step in loader.steps() for b in step):
        begins = np.cumsum([0, *batch.num_frames_B.tolist()])
        assert (
            batch.frames_NHWC.shape == (begins[-1], 79, 64, 3)
            and batch.frames_NHWC.dtype == torch.uint8
        )
        for place, key in enumerate(batch.keys):
            row = row_of(train, key)
            draws, picks = loader.reader.draws(row, epoch=0)
            member = clip_bytes(train, row)
            jpegs = [
                member[begin : begin + size] for begin, size in frame_spans(member)[picks]
            ]
            expected = np.stack(
                [simplejpeg.decode_jpeg(jpeg, "RGB", **FAST) for jpeg in jpegs]
            )
            got = batch.frames_NHWC[begins[place] : begins[place + 1]].numpy()
            assert (got == expected).all()
            assert batch.draws_B9[place].tolist() == draws.tolist()
            num_checked += 1
    assert num_checked == 40


def test_texts_and_targets_are_those_of_the_clips(train, codec):
    for batch in (b for step in loader_of(train, codec).steps() for b in step):
        for key, text, ids in zip(
            batch.keys, batch.texts, batch.target_ids_BL.tolist(), strict=True
        ):
            assert text == train.strings("text")[row_of(train, key)]
            assert [i for i in ids if i != -100] == codec.encode(text)
        assert batch.num_target_tokens == sum(
            len(codec.encode(text)) for text in batch.texts
        )
        assert all(batch.real_B)


def test_evaluation_keeps_the_first_frame_of_each_group_and_draws_nothing(train, codec):
    reader = loader_of(train, codec, train=False).reader
    draws, picks = reader.draws(5, epoch=0)
    assert picks.tolist() == list(range(0, int(train.num_frames[5]), 4)) and not draws.any()


def test_training_draws_anew_in_each_epoch(train, codec):
    reader = loader_of(train, codec).reader
    (first, first_picks), (second, second_picks) = reader.draws(5, 0), reader.draws(5, 1)
    assert (
        first.tolist() != second.tolist() and first_picks.tolist() != second_picks.tolist()
    )
    assert ((first >= 0) & (first < 1)).all()


def test_a_long_clip_is_cut_to_max_frames(train):
    reader = VideoReader(train, FrameSampling(max_frames=5), seed=0, train=False)
    _, picks = reader.draws(0, 0)
    assert len(picks) == 5 and picks[0] == 0


def test_clips_of_mixed_sizes_share_a_canvas_and_the_rest_of_it_is_black(codec, tmp_path):
    sizes = [(40, 30), (24, 48), (40, 48)]
    clips = [
        [np.full((h, w, 3), 90 + 40 * i, np.uint8)] * (6 + i)
        for i, (h, w) in enumerate(sizes)
    ]
    index = write_clips(tmp_path, clips)
    (step,) = loader_of(
        index, codec, batch_clips=3, num_micro_batches=1, train=False
    ).steps()
    (batch,) = step
    assert batch.frames_NHWC.shape == (6, 40, 48, 3)
    begins = np.cumsum([0, *batch.num_frames_B.tolist()])
    for place, key in enumerate(batch.keys):
        clip = int(key[-1])
        height, width = sizes[clip]
        assert batch.size_B2[place].tolist() == [height, width]
        frames = batch.frames_NHWC[begins[place] : begins[place + 1]].numpy().astype(int)
        assert abs(frames[:, :height, :width] - (90 + 40 * clip)).max() <= 2
        assert not frames[:, height:].any() and not frames[:, :, width:].any()


# --- the same data everywhere


def test_threads_change_nothing(train, codec):
    one, four = (list(loader_of(train, codec, threads=n).steps()) for n in (1, 4))
    assert all_same(one, four)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_micro_batches_of_one_rank(train, codec, world_size):
    whole = list(loader_of(train, codec, num_micro_batches=4).steps())
    shares = [
        list(
            loader_of(
                train, codec, num_micro_batches=4, rank=rank, world_size=world_size
            ).steps()
        )
        for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {len(whole)}
    joined = [
        [b for rank in range(world_size) for b in shares[rank][step]]
        for step in range(len(whole))
    ]
    assert all_same(joined, whole)


def test_resume_at_every_step_yields_the_same_next_batches(train, codec):
    whole = list(loader_of(train, codec, epoch=1).steps())
    assert len(whole) == 5
    for step in range(6):
        fresh = loader_of(load_index(train.root, "train"), codec, epoch=1, threads=2)
        assert all_same(list(fresh.steps(step)), whole[step:])


@pytest.mark.parametrize("train_mode", [True, False])
@pytest.mark.parametrize("world_size", [3, 7])
def test_any_number_of_ranks_has_equal_steps_and_nothing_is_lost_or_doubled(
    train, codec, world_size, train_mode
):
    """5 shards on 3 or on 7 ranks: the order does not go by shards."""
    shares = [
        list(
            loader_of(
                train,
                codec,
                num_micro_batches=world_size,
                train=train_mode,
                rank=r,
                world_size=world_size,
            ).steps()
        )
        for r in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = [b for share in shares for step in share for b in step]
    keys = [k for b in batches for k, real in zip(b.keys, b.real_B, strict=True) if real]
    assert sorted(keys) == sorted(train.strings("key"))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1)])
def test_resume_at_every_step_by_another_number_of_ranks(train, codec, before, after):
    """What the new ranks yield together is what the old ones would have."""

    def global_steps(world_size: int, start: int) -> list[list[Batch]]:
        shares = [
            list(
                loader_of(
                    train,
                    codec,
                    num_micro_batches=4,
                    epoch=2,
                    rank=r,
                    world_size=world_size,
                ).steps(start)
            )
            for r in range(world_size)
        ]
        return [
            [b for share in shares for b in share[step]] for step in range(len(shares[0]))
        ]

    whole = global_steps(before, 0)
    for step in range(len(whole) + 1):
        assert all_same(global_steps(after, step), whole[step:])


def test_augmentation_draws_belong_to_the_sample_whatever_its_batch(train, codec):
    def draws(**options):
        batches = [b for step in loader_of(train, codec, **options).steps() for b in step]
        return {
            k: d.tolist() for b in batches for k, d in zip(b.keys, b.draws_B9, strict=True)
        }

    assert draws() == draws(batch_clips=3, num_micro_batches=1, threads=3)


def test_epochs_hold_the_same_clips_with_other_frames(train, codec):
    first, second = (
        {
            k
            for step in loader_of(train, codec, epoch=e).steps()
            for b in step
            for k in b.keys
        }
        for e in (0, 1)
    )
    assert first == second and len(first) == 40


def test_a_plain_loop_yields_the_micro_batches(train, codec):
    loader = loader_of(train, codec)
    steps = [b for step in loader.steps() for b in step]
    assert all_same([list(loader)], [steps])


def test_a_loader_without_a_codec_has_no_targets(train):
    batch = next(iter(loader_of(train, None)))
    assert (
        batch.target_ids_BL.shape == (len(batch.keys), 0) and batch.num_target_tokens == 0
    )
    assert len(batch.texts) == len(batch.keys) == len(batch.languages) and set(
        batch.languages
    ) == {"de"}


def _digest(loader: Loader) -> list[tuple[tuple[str, ...], int]]:
    return [(batch.keys, int(batch.frames_NHWC.long().sum())) for batch in loader]


def _send_digest(loader: Loader, queue: "multiprocessing.Queue[object]") -> None:
    queue.put(_digest(loader))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_loader_works_in_another_process(tiny_corpus, method):
    loader = open_loader(tiny_corpus / "shards", batch_clips=5)
    expected = _digest(loader)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_send_digest, args=(loader, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join(10)
    assert process.exitcode == 0


def test_a_loader_works_in_a_notebook(tiny_corpus):
    """There, an event loop is running in the very thread."""

    async def cell() -> list[tuple[tuple[str, ...], int]]:
        return _digest(open_loader(tiny_corpus / "shards", batch_clips=5))

    assert asyncio.run(cell()) == _digest(
        open_loader(tiny_corpus / "shards", batch_clips=5)
    )


def test_a_batch_may_be_kept_while_the_loader_goes_on(train, codec):
    """Memory is used again, but never what somebody still holds."""
    batches = list(loader_of(train, codec, threads=3))
    assert all_same(
        [batches],
        [[replace(b, frames_NHWC=b.frames_NHWC.clone()) for b in loader_of(train, codec)]],
    )


def test_memory_is_used_again(train, codec):
    batches = [
        batch.frames_NHWC.data_ptr() for batch in loader_of(train, codec, batch_clips=2)
    ]
    assert len(batches) == 40 and len(set(batches)) < 20


@pytest.mark.parametrize("num_broken", [0, 1])
def test_an_encoded_batch_decodes_to_the_frames_of_the_other_kind(
    tiny_shards, codec, num_broken
):
    index = load_index(tiny_shards, "train")
    for row in range(11, 11 + num_broken):
        break_clip(index, row)
    decoded = list(loader_of(index, codec, broken=BrokenClips(1)))
    encoded = list(loader_of(index, codec, broken=BrokenClips(1), keep_jpegs=True))
    for batch, jpegs in zip(decoded, encoded, strict=True):
        assert jpegs.frames_NHWC.device.type == "meta"
        frames = np.stack(
            [simplejpeg.decode_jpeg(jpeg, "RGB", **FAST) for jpeg in jpegs.jpegs]
        )
        assert same(jpegs.with_content(torch.from_numpy(frames)), batch)


# --- several corpora


def test_two_corpora_in_one_run_each_clip_knowing_its_own(
    tiny_corpus, second_corpus, codec
):
    index = open_indexes([tiny_corpus / "shards", second_corpus], "train")
    parts = [load_index(root, "train") for root in (tiny_corpus / "shards", second_corpus)]
    assert len(index) == 50 and len(index.shards) == 5 + 3 and index.frame_hw == (79, 64)
    seen = {}
    for batch in loader_of(index, codec):
        sides = batch.frames_NHWC.split(batch.num_frames_B.tolist())
        for place, key in enumerate(batch.keys):
            number, own_key = key.split("_")
            part = parts[int(number)]
            row = row_of(part, own_key)
            height, width = int(part.arrays["height"][row]), int(part.arrays["width"][row])
            assert batch.size_B2[place].tolist() == [height, width]
            assert (
                batch.texts[place] == part.strings("text")[row]
                and batch.corpora[place] == "phoenix14t"
            )
            expected = np.empty((int(part.num_frames[row]), height, width, 3), np.uint8)
            loader_of(part, codec).reader.read_into(expected, row, np.arange(len(expected)))
            frames = sides[place][:, :height, :width].numpy()
            assert all((frame == expected).all(axis=(1, 2, 3)).any() for frame in frames)
            seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 50 and set(seen.values()) == {1}


def test_a_weighted_mixture_resumes_at_every_step_to_the_bit(
    tiny_corpus, second_corpus, codec
):
    index = open_indexes([tiny_corpus / "shards", second_corpus], "train")
    options = {"num_micro_batches": 4, "weights": (0.5, 0.5), "epoch": 3}
    whole = list(loader_of(index, codec, **options).steps())
    keys = [k for step in whole for b in step for k in b.keys if b.real_B[0]]
    assert sum(k.startswith("1_") for k in keys) == 25 and len(keys) == 50
    for step in range(0, len(whole) + 1, 2):
        shares = [
            list(loader_of(index, codec, rank=r, world_size=2, **options).steps(step))
            for r in range(2)
        ]
        joined = [
            [b for share in shares for b in share[s]] for s in range(len(whole) - step)
        ]
        assert all_same(joined, whole[step:])


def test_clips_that_come_twice_in_an_epoch_are_drawn_anew(
    tiny_corpus, second_corpus, codec
):
    index = open_indexes([tiny_corpus / "shards", second_corpus], "train")
    draws: dict[str, list[list[float]]] = {}
    for batch in loader_of(index, codec, weights=(0.2, 0.8)):
        for key, values in zip(batch.keys, batch.draws_B9.tolist(), strict=True):
            draws.setdefault(key, []).append(values)
    twice = [values for key, values in draws.items() if key.startswith("1_")]
    assert len(twice) == 10 and all(
        len(v) == 4 and len({tuple(d) for d in v}) == 4 for v in twice
    )


def test_the_same_folder_twice_is_refused(tiny_corpus):
    with pytest.raises(UserError, match=r"each shard folder once.*data.weights"):
        open_indexes([tiny_corpus / "shards"] * 2, "train")


def test_an_abandoned_loader_leaves_no_threads(train, codec):
    import threading

    steps = loader_of(train, codec, threads=2).steps()
    next(steps)
    steps.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


# --- dummies


def test_ranks_with_fewer_micro_batches_fill_up_with_dummies(train, codec):
    """4 micro-batches on 3 ranks: 2 forward passes of each, of which 2 are dummies."""
    whole = list(loader_of(train, codec, num_micro_batches=4).steps())
    shares = [
        list(loader_of(train, codec, num_micro_batches=4, rank=r, world_size=3).steps())
        for r in range(3)
    ]
    for step, expected in enumerate(whole):
        batches = [batch for share in shares for batch in share[step]]
        assert [len(share[step]) for share in shares] == [2, 2, 2]
        assert all_same([[b for b in batches if any(b.real_B)]], [expected])
        assert len([b for b in batches if not any(b.real_B)]) == 2


def test_a_rank_without_clips_gets_a_dummy_that_weighs_nothing(tiny_corpus, codec):
    """9 clips in batches of 8: one step has 1 clip for 6 micro-batches."""
    dev = load_index(tiny_corpus / "shards", "dev")
    steps = [
        list(loader_of(dev, codec, num_micro_batches=6, rank=r, world_size=3).steps())
        for r in range(3)
    ]
    assert {len(share) for share in steps} == {2} and {
        len(s) for share in steps for s in share
    } == {2}
    batches = [b for share in steps for step in share for b in step]
    dummies = [b for b in batches if not any(b.real_B)]
    assert len(dummies) == 5
    for dummy in dummies:
        assert dummy.num_target_tokens == 0 and (dummy.target_ids_BL == -100).all()
        assert dummy.target_ids_BL.shape[1] > 0, "a loss over no places is not defined"
        assert len(dummy.frames_NHWC) == dummy.num_frames_B.sum() > 0
    keys = [k for b in batches for k, real in zip(b.keys, b.real_B, strict=True) if real]
    assert sorted(keys) == sorted(dev.strings("key"))


# --- broken clips


def test_a_broken_clip_is_replaced_by_the_next_one_and_counted_by_shard_and_key(
    tiny_shards, codec
):
    index = load_index(tiny_shards, "train")
    healthy = list(loader_of(index, codec).steps())
    break_clip(index, 11)
    key, follower = index.strings("key")[11], index.strings("key")[12]
    for threads in (1, 3):
        broken = BrokenClips(budget=1)
        steps = list(loader_of(index, codec, threads=threads, broken=broken).steps())
        assert list(broken.reasons) == [key]
        assert "AVI" in broken.reasons[key]
        for before, after in zip(
            (b for s in healthy for b in s), (b for s in steps for b in s), strict=True
        ):
            assert after.keys == tuple(follower if k == key else k for k in before.keys)
            if key not in before.keys:
                assert same(before, after)
                continue
            alone = loader_of(index, codec).reader
            draws, picks = alone.draws(12, 0)
            frames = np.empty((len(picks), 79, 64, 3), np.uint8)
            alone.read_into(frames, 12, picks)
            place = before.keys.index(key)
            parts = after.frames_NHWC.split(after.num_frames_B.tolist())
            assert (parts[place].numpy() == frames).all()
            assert after.draws_B9[place].tolist() == draws.tolist()
            assert after.texts[place] == index.strings("text")[12]
            assert len(after.frames_NHWC) == int(after.num_frames_B.sum())


def test_neighbours_that_are_broken_too_are_passed_over(tiny_shards, codec):
    index = load_index(tiny_shards, "train")
    for row in (38, 39, 0):  # past the end of the index it goes on at the start
        break_clip(index, row)
    broken = BrokenClips(budget=3)
    keys = [
        k for s in loader_of(index, codec, broken=broken).steps() for b in s for k in b.keys
    ]
    assert (
        len(broken.reasons) == 3
        and keys.count(index.strings("key")[1]) == 4
        and len(keys) == 40
    )


@pytest.mark.parametrize("damage", ["frame", "truncated shard", "missing shard"])
def test_other_kinds_of_damage_are_replaced_too(tiny_shards, codec, damage):
    index = load_index(tiny_shards, "train")
    shard = index.shard_path(4)
    num_broken = 8
    if damage == "frame":  # the container is whole, the first frames' heads are not
        for begin, _ in frame_spans(clip_bytes(index, 39))[:4]:
            break_clip(index, 39, at=int(begin) + 2)
        num_broken = 1
    elif damage == "truncated shard":
        shard.write_bytes(shard.read_bytes()[: int(index.arrays["offset"][39]) + 100])
        num_broken = 1
    else:
        shard.unlink()
    broken = BrokenClips(budget=8)
    keys = [
        k for s in loader_of(index, codec, broken=broken).steps() for b in s for k in b.keys
    ]
    assert len(keys) == 40 and len(broken.reasons) == num_broken
    assert all(r.startswith("train-000004.tar: ") for r in broken.reasons.values())


def test_more_broken_clips_than_the_budget_stop_the_run_and_name_the_last(
    tiny_shards, codec
):
    index = load_index(tiny_shards, "train")
    for row in (3, 20):
        break_clip(index, row)
    with pytest.raises(
        RankError,
        match=r"broken clips must be at most 1, got 2; the last is .* in train-00000",
    ) as e:
        list(loader_of(index, codec, broken=BrokenClips(budget=1)).steps())
    assert any(index.strings("key")[row] in str(e.value) for row in (3, 20))


def test_a_split_without_one_whole_clip_is_an_error_whatever_the_budget(tiny_shards, codec):
    index = load_index(tiny_shards, "test")
    for row in range(len(index)):
        break_clip(index, row)
    with pytest.raises(RankError, match="Cannot decode any clip of"):
        list(loader_of(index, codec, broken=BrokenClips(budget=100)).steps())


def test_evaluation_stops_at_a_broken_clip(tiny_shards, codec):
    index = load_index(tiny_shards, "dev")
    break_clip(index, 4)
    with pytest.raises(RankError, match=index.strings("key")[4]):
        list(loader_of(index, codec, train=False).steps())


def test_pickles_in_a_shard_are_never_read(tiny_shards, codec, tmp_path):
    """A member that webdataset would unpickle, and video bytes that are a pickle, stay bytes."""
    witness = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return Path.touch, (witness,)

    evil = pickle.dumps(Payload())
    index = load_index(tiny_shards, "train")
    with tarfile.open(index.shard_path(0), "a") as tar:
        for name in ("train_0000.pyd", "train_0000.pickle", "train_0000.pth"):
            info = tarfile.TarInfo(name)
            info.size = len(evil)
            tar.addfile(info, io.BytesIO(evil))
    path, begin = index.shard_path(1), int(index.arrays["offset"][8])
    content = bytearray(path.read_bytes())
    content[begin : begin + len(evil)] = evil
    path.write_bytes(content)
    broken = BrokenClips(budget=1)
    assert len(list(loader_of(index, codec, broken=broken).steps())) == 5
    assert len(broken.reasons) == 1 and not witness.exists()


def test_a_fault_of_ours_is_not_taken_for_a_broken_clip(train, codec):
    loader = loader_of(train, codec, broken=BrokenClips(budget=100))
    columns = {name: column for name, column in train.arrays.items() if name != "offset"}
    reader = replace(loader.reader, index=replace(train, arrays=columns))
    with pytest.raises(KeyError):
        list(Loader(reader, loader.plan, codec, broken=loader.broken).steps())
