"""Tests of --fps, --crop, --margin, --clip_format and --mb_per_shard on small corpora."""

import io
import signal
import subprocess
import sys
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from flallm_ds.data.codecs.decode import decode_frames
from flallm_ds.data.index import iter_rows, load_index, read_manifest
from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.verify import verify
from tests.helpers.paths import ROOT
from tests.helpers.trees import built_clips, make_phoenix, write_video


def write_manifest(path: Path, *lines: str, columns: str = "video,text,split") -> Path:
    path.write_text("\n".join([columns, *lines]))
    return path


def rows(out: Path, split: str = "train") -> dict[str, dict]:
    return {row["text"]: row for row in iter_rows(load_index(out, split))}


def sizes(out: Path) -> dict[str, tuple[int, int]]:
    """Return (height, width) of each training clip, by text."""
    found = {}
    for text, row in rows(out).items():
        found[text] = (row["height"], row["width"])
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make(source: Path, out: Path, **given) -> None:
    build("manifest", source, out, Options(**{"workers": 1} | given), language="en")


def test_fps_resamples_frames_by_time(tmp_path):
    write_video(tmp_path / "slow.mp4", 20, fps=10)
    write_video(tmp_path / "fast.mp4", 20, fps=20)
    columns = "video,text,start,end,split"
    source = write_manifest(
        tmp_path / "m.csv",
        "slow.mp4,a,,,train",
        "fast.mp4,b,,,train",
        "fast.mp4,c,0.2,0.6,train",
        columns=columns,
    )
    make(source, tmp_path / "out", fps=5)
    found = rows(tmp_path / "out")
    lengths = {text: (row["num_frames"], row["fps"]) for text, row in found.items()}
    assert lengths == {"a": (10, 5.0), "b": (5, 5.0), "c": (2, 5.0)}
    make(source, tmp_path / "kept")
    found = rows(tmp_path / "kept")
    lengths = {text: (row["num_frames"], row["fps"]) for text, row in found.items()}
    assert lengths == {"a": (20, 10.0), "b": (20, 20.0), "c": (8, 20.0)}


def test_crop_and_margin_are_intersected_with_the_box_of_a_row(tmp_path):
    picture = np.zeros((100, 200, 3), np.uint8)
    picture[20:60, 50:100] = 200
    (tmp_path / "clip").mkdir()
    cv2.imwrite(str(tmp_path / "clip" / "1.png"), picture)
    columns = "video,text,split,bbox"
    boxed = write_manifest(
        tmp_path / "m.csv",
        "clip,whole,train,",
        'clip,boxed,train,"0.25,0,1,1"',
        columns=columns,
    )
    make(boxed, tmp_path / "crop", crop=(0.0, 0.2, 0.5, 0.6))
    assert sizes(tmp_path / "crop") == {"whole": (40, 100), "boxed": (40, 50)}
    (frame,) = built_clips(tmp_path / "crop", "train")["clip"][1][:1]
    assert frame[:, -45:].min() > 180
    make(boxed, tmp_path / "margin", margin=(20, 100, 40, 10))
    assert sizes(tmp_path / "margin") == {"whole": (40, 90), "boxed": (40, 50)}
    with pytest.raises(
        UserError, match="1 outside the crop: train clip has a box outside --crop"
    ):
        make(boxed, tmp_path / "none", crop=(0.0, 0.0, 0.2, 1.0))
    with pytest.raises(
        UserError, match=r"1 cannot be decoded: .* leave nothing of 200x100 pixels"
    ):
        make(boxed, tmp_path / "none", margin=(0, 150, 0, 0))


