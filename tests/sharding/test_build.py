import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import av
import pytest
import simplejpeg
import webdataset

from flallm_ds.data.codecs.avi import frame_spans
from flallm_ds.data.codecs.video import read_frames
from flallm_ds.data.index import iter_rows, load_index, read_manifest
from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from tests.helpers.paths import ROOT
from tests.helpers.trees import make_how2sign, make_phoenix, write_frames, write_video


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "shards" / "build.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)


def options(**given) -> Options:
    return Options(**{"workers": 1} | given)


def tree(folder: Path) -> dict[str, str]:
    """Return the digest of each file of a folder, by name."""
    found = {}
    for path in folder.iterdir():
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def siblings(out: Path) -> list[str]:
    """Return the names next to the output folder that begin with its name."""
    return [path.name for path in out.parent.iterdir() if path.name.startswith(out.name)]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return make_phoenix(tmp_path_factory.mktemp("phoenix"))


@pytest.fixture(scope="module")
def built(release, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "shards"
    build("phoenix14t", release, out, options(clips_per_shard=3))
    return out


def test_every_clip_is_at_the_place_in_the_index(built, release):
    for split, count in (("train", 7), ("dev", 2), ("test", 2)):
        index = load_index(built, split)
        assert len(index) == count and index.corpus == "phoenix14t"
        index.check_files()
        for row in iter_rows(index):
            with index.shard_path(row["shard"]).open("rb") as file:
                file.seek(row["offset"])
                member = file.read(row["size"])
            spans = frame_spans(member)
            number = int(row["id"].rpartition("-")[2]) - 1
            assert len(spans) == row["num_frames"] == number + 1
            assert (row["height"], row["width"], row["fps"]) == (26, 21, 25.0)
            assert row["text"] == f'am tag {number} "schönes" wetter'
            assert "." not in row["key"]
            pictures = release / "PHOENIX-2014-T" / "features" / "fullFrame-210x260px"
            images = read_frames(pictures / split / row["id"])
            for (offset, size), image in zip(spans.tolist(), images, strict=True):
                stored = simplejpeg.decode_jpeg(member[offset : offset + size])
                assert abs(stored.astype(int) - image).max() <= 2


def test_training_clips_are_shuffled_and_evenly_spread(built):
    assert [shard.clips for shard in load_index(built, "train").shards] == [2, 2, 3]
    keys = list(load_index(built, "train").strings("key"))
    assert sorted(keys) == [f"{number:08d}" for number in range(7)] and keys != sorted(keys)
    assert list(load_index(built, "dev").strings("key")) == ["00000000", "00000001"]


def test_webdataset_reads_the_tars(built):
    urls = sorted(str(path) for path in built.glob("train-*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 7
    for sample in samples:
        facts = json.loads(sample["json"])
        assert facts["gloss"].startswith("TAG") and facts["language"] == "de"
        with av.open(io.BytesIO(sample["avi"])) as container:
            assert sum(1 for _ in container.decode(video=0)) == facts["num_frames"]


def test_tars_hold_no_time_and_no_owner(built):
    with tarfile.open(built / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert [member.name[8:] for member in members] == [".avi", ".json"] * 2
    for member in members:
        owner = (member.uid, member.gid, member.uname)
        assert (member.mtime, owner, member.mode) == (0, (0, 0, ""), 0o644)


def test_shards_are_readable_for_all_users_and_no_other_file_is_left(built):
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in built.iterdir())
    assert siblings(built) == [built.name]


def test_one_worker_and_two_make_the_same_bytes(built, release, tmp_path):
    build("phoenix14t", release, tmp_path / "two", Options(workers=2, clips_per_shard=3))
    assert tree(tmp_path / "two") == tree(built)


def test_limit_takes_the_first_rows_of_each_split(release, tmp_path):
    build("phoenix14t", release, tmp_path / "out", options(limit=1))
    splits = read_manifest(tmp_path / "out")["splits"]
    assert [entry["clips"] for entry in splits.values()] == [1, 1, 1]


def test_the_command_line_builds_verifies_and_reports(tmp_path):
    release = make_phoenix(tmp_path / "source", counts=(3, 1, 1))
    done = run(
        "phoenix14t",
        f"--source={release}",
        f"--out={tmp_path / 'out'}",
        "--clips_per_shard=1",
        "--workers=2",
    )
    assert done.returncode == 0, done.stderr
    assert "train         3           6" in done.stdout and "share" in done.stdout
    again = run(
        "phoenix14t", "--source", release, "--out", tmp_path / "out", "--clips_per_shard=1"
    )
    assert again.returncode == 0 and "already built: 5 shards" in again.stdout, again.stderr
    other = run(
        "phoenix14t", "--source", release, "--out", tmp_path / "out", "--quality=80"
    )
    assert other.returncode == 2 and other.stderr.count("\n") == 1, other.stderr
    changes = "(--quality 90, got 80; --clips_per_shard 1, got 128)"
    assert f"belongs to another build {changes}" in other.stderr
    verify = subprocess.run(
        [sys.executable, str(ROOT / "shards" / "verify.py"), str(tmp_path / "out"), "--workers=2"],
        capture_output=True, text=True, cwd="/", timeout=120,
    )  # fmt: skip
    assert verify.returncode == 0, verify.stderr
    assert "all is well: 5 clips, 8 frames" in verify.stdout


def test_help_lists_every_option_of_a_corpus():
    done = run("how2sign", "--help")
    assert done.returncode == 0
    for name in ("source", "out", "repair_mojibake"):
        assert f"--{name}" in done.stdout
    assert "--short_side" not in done.stdout  # listed once, for all corpora
    shared = run("--help").stdout
    for name in ("short_side", "max_skipped"):
        assert shared.count(f"--{name}:") == 1
    wrong = run("how2sign", "--source=/", "--out=/tmp/x", "--short_sid=3")
    assert wrong.returncode == 2 and "short_side" in wrong.stderr


def test_how2sign_clips_are_cut_at_the_realigned_times(tmp_path):
    source = make_how2sign(tmp_path / "source", raw=True)
    build(
        "how2sign",
        source,
        tmp_path / "out",
        options(splits=("train",)),
        repair_mojibake=True,
    )
    rows = {row["id"]: row for row in iter_rows(load_index(tmp_path / "out", "train"))}
    assert [rows[name]["num_frames"] for name in sorted(rows)] == [5, 10, 7, 10]
    assert rows["-aB_1-5-rgb_front"]["text"] == "My horse’s nose."
    notes = "\n".join(read_manifest(tmp_path / "out")["notes"])
    assert "train: 1 clips end past their video's end and were cut there (-ab_1" in notes


def test_how2sign_clips_that_are_already_cut_are_stored_completely(tmp_path):
    source = make_how2sign(tmp_path / "source", raw=False)
    build("how2sign", source, tmp_path / "out", options(splits=("train",)))
    rows = list(iter_rows(load_index(tmp_path / "out", "train")))
    rows.sort(key=lambda row: row["id"])
    assert [row["num_frames"] for row in rows] == [4, 5, 6, 7]


def test_a_manifest_of_videos_and_folders_is_built_with_bounding_boxes(tmp_path):
    write_video(tmp_path / "a b.mp4", 12)
    write_frames(tmp_path / "frames", 3)
    (tmp_path / "m.csv").write_text(
        "video,text,start,end,split,bbox\n"
        'a b.mp4,one,0.2,0.6,train,"0,0,0.5,1"\na b.mp4,two,,,train,\nframes,three,,,test,\n'
    )
    build(
        "manifest",
        tmp_path / "m.csv",
        tmp_path / "out",
        options(short_side=24),
        language="en",
    )
    train = {row["text"]: row for row in iter_rows(load_index(tmp_path / "out", "train"))}
    for text, shape in (("one", (4, 36, 24)), ("two", (12, 24, 32))):
        row = train[text]
        assert (row["num_frames"], row["height"], row["width"]) == shape
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest["splits"]) == ["train", "test"]
    assert "dev: has no rows, left out" in manifest["notes"]


def test_a_row_without_frames_stops_the_build_and_no_file_is_left(tmp_path):
    release = make_phoenix(tmp_path / "source")
    shutil.rmtree(next(release.rglob("train/*tagesschau-3")))
    with pytest.raises(
        UserError,
        match=r"^Cannot use 1 of 11 rows, 1 without video: train 01April.*tagesschau-3 .*"
        "--max_skipped",
    ):
        build("phoenix14t", release, tmp_path / "out", options())
    assert siblings(tmp_path / "out") == []


def test_skipped_rows_are_counted_and_listed(tmp_path, capsys):
    release = make_phoenix(tmp_path / "source")
    shutil.rmtree(next(release.rglob("train/*tagesschau-3")))
    next(release.rglob("dev/*tagesschau-1/images0001.png")).write_bytes(b"\x89PNG broken")
    table = next(release.rglob("*test.corpus.csv"))
    table.write_text(
        table.read_text(encoding="utf-8").replace('am tag 1 "schönes" wetter', " "),
        encoding="utf-8",
    )
    build("phoenix14t", release, tmp_path / "out", options(max_skipped=3))
    manifest = read_manifest(tmp_path / "out")
    assert {kind: entry["count"] for kind, entry in manifest["skipped"].items()} == {
        "without video": 1, "without text": 1, "cannot be decoded": 1
    }  # fmt: skip
    assert [entry["clips"] for entry in manifest["splits"].values()] == [6, 1, 1]
    assert "skipped, cannot be decoded: 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 without video, 1 without text"):
        build("phoenix14t", release, tmp_path / "out2", options(max_skipped=1))


def test_text_that_cannot_be_written_is_a_skipped_row(tmp_path, capsys):
    """JSON may contain half of a surrogate pair, and an impossible file name."""
    write_video(tmp_path / "a.mp4", num_frames=9)
    lines = [
        {"video": "a.mp4", "text": "gut"},
        {"video": "a.mp4", "text": "halb \ud83d"},
        {"video": "a\0.mp4", "text": "gut"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build(
        "manifest",
        tmp_path / "m.jsonl",
        tmp_path / "out",
        options(max_skipped=2),
        language="de",
    )
    assert list(load_index(tmp_path / "out", "train").strings("text")) == ["gut"]
    said = capsys.readouterr()
    assert "holds half a character: 'halb \\ud83d'" in said.out + said.err


def test_a_tar_without_clips_leaves_no_gap_in_the_numbers(tmp_path):
    release = make_phoenix(tmp_path / "source", counts=(1, 3, 1))
    next(release.rglob("dev/*tagesschau-1/images0001.png")).write_bytes(b"broken")
    build(
        "phoenix14t", release, tmp_path / "out", options(max_skipped=1, clips_per_shard=1)
    )
    index = load_index(tmp_path / "out", "dev")
    assert [shard.file for shard in index.shards] == ["dev-000000.tar", "dev-000001.tar"]
    assert index.arrays["shard"].tolist() == [0, 1]
    index.check_files()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corrupted_video_stops_the_build_and_is_named(tmp_path, workers, shared):
    for number in range(3):
        write_video(tmp_path / f"{number}.mp4", 3)
    lines = ["video,text,split", f"{shared}/edge_videos/corrupted.mp4,x,dev"]
    lines += [f"{number}.mp4,x,train" for number in range(3)]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"1 cannot be decoded: .*corrupted\.mp4") as caught:
        build(
            "manifest",
            tmp_path / "m.csv",
            tmp_path / "out",
            Options(workers=workers, clips_per_shard=1),
            language="en",
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_other_files_is_not_changed(tmp_path, release):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"with other files \(thesis\.txt\)"):
        build("phoenix14t", release, out, options())
    with pytest.raises(UserError, match="got the file"):
        build("phoenix14t", release, out / "thesis.txt", options())
    assert (out / "thesis.txt").read_text() == "mine" and siblings(out) == ["out"]


def test_an_empty_output_folder_is_used(tmp_path, release):
    (tmp_path / "out").mkdir()
    build("phoenix14t", release, tmp_path / "out", options(limit=1))
    assert (tmp_path / "out" / "index.json").is_file()


def test_a_missing_source_is_one_sentence(tmp_path):
    for corpus, own in (
        ("phoenix14t", {}),
        ("how2sign", {}),
        ("manifest", {"language": "de"}),
    ):
        with pytest.raises(UserError, match="--source must be an existing"):
            build(corpus, tmp_path / "nowhere", tmp_path / "out", options(), **own)
    assert siblings(tmp_path / "out") == []


@pytest.mark.parametrize(
    "given",
    [{"quality": 0}, {"short_side": 1}, {"splits": ("val",)}, {"limit": 0}, {"splits": ()}],
)
def test_impossible_options_are_refused(given):
    with pytest.raises(UserError, match="--"):
        Options(**given)


def test_the_real_how2sign_sample_builds_with_no_skip(shared, tmp_path):
    build(
        "how2sign",
        shared / "how2sign",
        tmp_path / "out",
        options(splits=("train",), limit=4, short_side=64),
    )
    index = load_index(tmp_path / "out", "train")
    assert len(index) == 4 and read_manifest(tmp_path / "out")["skipped"] == {}
    assert (index.arrays["height"] == 64).all()
    assert (index.arrays["fps"] == 24.0).all()


def test_the_real_phoenix_sample_builds(shared, tmp_path):
    build("phoenix14t", shared / "phoenix14t", tmp_path / "out", options())
    for split in ("train", "dev", "test"):
        (row,) = iter_rows(load_index(tmp_path / "out", split))
        assert (row["num_frames"], row["height"], row["width"]) == (2, 260, 210)
