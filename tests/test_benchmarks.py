"""Tests that each benchmark runs at a tiny size and reports all rows; no speed is tested."""

import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import build, loader, material, measure, memory, peers, plan
from benchmarks.measure import Amount, Target, Way, cpu_seconds, interleave
from benchmarks.ours import OurLoader, load
from flallm_ds.errors import UserError


def tables(page: str) -> list[list[list[str]]]:
    """The tables of a page, each a list of rows of cells, the header first."""
    found: list[list[list[str]]] = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]


def first_number(cell: str) -> float:
    return float(cell.split()[0].replace(",", ""))


def saved_page(out: Path, name: str) -> str:
    return (out / f"{name}_here_{date.today():%Y%m}.md").read_text(encoding="utf-8")


# --- the four scripts


def test_loader_reports_every_way_at_both_rates_and_the_targets(tmp_path):
    page = loader.run(
        clips=2, frames=9, mp4_clips=2, batch_clips=1, threads=1, rounds=1, seconds=0.01, spdl=False,
        out=tmp_path, hardware="here",
    )  # fmt: skip
    assert saved_page(tmp_path, "loader") == page
    clips, videos, targets = tables(page)
    assert (
        tuple(clips[0]) == tuple(videos[0]) == loader.COLUMNS
        and tuple(targets[0]) == Target.HEADER
    )
    assert [row[1] for row in clips[1:]] == ["all"] * 7 + ["1 in 4"] * 7
    assert [row[0] for row in clips[1:8]] == [row[0] for row in clips[8:]]
    assert len(videos) == 5 and len(targets) == 12
    for row in clips[1:] + videos[1:]:
        assert all(first_number(cell) > 0 for cell in row[3:])
    assert all(row[3] in ("met", "missed") for row in targets[1:])
    assert "SPDL is not compared: left out by --spdl=false" in page


def test_plan_reports_costs_ranks_and_targets(tmp_path):
    page = plan.run(
        clips=1_000, rank_clips=4, ranks=(2, 4), rounds=1, out=tmp_path, hardware="here"
    )
    assert saved_page(tmp_path, "plan") == page
    costs, ranks, targets = tables(page)
    assert [row[0] for row in costs[1:]] == [
        "index and plan of an epoch",
        "resume in the middle",
    ]
    assert tuple(ranks[0]) == plan.RANK_COLUMNS and tuple(targets[0]) == Target.HEADER
    assert [row[:3] for row in ranks[1:]] == [["2", "8", "125"], ["4", "16", "63"]]
    assert all(row[-2:] == ["yes", "yes"] for row in ranks[1:])
    assert len(targets) == 8


def test_memory_reports_each_epoch_and_draws_them(tmp_path):
    page = memory.run(
        clips=2, frames=9, epochs=4, batch_clips=1, threads=1, out=tmp_path, hardware="here"
    )
    assert saved_page(tmp_path, "memory") == page
    (epochs,) = tables(page)
    assert tuple(epochs[0]) == memory.COLUMNS and [row[0] for row in epochs[1:]] == [
        "1",
        "2",
        "3",
        "4",
    ]
    (picture,) = re.findall(r"!\[memory\]\((.*)\)", page)
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_build_reports_both_sides_of_both_sources(tmp_path):
    page = build.run(
        clips=2, frames=5, mp4_clips=2, workers=1, rounds=1, out=tmp_path, hardware="here"
    )
    assert saved_page(tmp_path, "build") == page
    sides, targets = tables(page)
    assert tuple(sides[0]) == build.COLUMNS and tuple(targets[0]) == Target.HEADER
    assert [row[1] for row in sides[1:]] == ["shards/build.py", "bare loops"] * 2
    assert (
        "10 frames of PNG folders, 210x260, 10 frames of 720p H.264" in page
        and len(targets) == 3
    )