def test_stretch_restores_the_aspect_ratio_of_phoenix(tmp_path):
    release = make_phoenix(tmp_path / "source", counts=(2, 0, 0))
    given = {"splits": ("train",), "workers": 1, "short_side": 105}
    build("phoenix14t", release, tmp_path / "out", Options(**given), stretch=True)
    index = load_index(tmp_path / "out", "train")
    assert (index.arrays["height"] == 150).all()
    assert (index.arrays["width"] == 105).all()


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    """Return a manifest of 24 clips of moving noise. The last of dev are much larger."""
    folder = tmp_path_factory.mktemp("noisy")
    rng = np.random.default_rng(0)
    lines = []
    for split, count in (("train", 14), ("dev", 10)):
        for number in range(count):
            name = f"{split}{number}"
            (folder / name).mkdir()
            picture = cv2.resize(rng.integers(0, 255, (12, 16, 3), np.uint8), (79, 61))
            for frame in range(30 if split == "dev" and number > 7 else 6):
                moved = np.roll(picture, 2 * frame, axis=1)
                cv2.imwrite(str(folder / name / f"{frame:02d}.png"), moved)
            lines.append(f"{name},{name},{split}")
    return write_manifest(folder / "m.csv", *lines)


def test_h264_clips_show_the_frames_of_the_source(noisy, tmp_path):
    make(noisy, tmp_path / "out", clip_format="h264", gop=4, crf=10)
    make(noisy, tmp_path / "two", clip_format="h264", gop=4, crf=10, workers=2)
    assert tree(tmp_path / "out") == tree(tmp_path / "two")
    index = load_index(tmp_path / "out", "dev")
    frame_hw = index.frame_hw
    # Odd sizes, which H.264 cannot store.
    assert frame_hw == (61, 79)
    for row in iter_rows(index):
        tar = tmp_path / "out" / index.shards[row["shard"]].file
        member = tar.read_bytes()[row["offset"] : row["offset"] + row["size"]]
        picks = np.arange(row["num_frames"])
        frames = np.zeros((len(picks), *frame_hw, 3), np.uint8)
        decode_frames(member, picks, row["num_frames"], frames, frame_hw)
        for number, frame in enumerate(frames):
            source = cv2.imread(
                str(noisy.parent / row["text"] / f"{number:02d}.png"), cv2.IMREAD_GRAYSCALE
            )
            grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
            assert np.abs(grey.astype(int) - source).mean() < 4
    found = read_manifest(tmp_path / "out")["options"]
    assert (found["clip_format"], found["gop"], found["crf"]) == ("h264", 4, 10)
    with tarfile.open(tmp_path / "out" / "dev-000000.tar") as file:
        assert [name.split(".")[1] for name in file.getnames()[:2]] == ["mp4", "json"]
    verify(tmp_path / "out", workers=1)


