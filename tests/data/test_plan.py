import json
from dataclasses import asdict, replace
from math import gcd

import numpy as np
import pytest

from flallm_ds.data.plan import (
    EpochPlan,
    Plan,
    PlanState,
    micro_batches_of_rank,
    micro_batches_per_rank,
    temperature_weights,
)
from flallm_ds.errors import UserError

SIZES = [1, 2, 3, 7, 8, 9, 64, 257, 1000]


def plan_of(
    num_clips: int,
    batch_clips: int = 8,
    num_micro_batches: int = 2,
    seed: int = 0,
    **options,
) -> Plan:
    rng = np.random.default_rng(num_clips)
    return Plan(
        fingerprint="00112233445566aa",
        num_kept=rng.integers(4, 120, num_clips).astype(np.int32),
        shard=np.sort(rng.integers(0, 1 + num_clips // 20, num_clips)).astype(np.int32),
        seed=seed,
        batch_clips=batch_clips,
        num_micro_batches=num_micro_batches,
        **options,
    )


def mixed(sizes: list[int], weights: tuple[float, ...]) -> Plan:
    """Corpora of these sizes, one after another, in one plan."""
    corpus = np.repeat(np.arange(len(sizes)), sizes)
    return plan_of(sum(sizes), corpus=corpus, weights=weights)


def micro_batches(epoch: EpochPlan) -> list[list[list[int]]]:
    return [
        [s.tolist() for s in epoch.micro_batches_of(step)]
        for step in range(epoch.num_steps)
    ]


def padding(batches: list[np.ndarray], num_kept: np.ndarray) -> float:
    """Padding places for each real one, if each batch were padded to its longest clip."""
    real = sum(num_kept[b].sum() for b in batches)
    return sum(len(b) * num_kept[b].max() for b in batches) / real - 1


@pytest.mark.parametrize("num_clips", SIZES)
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_holds_every_clip_exactly_once(num_clips, epoch):
    plan = plan_of(num_clips).epoch(epoch)
    dealt = [clip for step in micro_batches(plan) for part in step for clip in part]
    assert sorted(dealt) == list(range(num_clips))
    assert plan.num_steps == -(-num_clips // 8)


@pytest.mark.parametrize("num_clips", SIZES)
def test_evaluation_holds_every_clip_exactly_once_longest_first(num_clips):
    plan = plan_of(num_clips)
    order = plan.in_length_order()
    batches = [order.batch(step) for step in range(order.num_steps)]
    assert sorted(np.concatenate(batches)) == list(range(num_clips))
    assert (np.diff(plan.num_kept[np.concatenate(batches)]) <= 0).all()
    assert all(len(b) <= 8 for b in batches)
    assert sorted(
        c for step in micro_batches(order) for part in step for c in part
    ) == list(range(num_clips))


@pytest.mark.parametrize(
    ("num_clips", "batch_clips"), [(100, 8), (1000, 64), (999, 128), (40, 12)]
)
def test_the_remainder_is_spread_over_the_batches(num_clips, batch_clips):
    """Batches differ by what 64 micro-batches share equally, and all but one of them can be dealt so."""
    plan = plan_of(num_clips, batch_clips).epoch(0)
    sizes = [len(plan.batch(step)) for step in range(plan.num_steps)]
    unit = gcd(batch_clips, 64)
    assert len(sizes) == -(-num_clips // batch_clips) and sum(sizes) == num_clips
    assert max(sizes) <= batch_clips and sorted(sizes)[1] >= max(sizes) - unit
    assert sum(size % unit > 0 for size in sizes) == (num_clips % unit > 0)


def test_the_order_is_a_pure_function():
    assert micro_batches(plan_of(300).epoch(3)) == micro_batches(plan_of(300).epoch(3))


@pytest.mark.parametrize("change", [{"seed": 1}, {"fingerprint": "00112233445566ab"}])
def test_another_seed_or_another_corpus_has_another_order(change):
    plan = plan_of(300)
    assert micro_batches(plan.epoch(0)) != micro_batches(replace(plan, **change).epoch(0))


def test_epochs_differ_in_their_batches_not_only_in_their_order():
    plan = plan_of(300)
    first, second = (
        {frozenset(e.batch(step).tolist()) for step in range(e.num_steps)}
        for e in (plan.epoch(0), plan.epoch(1))
    )
    assert len(first & second) <= 2


def test_clips_of_different_shards_are_mixed():
    """A pool of batches draws from a window of shards, so a batch is not the clips of one tar."""
    plan = plan_of(1000)
    epoch = plan.epoch(0)
    num_shards = [
        len(set(plan.shard[epoch.batch(s)].tolist())) for s in range(epoch.num_steps)
    ]
    assert np.mean(num_shards) > 5


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_clips", [1, 5, 100])
def test_every_rank_has_the_same_number_of_steps_and_micro_batches(world_size, num_clips):
    num_micro_batches = 2 * world_size
    epoch = plan_of(
        num_clips, batch_clips=2 * num_micro_batches, num_micro_batches=num_micro_batches
    ).epoch(0)
    shares = [
        micro_batches_of_rank(num_micro_batches, rank, world_size)
        for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {2}
    assert [s for share in shares for s in share] == list(range(num_micro_batches))
    for step in range(epoch.num_steps):
        assert len(epoch.micro_batches_of(step)) == num_micro_batches


@pytest.mark.parametrize(("world_size", "num_shards"), [(3, 8), (7, 2), (5, 1)])
def test_ranks_and_shards_need_not_divide_each_other(world_size, num_shards):
    """Every rank has every step, and between them they have each clip once."""
    plan = replace(
        plan_of(83, num_micro_batches=world_size),
        shard=(np.arange(83) * num_shards // 83).astype(np.int32),
    )
    for order in (plan.epoch(1), plan.in_length_order()):
        steps = micro_batches(order)
        shares = [
            micro_batches_of_rank(world_size, rank, world_size)
            for rank in range(world_size)
        ]
        dealt = [[[step[s] for s in share] for step in steps] for share in shares]
        assert {len(of_rank) for of_rank in dealt} == {order.num_steps}
        assert sorted(
            c for of_rank in dealt for step in of_rank for part in step for c in part
        ) == list(range(83))


def test_one_two_and_four_ranks_see_the_same_micro_batches():
    epoch = plan_of(100, num_micro_batches=4).epoch(0)
    whole = micro_batches(epoch)
    for world_size in (1, 2, 4):
        dealt = [
            [
                step[s]
                for rank in range(world_size)
                for s in micro_batches_of_rank(epoch.num_micro_batches, rank, world_size)
            ]
            for step in whole
        ]
        assert dealt == whole


def test_the_global_batches_do_not_depend_on_the_number_of_micro_batches():
    two, four = (
        plan_of(100, num_micro_batches=2).epoch(0),
        plan_of(100, num_micro_batches=4).epoch(0),
    )
    assert two.num_steps == four.num_steps
    for step in range(two.num_steps):
        assert two.batch(step).tolist() == four.batch(step).tolist()


def test_more_ranks_than_micro_batches_are_refused():
    with pytest.raises(
        UserError, match=r"at least the number of ranks \(5\), got 4\. .*micro_batches=5"
    ):
        micro_batches_of_rank(4, 0, 5)


@pytest.mark.parametrize(("num", "world_size"), [(4, 3), (7, 2), (64, 63), (5, 5)])
def test_ranks_share_micro_batches_as_evenly_as_possible(num, world_size):
    shares = [micro_batches_of_rank(num, rank, world_size) for rank in range(world_size)]
    assert [number for share in shares for number in share] == list(range(num))
    most = max(map(len, shares))
    assert most - min(map(len, shares)) <= 1
    assert most == micro_batches_per_rank(num, world_size)


def test_buckets_pad_far_less_than_a_shuffle():
    plan = plan_of(1000)
    epoch = plan.epoch(0)
    shuffled = np.random.default_rng(0).permutation(1000)
    bucketed = padding([epoch.batch(s) for s in range(epoch.num_steps)], plan.num_kept)
    assert bucketed < 0.3 * padding(np.split(shuffled, 125), plan.num_kept)


@pytest.mark.parametrize(("batch_clips", "num_micro_batches"), [(64, 8), (512, 64)])
def test_micro_batches_of_a_step_hold_nearly_equal_frames(batch_clips, num_micro_batches):
    plan = plan_of(20_032, batch_clips, num_micro_batches)
    epoch = plan.epoch(0)
    for step in range(epoch.num_steps):
        frames = np.array(
            [plan.num_kept[part].sum() for part in epoch.micro_batches_of(step)]
        )
        assert frames.max() <= 1.03 * frames.mean()


def test_fewer_clips_than_slices_leave_the_last_slices_empty():
    assert [
        len(part) for part in plan_of(3, num_micro_batches=4).epoch(0).micro_batches_of(0)
    ] == [
        1,
        1,
        1,
        0,
    ]


# --- a budget of frames


def test_a_frame_budget_is_never_passed_and_nothing_is_dropped():
    plan = plan_of(3000, num_micro_batches=4, batch_frames=3000)
    epoch = plan.epoch(2)
    frames = [
        int(plan.num_kept[epoch.batch(step)].sum()) for step in range(epoch.num_steps)
    ]
    assert max(frames) <= 3000 and np.mean(frames) > 2700
    assert sorted(epoch.order.tolist()) == list(range(3000))
    assert sum(len(epoch.batch(step)) % 4 > 0 for step in range(epoch.num_steps)) <= 1
    assert sorted(plan.in_length_order().order.tolist()) == list(range(3000))


def test_a_clip_above_the_budget_is_a_batch_of_its_own():
    plan = plan_of(50, batch_frames=30)
    epoch = plan.epoch(0)
    for step in range(epoch.num_steps):
        clips = epoch.batch(step)
        assert len(clips) == 1 or plan.num_kept[clips].sum() <= 30
    assert sorted(epoch.order.tolist()) == list(range(50))


# --- several corpora


def test_without_weights_every_clip_of_every_corpus_comes_once_with_the_epoch_as_its_pass():
    epoch = mixed([100, 30], ()).epoch(4)
    assert sorted(epoch.order.tolist()) == list(range(130)) and set(
        epoch.passes.tolist()
    ) == {4}


def test_weights_are_each_corpus_share_of_an_epoch():
    plan = mixed([900, 90, 10], (0.5, 0.3, 0.2))
    assert plan.quotas == [500, 300, 200]
    for number in range(3):
        epoch = plan.epoch(number)
        assert np.bincount(plan.corpus[epoch.order]).tolist() == [500, 300, 200]
        assert epoch.num_steps == 125


def test_over_the_epochs_all_clips_of_a_corpus_come_equally_often_and_never_twice_with_the_same_pass():
    plan = mixed([900, 90, 10], (0.5, 0.3, 0.2))
    seen = np.zeros(1000, int)
    draws = set()
    for number in range(9):
        epoch = plan.epoch(number)
        np.add.at(seen, epoch.order, 1)
        draws |= set(zip(epoch.order.tolist(), epoch.passes.tolist(), strict=True))
    assert (
        set(seen[:900]) == {5} and set(seen[900:990]) == {30} and set(seen[990:]) == {180}
    )
    assert len(draws) == seen.sum() == 9000


def test_a_mixed_epoch_is_a_pure_function_of_its_number():
    first, again = (mixed([900, 90, 10], (2, 1, 1)).epoch(5) for _ in range(2))
    assert (
        micro_batches(first) == micro_batches(again)
        and first.passes.tolist() == again.passes.tolist()
    )


def test_a_temperature_evens_corpora_out():
    assert temperature_weights([900, 100], 1.0) == pytest.approx((0.9, 0.1))
    assert temperature_weights([900, 100], 2.0) == pytest.approx((0.75, 0.25))
    assert temperature_weights([900, 100], 1e9) == pytest.approx((0.5, 0.5))


# --- the state


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fingerprint", {"fingerprint": "ffff"}),
        ("seed", {"seed": 5}),
        ("batch_clips", {"batch_clips": 16}),
        ("num_micro_batches", {"num_micro_batches": 4}),
        ("batch_frames", {"batch_frames": 500}),
        ("weights", {"weights": (1.0,)}),
    ],
)
def test_a_state_of_another_plan_is_refused_and_the_error_says_what_differs(name, change):
    saved, now = plan_of(100).state(2, 7), replace(plan_of(100), **change).state(0, 0)
    with pytest.raises(UserError) as caught:
        now.check_same_plan(saved)
    assert f"The {name} of the data must be {getattr(saved, name)!r}" in str(caught.value)
    assert f"got {change[name]!r}." in str(caught.value)


def test_a_state_of_the_same_plan_at_another_step_is_accepted():
    plan = plan_of(100)
    state = plan.state(2, 7)
    plan.state(0, 0).check_same_plan(state)
    assert state == PlanState(4, "00112233445566aa", "", 0, 8, 0, (), 2, 2, 7)


def test_a_state_survives_json_and_one_of_another_version_is_refused():
    state = replace(plan_of(100), weights=(0.5,)).state(2, 7)
    assert PlanState.load(json.loads(json.dumps(asdict(state)))) == state
    old = {k: v for k, v in asdict(state).items() if k != "weights"} | {"version": 2}
    with pytest.raises(UserError, match=r"data order must be 4, got 2"):
        PlanState.load(old)
