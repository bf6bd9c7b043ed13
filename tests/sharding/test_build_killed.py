"""Tests of builds that are stopped at any time and continued."""

import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.helpers.paths import ROOT
from tests.helpers.trees import make_phoenix

BUILD = [sys.executable, str(ROOT / "shards" / "build.py")]


def make_corpus(folder: Path, counts=(40, 6, 4), num_frames: int = 10) -> Path:
    """Write a manifest of folders of noise, which takes about one second to build."""
    rng = np.random.default_rng(0)
    lines = ["video,text,split"]
    for split, count in zip(("train", "dev", "test"), counts, strict=True):
        for number in range(count):
            clip = folder / f"{split}{number}"
            clip.mkdir(parents=True)
            for frame in range(num_frames):
                cv2.imwrite(
                    str(clip / f"{frame}.png"),
                    rng.integers(0, 255, (200, 160, 3), np.uint8),
                )
            lines.append(f"{clip.name},text {number},{split}")
    (folder / "m.csv").write_text("\n".join(lines))
    return folder / "m.csv"


def words(source: Path, out: Path, *more: object) -> list[str]:
    given = [
        "manifest",
        f"--source={source}",
        f"--out={out}",
        "--language=en",
        "--clips_per_shard=3",
    ]
    workers = () if "--workers" in " ".join(map(str, more)) else ("--workers=1",)
    return [*BUILD, *given, *workers, *map(str, more)]


def run(*command: str, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, cwd="/", timeout=120, **more
    )


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file below a folder, by relative path."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def records(out: Path) -> dict[str, int]:
    """Return the time of each finished tar, 0 if it was moved to its final place."""
    times = {}
    for path in out.with_name(f"{out.name}.partial").glob("work/*-*.json"):
        tar = path.with_suffix(".tar")
        times[path.stem] = tar.stat().st_mtime_ns if tar.exists() else 0
    return times


def restore_signals() -> None:
    # The process that runs the tests may ignore these.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*command: str, num_records: int = 1, out: Path) -> subprocess.Popen[str]:
    """Start a build in its own process group, and wait until it has finished some tars.

    The build reacts to Ctrl-C. A process that a shell starts in the background would
    ignore it.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=restore_signals,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(records(out)) < num_records:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    return process


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    done = run(*words(source, out, "--workers=2"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    return out


def test_twenty_kills_at_random_moments_change_no_byte(source, undisturbed, tmp_path):
    expected = content(undisturbed)
    draws = random.Random(0)
    num_kills = num_whole = num_mid_way = 0
    length_s = 2.0
    # At least three kills must be in the middle of the work. On a slow machine, the first
    # kills may happen during the imports.
    while num_kills < 20 or num_mid_way < 3 or not num_whole:
        out = tmp_path / f"out{num_whole}"
        begin = time.monotonic()
        process = subprocess.Popen(
            words(source, out, f"--workers={1 + num_kills % 2}"),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            enough = num_kills >= 20 and num_mid_way >= 3
            error = process.communicate(
                timeout=60 if enough else draws.uniform(0.3, length_s)
            )[1]
            assert process.returncode == 0, error
            length_s = max(1.0, time.monotonic() - begin)
            assert content(out) == expected
            assert not out.with_name(f"{out.name}.partial").exists()
            num_whole += 1
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            num_kills += 1
            num_mid_way += bool(records(out))
            length_s *= 1.0 if records(out) else 1.3


# The process kills itself before each step that changes the disk, one step in each build.
EVERY_STEP = """
import os, shutil, signal, sys
from pathlib import Path
from flallm_ds.sharding.build import Options, build

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
stride, *parts = sys.argv[3:]  # parts: [""] for a build without
out = folder / "out"