def test_h264_clips_have_the_rate_of_the_frame_times(tmp_path):
    # The container states 30 frames per second, but the frames are 0.2 s apart.
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(6):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 30 * number, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = 200 * number, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    source = write_manifest(tmp_path / "m.csv", "x.mkv,a,train")
    make(source, tmp_path / "out", clip_format="h264")
    row = rows(tmp_path / "out")["a"]
    assert row["num_frames"] == 6 and row["fps"] == pytest.approx(5, rel=0.01)
    member = (tmp_path / "out" / "train-000000.tar").read_bytes()[
        row["offset"] : row["offset"] + row["size"]
    ]
    with av.open(io.BytesIO(member)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(5, rel=0.01)


def test_shards_have_at_most_the_given_megabytes(noisy, tmp_path):
    limit = 0.12
    make(noisy, tmp_path / "out", mb_per_shard=limit)
    for split, count in (("train", 14), ("dev", 10)):
        index = load_index(tmp_path / "out", split)
        assert len(index) == len(set(index.strings("key"))) == count
        assert len(index.shards) > 1
        for number, shard in enumerate(index.shards):
            assert shard.file == f"{split}-{number:06d}.tar"
            assert shard.bytes == (tmp_path / "out" / shard.file).stat().st_size
            assert shard.bytes <= limit * 1e6 or shard.clips == 1
    # The large clips are at the end, and jobs have equal numbers of clips: one job must
    # have been divided into two tars.
    assert len({shard.clips for shard in load_index(tmp_path / "out", "dev").shards}) > 1
    verify(tmp_path / "out", workers=1)
    make(noisy, tmp_path / "two", mb_per_shard=limit, workers=2)
    assert tree(tmp_path / "two") == tree(tmp_path / "out")
    # Not one shard for each clip.
    assert len(load_index(tmp_path / "out", "train").shards) <= 8


def test_a_job_of_two_tars_continues_after_the_first(noisy, tmp_path):
    """The build is killed after each record in turn, and must give the same bytes."""
    make(noisy, tmp_path / "whole", mb_per_shard=0.12, splits=("dev",))
    out = tmp_path / "out"
    words = [
        f"--source={noisy}",
        f"--out={out}",
        "--language=en",
        "--workers=1",
        "--mb_per_shard=0.12",
        "--splits=dev",
    ]
    kill = (
        "import os, signal, sys; from flallm_ds.sharding import build, jobs;"
        "from flallm_ds import command; write = jobs.write_json;\n"
        "def once(path, content):\n"
        "    write(path, content)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "jobs.write_json = once; command.main(build.verb('manifest'))"
    )
    num_killed = 0
    while not out.exists():
        done = subprocess.run(
            [sys.executable, "-c", kill, *words],
            capture_output=True,
            text=True,
            timeout=100,
        )
        num_killed += done.returncode == -signal.SIGKILL
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
    assert tree(out) == tree(tmp_path / "whole")
    assert num_killed == len(list(out.glob("*.tar")))


@pytest.mark.parametrize("given", [{"clip_format": "h264"}, {"fps": 12.5}])
def test_every_unusual_video_is_stored_or_named(shared_data, tmp_path, given):
    """AV1, HEVC, 10 bits, full range, rotated, portrait, variable frame rate, unordered
    times, wrong frame counts."""
    videos = sorted(path for path in (shared_data / "edge_videos").iterdir())
    lines = [f"{path},{path.stem},train" for path in videos]
    source = write_manifest(tmp_path / "m.csv", *lines)
    make(source, tmp_path / "out", short_side=48, max_skipped=1, **given)
    found = rows(tmp_path / "out")
    assert found.keys() == {path.stem for path in videos} - {"corrupted"}
    assert len(found) >= 10
    skipped = read_manifest(tmp_path / "out")["skipped"]
    assert list(skipped) == ["cannot be decoded"] and "corrupted.mp4" in str(skipped)
    assert found["signbank_metadata_109_decodes_99"]["num_frames"] == (
        83 if "fps" in given else 99
    )
    assert found["video_90"]["height"] > found["video_90"]["width"] == 48
    verify(tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"crop": (0.5, 0, 0.4, 1)},
            "--crop must be x0,y0,x1,y1 from 0 to 1, .* got 0.5,0,0.4,1",
        ),
        ({"crop": (0, 0, 1)}, "--crop must"),
        (
            {"margin": (1, 2, 3)},
            "--margin must be top,right,bottom,left in pixels, .* got 1,2,3",
        ),
        ({"margin": (1, 2, 3, -4)}, "--margin must"),
        (
            {"clips_per_shard": 3, "mb_per_shard": 3.0},
            "one of --clips_per_shard and --mb_per_shard must be given, got both",
        ),
        ({"fps": 0.0}, "--fps must be from 0.1 to 480"),
        ({"gop": 3}, "--gop and --crf must be used with --clip_format=h264"),
        ({"clip_format": "webp"}, "--clip_format must be mjpeg or h264"),
        ({"clip_format": "h264", "crf": 60}, "--crf must be from 0 to 51"),
    ],
)
def test_wrong_options_are_refused(given, sentence):
    with pytest.raises(UserError, match=sentence):
        Options(**given)


def test_the_command_line_passes_all_options(noisy, tmp_path):
    words = [
        "manifest",
        f"--source={noisy}",
        f"--out={tmp_path / 'out'}",
        "--language=en",
        "--workers=1",
    ]
    words += [
        "--crop=0,0,0.5,1",
        "--margin=1,2,3,4",
        "--fps=12.5",
        "--splits=dev",
        "--mb_per_shard=1",
    ]
    command = [sys.executable, str(ROOT / "shards" / "build.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = read_manifest(tmp_path / "out")["options"]
    assert found["crop"] == [0.0, 0.0, 0.5, 1.0] and found["margin"] == [1, 2, 3, 4]
    assert found["fps"] == 12.5
    assert (found["mb_per_shard"], found["clips_per_shard"]) == (1.0, None)
    assert not {"workers", "restart"} & found.keys()
