import numpy as np
import pytest

from flallm_ds.data.sampling import cap, keep_every, num_kept, sample_rng


@pytest.mark.parametrize("stride", [1, 2, 4, 7])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 8, 33])
def test_one_frame_of_each_group_is_kept(num_frames, stride):
    groups = [range(num_frames)[i : i + stride] for i in range(0, num_frames, stride)]
    assert keep_every(num_frames, stride).tolist() == [group[0] for group in groups]
    for seed in range(20):
        picks = keep_every(num_frames, stride, np.random.default_rng(seed))
        assert len(picks) == len(groups)
        assert all(pick in group for pick, group in zip(picks, groups, strict=True))


def test_every_frame_of_a_group_is_picked_as_often_as_any_other():
    rng = np.random.default_rng(0)
    picks = np.concatenate([keep_every(10, 4, rng) for _ in range(4000)])
    counts = np.bincount(picks, minlength=10)
    assert np.allclose(counts[:8], 1000, rtol=0.15) and np.allclose(counts[8:], 2000, rtol=0.15)


@pytest.mark.parametrize(("num_frames", "stride"), [(0, 4), (5, 0), (-1, 1)])
def test_no_frames_and_no_stride_are_errors(num_frames, stride):
    with pytest.raises(ValueError, match="at least 1"):
        keep_every(num_frames, stride)


def test_a_long_clip_is_capped_evenly_from_its_first_frame():
    capped = cap(np.arange(0, 4000, 4), 512)
    assert len(capped) == 512 and capped[0] == 0 and capped[-1] >= 4000 - 8
    assert set(np.diff(capped)) == {4, 8}


def test_a_short_clip_is_not_capped():
    assert cap(np.arange(512), 512).tolist() == list(range(512))


def test_num_kept_says_how_many_are_kept():
    lengths = np.arange(1, 200)
    for stride, limit in ((1, 50), (4, 512), (4, 10)):
        expected = [len(cap(keep_every(int(n), stride), limit)) for n in lengths]
        assert num_kept(lengths, stride, limit).tolist() == expected


def test_random_numbers_belong_to_seed_epoch_and_sample():
    base = sample_rng(0, 0, 0).random(4).tolist()
    assert sample_rng(0, 0, 0).random(4).tolist() == base
    others = [sample_rng(*place).random(4).tolist() for place in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert base not in others and len({tuple(o) for o in others}) == 3
