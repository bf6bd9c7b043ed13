"""Tests of atomic files and folders, of locks between processes and of checksums."""

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from flallm_ds.errors import UserError
from flallm_ds.files import (
    file_sha256,
    locked,
    new_folder,
    new_lines,
    partial_of,
    recover_folders,
    replace_file,
    replace_folder,
    share_files,
    take_folder_lock,
    take_lock,
    write_file,
    write_json,
)
from tests.helpers.paths import ROOT


def test_shards_are_built_without_torch() -> None:
    code = (
        "import sys, flallm_ds.files, flallm_ds.sharding.build\n"
        "print(*[name for name in ('torch', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


# --- files


def test_a_replaced_file_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    replace_file(path, "one")
    replace_file(path, "zwei ä")
    assert path.read_text(encoding="utf-8") == "zwei ä" and list(tmp_path.iterdir()) == [
        path
    ]


def test_a_full_disk_is_an_error_with_the_filename_and_keeps_the_old_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.json"
    replace_file(path, "one")
    (tmp_path / ".partial-config.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*config\.json"):
        replace_file(path, "two")
    assert path.read_text() == "one"


def test_a_file_that_several_threads_write_is_always_complete(
    tmp_path: Path,
) -> None:
    path = tmp_path / "record.json"
    contents = [bytes([65 + number]) * 100_000 for number in range(8)]

    def write(number: int) -> bool:
        write_file(path, contents[number % 8])
        return path.read_bytes() in contents

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(64)))
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_compact_and_accepts_paths(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"path": tmp_path, "text": "ä"})
    assert (tmp_path / "a.json").read_text(
        "utf-8"
    ) == f'{{"path": "{tmp_path}", "text": "ä"}}'


# --- folders


def write_word(word: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "word").write_text(word)

    return write