@pytest.mark.parametrize("script", ["loader", "plan", "memory", "build"])
def test_a_benchmark_runs_as_a_module_and_refuses_unknown_options(script):
    command = [sys.executable, "-m", f"benchmarks.{script}", "--clip=3"]
    ended = subprocess.run(
        command, cwd=measure.ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2 and "there is no option --clip" in ended.stderr


# --- that all ways load the same


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three clips of 9 frames as PNGs, as shards and as a tar of frames."""
    folder = tmp_path_factory.mktemp("clips")
    pngs = material.png_folders(folder / "png", 3, 9, None)
    shards = material.build_shards([paths[0].parent for paths in pngs], folder / "shards")
    return pngs, shards, material.frame_tar(shards, folder / "frames.tar")


def ways_of(clips, keep_every: int) -> dict[str, Callable[[], Amount]]:
    pngs, shards, tar = clips
    index = load(shards)
    return {
        "ours": loader.Ours(OurLoader(shards, keep_every, 2, 1), loader.FRAMES),
        "crops": loader.Ours(OurLoader(shards, keep_every, 2, 1), loader.CROPS),
        "pixels": loader.Ours(OurLoader(shards, keep_every, 2, 1), loader.PIXELS),
        "bound": peers.BareLoop(index, keep_every, 2),
        "workers": peers.TorchDataLoader(index, keep_every, 2, 1),
        "members": peers.PlainWebdataset(tar, keep_every, 2),
        "png": peers.PngFolders(pngs, keep_every, 2),
    }


@pytest.mark.parametrize(("keep_every", "frames"), [(1, 27), (4, 9)])
def test_every_way_counts_the_same_real_frames(clips, keep_every, frames):
    counted = {name: way() for name, way in ways_of(clips, keep_every).items()}
    assert counted == dict.fromkeys(counted, Amount(frames, 3))


@pytest.mark.parametrize(("keep_every", "frames"), [(1, 27), (4, 9)])
@pytest.mark.parametrize("way", ["video", "images"])
def test_spdl_decodes_the_same_frames(clips, way, keep_every, frames):
    if not (loader.SPDL_FOLDER / "ready").is_file():
        pytest.skip(
            "the environment of SPDL is created by benchmarks.loader, which was not run"
        )
    side = peers.Spdl(
        peers.spdl_python(loader.SPDL_FOLDER), load(clips[1]), keep_every, 1, way
    )
    try:
        assert side() == side() == Amount(frames, 3)
    finally:
        side.close()


def test_an_epoch_of_ours_repeats_the_clips(clips):
    _, shards, _ = clips
    batches = list(OurLoader(shards, 4, 2, 1, epochs=3).batches())
    assert sum(len(batch.keys) for batch in batches) == 9
    assert {key for batch in batches for key in batch.keys} == set(
        load(shards).strings("key")
    )


def test_png_folders_are_collated_as_the_peer_does(clips):
    way = peers.PngFolders(clips[0], 1, 2)
    first = way._load(way._clips[0])
    assert first.shape == (9, 3, 224, 224) and first.dtype == torch.float32
    both = way._collate([first, first[:6]])
    # 9 frames become 12 and 6 become 8, each with 16 more; the padding repeats the first
    # and the last frame
    assert len(both) == 28 + 24
    assert (
        torch.equal(both[0], first[0])
        and torch.equal(both[8:17], first)
        and torch.equal(both[27], first[8])
    )
    assert torch.equal(both[28], first[0]) and torch.equal(both[36:42], first[:6])


def test_crops_have_the_drawn_offsets():
    frames = np.zeros((2, 260, 210, 3), np.uint8)
    frames[:, :130] = 200  # above the middle
    draws = np.zeros((2, 9), np.float32)
    draws[1, 0] = 0.999
    top, moved = loader.crop(frames, [1, 1], draws)
    assert top.shape == moved.shape == (224, 224, 3)
    assert (top[:120] == 200).all() and not top[136:].any()
    assert (moved[:90] == 200).all() and not moved[105:].any()


def test_frames_of_real_videos_have_phoenix_size(shared_data, tmp_path):
    (paths,) = material.png_folders(tmp_path, 1, 3, shared_data / "how2sign")
    assert len(paths) == 3 and material.read_frames(paths[0].parent).__next__().shape == (
        260,
        210,
        3,
    )


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(UserError, match="--videos must be a folder with videos"):
        material.video_files(tmp_path)


# --- how is measured


def test_sides_are_interleaved_and_fast_ones_run_more_often():
    calls = []

    def busy(name: str, seconds: float) -> Amount:
        calls.append(name)
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return Amount(10, 2)

    ways = {
        name: Way(name, lambda name=name, s=s: busy(name, s))
        for name, s in (("a", 0.1), ("b", 0.005))
    }
    rates = interleave(ways, rounds=3, seconds=0.1)
    order = [a for a, b in pairwise([*calls, ""]) if a != b]
    assert order == ["a", "b"] * 4
    assert calls.count("b") > calls.count("a")
    for way in rates.values():
        assert len(way.frames_per_cpu_s) == len(way.cpu_ms_per_clip) == 3
        for per_s, ms in zip(way.frames_per_cpu_s, way.cpu_ms_per_clip, strict=True):
            assert per_s * ms == pytest.approx(5 * 1000)  # 5 frames a clip


def _burn(started, finish) -> None:
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    started.set()
    finish.wait()


def test_cpu_time_includes_running_and_ended_processes():
    context = multiprocessing.get_context("fork")
    started, finish = context.Event(), context.Event()
    before = cpu_seconds()
    child = context.Process(target=_burn, args=(started, finish))
    child.start()
    started.wait()
    assert cpu_seconds() - before > 0.25
    finish.set()
    child.join()
    assert cpu_seconds() - before > 0.25


def test_targets_say_met_or_missed_by_the_median():
    assert Target("x", 2, [1.0, 2.5, 9.0]).row() == (
        "x",
        "at least 2",
        "2.50 (1.00 to 9.00)",
        "met",
    )
    assert Target("x", 2, [1.0, 2.5, 9.0], at_least=False).row()[1::2] == (
        "at most 2",
        "missed",
    )