def child(kill_at):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    steps = [0]
    def counted(function):
        def call(*args, **kwargs):
            steps[0] += 1
            if steps[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in ("fsync", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    for part in parts:
        options = Options(clips_per_shard=1, workers=1, short_side=16, part=part)
        build("phoenix14t", source, out, options)
    os._exit(0)

def content():
    assert [p.name for p in folder.iterdir()] == ["out"], list(folder.iterdir())
    return {p.name: p.read_bytes() for p in out.iterdir()}

assert child(0) == 0
expected = content()
shutil.rmtree(out)
for step in range(1, 1000, int(stride)):
    if child(step) == 0:
        break
    assert child(0) == 0, step
    assert content() == expected, step
    shutil.rmtree(out)
print(step - 1, "steps")
"""


# Two parts have twice as many steps as one build: every third one keeps the test short.
@pytest.mark.parametrize("words", [("1", ""), ("3", "1/2", "2/2")])
def test_a_kill_between_any_two_steps_on_the_disk_changes_no_byte(tmp_path, words):
    release = make_phoenix(tmp_path / "source", counts=(2, 1, 0))
    (tmp_path / "folder").mkdir()
    folder = str(tmp_path / "folder")
    done = run(sys.executable, "-c", EVERY_STEP, str(release), folder, *words)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-2]) > 40


def test_finished_shards_are_not_written_again(source, undisturbed, tmp_path):
    out = tmp_path / "out"
    process = start(*words(source, out, "--workers=2"), num_records=4, out=out)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = records(out)
    done = run(*words(source, out))
    assert done.returncode == 0, done.stderr
    assert "continuing an unfinished build: " in done.stdout
    assert content(out) == content(undisturbed)
    times = {path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(kept) >= 4 and set(kept.values()) <= times


@pytest.mark.parametrize(
    ("number", "code", "whole_group"),
    [
        (signal.SIGTERM, 143, False),
        (signal.SIGTERM, 143, True),
        (signal.SIGINT, 130, True),
        (signal.SIGHUP, 129, True),
    ],
)
def test_a_build_that_gets_a_signal_reports_what_it_keeps(
    source, undisturbed, tmp_path, number, code, whole_group
):
    out = tmp_path / "out"
    process = start(*words(source, out, "--workers=2"), num_records=2, out=out)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code, error
    assert "stopped: " in error and "Traceback" not in error
    assert f"results are kept in {out}.partial" in error
    assert "\r" not in error and "build: " in error, "progress in a log file is lines"
    assert not list((tmp_path / "out.partial" / "work").glob("*.tmp")) and not out.exists()
    assert run(*words(source, out)).returncode == 0 and content(out) == content(undisturbed)


def test_workers_exit_when_the_build_is_killed(source, tmp_path):
    out = tmp_path / "out"
    process = start(*words(source, out, "--workers=2"), out=out)
    # Only the parent process.
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "workers still run"
        time.sleep(0.05)
    process.communicate()


@pytest.fixture
def unfinished(source, tmp_path) -> Path:
    """Return the --out of a build that was killed after the first finished shard."""
    out = tmp_path / "out"
    process = start(*words(source, out), out=out)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return out


def test_other_options_are_refused_by_name_unless_restart_is_given(
    source, unfinished, tmp_path
):
    kept = content(tmp_path / "out.partial")
    done = run(*words(source, unfinished, "--quality=50", "--limit=9"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "settings (--quality 90, got 50; --limit none, got 9)" in done.stderr
    assert "--restart" in done.stderr
    assert content(tmp_path / "out.partial") == kept
    done = run(*words(source, unfinished, "--quality=50", "--limit=9", "--restart=true"))
    assert done.returncode == 0 and "continuing" not in done.stdout, done.stderr
    straight = run(*words(source, tmp_path / "straight", "--quality=50", "--limit=9"))
    assert straight.returncode == 0
    assert content(tmp_path / "straight") == content(unfinished)


def test_other_rows_are_refused(source, unfinished, tmp_path):
    other = source.with_name("other.csv")
    other.write_text(source.read_text().replace("text 3,train", "text three,train"))
    done = run(*words(other, unfinished))
    assert done.returncode == 2 and "(corpus m, got other)" in done.stderr, done.stderr
    before = source.read_text()
    try:
        source.write_text(other.read_text())
        done = run(*words(source, unfinished))
    finally:
        source.write_text(before)
    assert done.returncode == 2 and "(other rows in train)" in done.stderr, done.stderr


def test_a_video_that_changed_after_the_clip_was_finished_is_refused(tmp_path):
    source, out = make_corpus(tmp_path / "corpus", counts=(0, 40, 1)), tmp_path / "out"
    process = start(*words(source, out), out=out)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    made = source.parent / "dev0" / "3.png"
    changed = cv2.imread(str(made))[::-1].copy()
    cv2.imwrite(str(made), changed)
    done = run(*words(source, out))
    assert done.returncode == 2
    assert f"{made.parent} has changed since clip dev0 of dev" in done.stderr
    # A video may change before its clip is finished.
    shutil.rmtree(tmp_path / "out.partial")
    process = start(*words(source, out), out=out)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    cv2.imwrite(str(source.parent / "test0" / "3.png"), changed)
    assert run(*words(source, out)).returncode == 0
    assert run(*words(source, tmp_path / "straight")).returncode == 0
    assert content(out) == content(tmp_path / "straight")


def test_a_lost_shard_of_an_unfinished_build_is_refused(source, unfinished, tmp_path):
    min((tmp_path / "out.partial" / "work").glob("*.tar")).unlink()
    done = run(*words(source, unfinished))
    assert done.returncode == 2 and "--restart=true" in done.stderr
    assert "bytes, got no file." in done.stderr
    assert run(*words(source, unfinished, "--restart=true")).returncode == 0


def test_a_second_build_of_the_same_folder_is_refused(source, tmp_path):
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(*words(source, tmp_path / "out"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is in use by another build" in done.stderr


def test_a_partial_folder_that_no_build_made_is_not_changed(source, tmp_path):
    for name in ("thesis.txt", "work/thesis.txt"):
        path = tmp_path / "out.partial" / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        done = run(*words(source, tmp_path / "out", "--restart=true"))
        assert done.returncode == 2, done.stderr
        assert "must have only files of an unfinished build" in done.stderr
        assert path.read_text() == "mine"
        shutil.rmtree(tmp_path / "out.partial")


def test_a_continued_build_may_have_a_larger_max_skipped(tmp_path):
    source = make_corpus(tmp_path / "corpus", counts=(9, 3, 0), num_frames=2)
    (source.parent / "dev2" / "1.png").write_bytes(b"broken")
    done = run(*words(source, tmp_path / "out"))
    assert done.returncode == 2 and "1 cannot be decoded" in done.stderr
    assert "3 results are kept" in done.stderr
    done = run(*words(source, tmp_path / "out", "--max_skipped=1"))
    assert done.returncode == 0 and "9 of 12 clips are done" in done.stdout, done.stderr
    assert run(*words(source, tmp_path / "straight", "--max_skipped=1")).returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "straight")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_build_stops_when_too_many_rows_are_skipped(tmp_path, workers):
    """No shard exceeds the limit alone, so the parent process must add the counts."""
    source = make_corpus(tmp_path / "corpus", counts=(150, 3, 0), num_frames=6)
    for number in (0, 4):
        (source.parent / f"train{number}" / "1.png").write_bytes(b"broken")
    done = run(*words(source, tmp_path / "out", "--max_skipped=1", f"--workers={workers}"))
    assert done.returncode == 2 and "2 cannot be decoded" in done.stderr, done.stderr
    assert 1 <= len(records(tmp_path / "out")) < 40, "of 51"


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_continues_after_a_write_error(tmp_path, workers):
    """A limit on the file size acts as a full disk: only the small shard fits."""
    source = make_corpus(tmp_path / "corpus", counts=(0, 3, 8), num_frames=1)
    for number in range(8):
        # The other worker must finish the small shard before this one fails.
        for frame in range(1, 150):
            shutil.copy(
                source.parent / "test0" / "0.png",
                source.parent / f"test{number}" / f"{frame}.png",
            )
    out = tmp_path / "out"
    done = run(*words(source, out, f"--workers={workers}"), preexec_fn=small_files)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].count("File too large") == 1
    assert "Free some space" in done.stderr
    assert len(records(out)) == 1 and not list((tmp_path / "out.partial").rglob("*.tmp"))
    done = run(*words(source, out))
    assert done.returncode == 0 and "3 of 11 clips are done" in done.stdout, done.stderr
    assert run(*words(source, tmp_path / "straight")).returncode == 0
    assert content(out) == content(tmp_path / "straight")


def test_a_build_continues_after_a_full_disk(source, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in undisturbed.iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 2 // 3}", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a disk on this machine")
    try:
        done = run(*words(source, disk / "out"))
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "No space left on device" in done.stderr.splitlines()[-1]
        num_kept = len(records(disk / "out"))
        assert num_kept > 3
        subprocess.run(["mount", "-o", f"remount,size={size * 2}", str(disk)], check=True)
        done = run(*words(source, disk / "out"))
        assert done.returncode == 0 and "continuing" in done.stdout, done.stderr
        assert content(disk / "out") == content(undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