def no_space(folder: Path) -> None:
    (folder / "word").write_text("new")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_replaced_folder_contains_only_the_new_content(tmp_path: Path) -> None:
    path = tmp_path / "run" / "best"
    replace_folder(path, write_word("old"))
    (path / "more").touch()
    replace_folder(path, write_word("new"))
    assert [p.name for p in path.iterdir()] == ["word"] and (
        path / "word"
    ).read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_replaced_folder_is_on_the_disk_before_the_old_one_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut, the new name must not stand for files of zero bytes."""
    path = tmp_path / "best"
    replace_folder(path, write_word("old"))
    real_sync, real_rename, real_rmtree = os.fsync, os.rename, shutil.rmtree
    calls: list[str] = []

    def fsync(handle: int) -> None:
        calls.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name}")
        real_sync(handle)

    def rename(old: Path, new: Path) -> None:
        calls.append(f"rename {Path(new).name}")
        real_rename(old, new)

    def rmtree(folder: Path, **more: bool) -> None:
        calls.append(f"remove {folder.name}")
        real_rmtree(folder, **more)

    def write(folder: Path) -> None:
        (folder / "parts").mkdir()
        (folder / "parts" / "one").write_text("new")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    replace_folder(path, write)
    assert calls == [
        "remove .partial-best",
        "sync parts",
        "sync one",
        "sync .partial-best",
        "rename .old-best",
        "rename best",
        f"sync {tmp_path.name}",
        "remove .old-best",
    ]


def test_an_old_folder_stays_when_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "best"
    replace_folder(path, write_word("old"))
    with pytest.raises(OSError):
        replace_folder(path, no_space)
    assert (path / "word").read_text() == "old"
    replace_folder(path, write_word("new"))
    assert (path / "word").read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_a_tokenizer_is_saved_is_an_os_error(
    tmp_path: Path,
) -> None:
    """The tokenizers library raises a bare Exception."""
    tokenizer = Tokenizer(models.WordLevel())
    with pytest.raises(OSError, match="No space left on device") as caught:
        replace_folder(tmp_path / "tokenizer", lambda folder: tokenizer.save("/dev/full"))
    assert caught.value.errno == errno.ENOSPC and not (tmp_path / "tokenizer").exists()


def test_other_folders_with_similar_names_are_kept(tmp_path: Path) -> None:
    """`flallm export` writes to any folder of a user."""
    for name in (".old-data", "data", ".old-gone"):
        (tmp_path / name).mkdir()
    replace_folder(tmp_path / "model", write_word("new"))
    assert {p.name for p in tmp_path.iterdir()} == {
        ".old-data",
        "data",
        ".old-gone",
        "model",
    }


def test_a_folder_is_recovered_after_a_kill_between_the_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "best"
    replace_folder(path, write_word("old"))
    rename = Path.rename
    renamed: list[Path] = []

    def killed(self: Path, target: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            replace_folder(path, write_word("new"))
    assert not path.exists()
    recover_folders(path.parent)
    assert (path / "word").read_text() == "old"
    recover_folders(path.parent)  # with nothing to recover it changes nothing
    assert (path / "word").read_text() == "old"


def test_an_existing_folder_is_not_overwritten_by_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "best"
    for folder, word in ((path, "new"), (tmp_path / ".old-best", "old")):
        folder.mkdir()
        (folder / "word").write_text(word)
    recover_folders(path.parent)
    assert (path / "word").read_text() == "new"


def test_a_new_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "corpora" / "out"
    with new_folder(path) as folder:
        write_word("new")(folder)
        assert not path.exists()
    assert (path / "word").read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_a_new_folder_is_removed_on_failure(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space left"),
        new_folder(tmp_path / "out") as folder,
    ):
        no_space(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_replaces_only_an_empty_folder(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    with new_folder(path) as folder:
        write_word("mine")(folder)
    with pytest.raises(OSError, match="not empty"), new_folder(path) as folder:
        write_word("other")(folder)
    assert (path / "word").read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_permissions_of_files_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in ("one", "parts/two"):
        (tmp_path / name).touch(mode=0o600)
    before = os.umask(0o027)
    try:
        share_files(tmp_path)
        assert os.umask(0o027) == 0o027, "the umask must not change"
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("one", "parts/two")]
    assert modes == [0o640, 0o640]


# --- locks


HOLD = """
import sys, time
from pathlib import Path
from flallm_ds.files import locked
with locked(Path(sys.argv[1]), "the run", "use another"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds tmp_path/run/.lock until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"SLURM_JOB_ID": "4711", "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def take(path: Path) -> None:
    with locked(path, "Run folder run", "use another --run=FOLDER"):
        pass


def test_the_error_of_a_second_process_names_the_holder(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    lock = tmp_path / "run" / ".lock"
    before = lock.read_bytes(), lock.stat().st_mtime_ns
    with pytest.raises(UserError) as caught:
        take(lock)
    described = f"process {holder.pid} on {socket.gethostname()} (SLURM job 4711) since 20"
    assert str(caught.value).startswith(f"Run folder run is in use by {described}")
    assert str(caught.value).endswith("Wait for it or end it, or use another --run=FOLDER.")
    assert (lock.read_bytes(), lock.stat().st_mtime_ns) == before, (
        "the lock file must not change"
    )


def test_a_lock_is_released_by_kill_9(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    """The content that the killed process left in the file does not matter."""
    lock = tmp_path / "run" / ".lock"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert "4711" in lock.read_text()
    take(lock)
    assert not lock.exists()


def test_a_released_lock_leaves_no_files(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.communicate("")
    assert holder.returncode == 0
    assert list(tmp_path.iterdir()) == [], "the folder was made for the lock"
    (tmp_path / "mine").mkdir()
    with (
        pytest.raises(ValueError, match="failed"),
        locked(tmp_path / "mine" / ".lock", "it", "wait"),
    ):
        raise ValueError("failed")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"pid": 1}'])
def test_the_content_of_a_lock_file_does_not_decide_who_holds_it(
    tmp_path: Path, holder: subprocess.Popen[str], content: bytes
) -> None:
    lock = tmp_path / "run" / ".lock"
    lock.write_bytes(content)
    with pytest.raises(UserError, match="Run folder run is in use by another process"):
        take(lock)
    other = tmp_path / "other"
    other.write_bytes(content)
    take(other)


def test_a_file_system_without_flock_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock by the existence of a file would survive kill -9."""

    def unsupported(fd: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(
        UserError,
        match=r"has no flock .*or use another --run=FOLDER on another file system",
    ):
        take(tmp_path / "run" / ".lock")


def test_a_released_lock_can_be_taken_again_and_its_file_remains(
    tmp_path: Path,
) -> None:
    path = tmp_path / "work" / "lock"
    lock = take_lock(path)
    assert lock is not None and take_lock(path) is None
    lock.release()
    again = take_lock(path)
    assert again is not None and path.read_bytes() == b""
    again.release()


def test_a_lock_file_that_its_holder_removes_meanwhile_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    flock, calls = fcntl.flock, []

    def late(fd: int, how: int) -> None:
        if not calls:
            path.unlink()  # after it was opened, before it is locked
        calls.append(how)
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = take_lock(path)
    assert lock is not None and path.exists() and len(calls) == 2
    lock.release()


def test_a_folder_is_locked_without_a_lock_file(tmp_path: Path) -> None:
    handle = take_folder_lock(tmp_path)
    assert handle is not None and take_folder_lock(tmp_path) is None
    os.close(handle)
    again = take_folder_lock(tmp_path)
    assert again is not None and list(tmp_path.iterdir()) == []
    os.close(again)


# --- checksums


def test_the_checksum_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"tar" * 100_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"tar" * 100_000).hexdigest()


def test_a_fifo_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        file_sha256(tmp_path / "fifo")


def test_new_lines_appear_at_the_end_or_remain_under_the_temporary_name(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lines.txt"
    partial = partial_of(path)
    with new_lines(path) as lines:
        lines.write("one\n")
        assert partial.read_text() == "one\n" and not path.exists()
    assert path.read_text() == "one\n" and not partial.exists()
    with pytest.raises(ValueError, match="wrong"), new_lines(path) as lines:
        raise ValueError("wrong")
    assert path.read_text() == "one\n" and not partial.exists()
    with pytest.raises(KeyboardInterrupt), new_lines(path) as lines:
        lines.write("two\n")
        raise KeyboardInterrupt
    assert path.read_text() == "one\n" and partial.read_text() == "two\n"
