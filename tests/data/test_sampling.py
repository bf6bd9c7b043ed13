from dataclasses import fields

import numpy as np
import pytest

from flallm_ds.config import DataConfig
from flallm_ds.data.sampling import FrameSampling, sample_rng


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- one of each group


@pytest.mark.parametrize("stride", [1, 2, 4, 7])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 8, 33])
def test_one_frame_of_each_group_is_kept(num_frames, stride):
    groups = [range(num_frames)[i : i + stride] for i in range(0, num_frames, stride)]
    sampling = FrameSampling(stride)
    assert sampling.picks(num_frames).tolist() == [group[0] for group in groups]
    for seed in range(20):
        picks = sampling.picks(num_frames, rng=rng_of(seed))
        assert len(picks) == len(groups)
        assert all(pick in group for pick, group in zip(picks, groups, strict=True))


def test_all_frames_of_a_group_are_picked_equally_often():
    rng = rng_of(0)
    picks = np.concatenate([FrameSampling(4).picks(10, rng=rng) for _ in range(4000)])
    counts = np.bincount(picks, minlength=10)
    assert np.allclose(counts[:8], 1000, rtol=0.15) and np.allclose(
        counts[8:], 2000, rtol=0.15
    )


@pytest.mark.parametrize(
    ("wrong"),
    [{"keep_every": 0}, {"max_frames": 0}, {"target_fps": 0.0}, {"target_fps": -1.0}],
)
def test_groups_without_frames_are_an_error(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        FrameSampling(**wrong)


def test_no_frames_are_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        FrameSampling(4).picks(0)


# --- by time


def test_corpora_of_all_rates_have_the_same_pace():
    sampling = FrameSampling(target_fps=6.25)
    for fps in (24.0, 25.0, 29.97, 30.0, 50.0, 59.94):
        num_frames = round(8 * fps)  # 8 s
        times = sampling.picks(num_frames, fps) / fps
        assert len(times) == 50
        assert (times - np.arange(50) / 6.25 >= -1e-6).all() and (
            times - np.arange(50) / 6.25 < 1 / fps
        ).all()


@pytest.mark.parametrize("fps", [25.0, np.float32(25), np.float32(29.97), 30.0, 50.0])
@pytest.mark.parametrize("divisor", [1, 2, 3, 4, 5])
def test_a_whole_fraction_of_the_rate_is_every_nth_frame(fps, divisor):
    """Rounding of fps / target must not matter."""
    for num_frames in (1, 7, 100, 475):
        by_time = FrameSampling(target_fps=float(fps) / divisor).picks(
            num_frames, float(fps)
        )
        assert by_time.tolist() == FrameSampling(divisor).picks(num_frames).tolist()


def test_a_clip_slower_than_the_target_keeps_all_its_frames():
    assert FrameSampling(target_fps=25.0).picks(9, 12.0).tolist() == list(range(9))


def test_random_picks_stay_in_their_span_of_time():
    sampling = FrameSampling(target_fps=10.0)
    for seed in range(50):
        times = sampling.picks(240, 24.0, rng_of(seed)) / 24
        assert ((times * 10 + 1e-6).astype(int) == np.arange(100)).all()


def test_a_video_whose_length_is_unknown_keeps_the_same_frames():
    for sampling in (
        FrameSampling(4),
        FrameSampling(target_fps=7.0),
        FrameSampling(target_fps=99.0),
    ):
        for fps in (24.0, 25.0, 30.0):
            first = [i for i in range(111) if sampling.keeps_first(i, fps)]
            assert first == sampling.picks(111, fps).tolist()


@pytest.mark.parametrize("fps", [24000 / 1001, 30000 / 1001, 60000 / 1001])
def test_every_pick_is_within_the_clip(fps):
    """If the target is nearly a fraction of the rate, groups begin just before or after frames."""
    lengths = np.arange(1, 900)
    fps = float(np.float32(fps))
    for divisor in (2, 3, 4, 10):
        for digits in (2, 6):
            sampling = FrameSampling(
                target_fps=round(fps / divisor, digits), max_frames=10**6
            )
            for num_frames, num_kept in zip(
                lengths, sampling.num_kept(lengths, np.float32(fps)), strict=True
            ):
                picks = sampling.picks(int(num_frames), fps)
                assert (
                    len(picks) == num_kept
                    and picks[-1] < num_frames
                    and (np.diff(picks) > 0).all()
                )
                assert sampling.keeps_first(int(picks[-1]), fps)


# --- the cap


def test_a_long_clip_is_capped_evenly_from_its_first_frame():
    capped = FrameSampling(4, max_frames=512).picks(4000)
    assert len(capped) == 512 and capped[0] == 0 and capped[-1] >= 4000 - 8
    assert set(np.diff(capped)) == {4, 8}


@pytest.mark.parametrize("cap", ["uniform", "random", "segment"])
def test_a_short_clip_is_not_capped(cap):
    assert FrameSampling(1, max_frames=512, cap=cap).picks(
        512, rng=rng_of(0)
    ).tolist() == list(range(512))


def test_a_random_cap_draws_frames_in_order_and_is_uniform_in_evaluation():
    sampling = FrameSampling(1, max_frames=10, cap="random")
    drawn = [sampling.picks(40, rng=rng_of(seed)) for seed in range(2000)]
    assert all(len(p) == 10 and (np.diff(p) > 0).all() for p in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=40)
    assert np.allclose(counts, 500, rtol=0.2)
    assert sampling.picks(40).tolist() == FrameSampling(1, max_frames=10).picks(40).tolist()


def test_a_segment_cap_takes_one_of_each_segment_and_the_middle_in_evaluation():
    sampling = FrameSampling(1, max_frames=8, cap="segment")
    for seed in range(50):
        assert (sampling.picks(40, rng=rng_of(seed)) // 5 == np.arange(8)).all()
    assert sampling.picks(40).tolist() == list(range(2, 40, 5))


@pytest.mark.parametrize("cap", ["uniform", "random", "segment"])
def test_num_kept_is_the_number_of_picks(cap):
    lengths = np.arange(1, 200)
    for options in (
        {"max_frames": 50}, {"keep_every": 4}, {"keep_every": 4, "max_frames": 10}, {"target_fps": 6.25},
        {"target_fps": 11.0, "max_frames": 20},
    ):  # fmt: skip
        sampling = FrameSampling(cap=cap, **options)
        for fps in (24.0, 25.0, 29.97):
            expected = [len(sampling.picks(int(n), fps, rng_of(int(n)))) for n in lengths]
            assert (
                sampling.num_kept(lengths, np.full(len(lengths), fps, np.float32)).tolist()
                == expected
            )
            assert expected == [len(sampling.picks(int(n), fps)) for n in lengths]


def test_random_numbers_depend_on_seed_epoch_and_sample():
    base = sample_rng(0, 0, 0).random(4).tolist()
    assert sample_rng(0, 0, 0).random(4).tolist() == base
    others = [
        sample_rng(*place).random(4).tolist() for place in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert base not in others and len({tuple(o) for o in others}) == 3


# --- options and stored settings


def test_options_and_stored_settings_hold_the_same_sampling():
    sampling = FrameSampling(keep_every=2, max_frames=30, target_fps=12.5, cap="segment")
    options = DataConfig(keep_every=2, max_frames=30, target_fps=12.5, cap="segment")
    assert FrameSampling.of(options) == sampling
    assert FrameSampling.of_settings({"frame_size": 64} | sampling.settings()) == sampling
    assert FrameSampling.of_settings({"keep_every": 2, "max_frames": 30}) == FrameSampling(
        2, 30
    )


def test_settings_have_every_field_in_the_order_of_earlier_files():
    assert list(FrameSampling().settings()) == [
        "keep_every",
        "target_fps",
        "max_frames",
        "cap",
    ]
    assert set(FrameSampling().settings()) == {
        field.name for field in fields(FrameSampling)
    }
