"""The default folder of the cache on a laptop, on a cluster node, and on a node without a disk."""

import os
from pathlib import Path

import pytest

from flallm_ds.data.storage.store import open_store
from flallm_ds.local_disk import cache_folder, existing, file_system, own_path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def mounts(tmp_path: Path, **types: str) -> Path:
    """A table of file systems: the root is ext4, and the type of each named folder."""
    lines = ["/dev/sda / ext4 rw 0 0"]
    for name, kind in types.items():
        lines.append(f"server:/x {tmp_path / name} {kind} rw 0 0")
    table = tmp_path / "mounts"
    table.write_text("\n".join(lines) + "\n")
    return table


def test_a_home_on_a_disk_keeps_the_cache_after_a_reboot(
    home: Path, tmp_path: Path
) -> None:
    env = {"TMPDIR": str(tmp_path), "SLURM_TMPDIR": str(tmp_path)}
    assert cache_folder(env, mounts(tmp_path)) == home / ".cache" / "flallm_ds"


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.gpfs"])
def test_a_home_on_the_network_is_not_used_where_a_machine_has_a_disk(
    home: Path, tmp_path: Path, kind: str
) -> None:
    table = mounts(tmp_path, home=kind)
    (tmp_path / "job").mkdir()
    scratch = own_path(tmp_path) / "cache"
    assert cache_folder({"TMPDIR": str(tmp_path)}, table) == scratch
    # The folder of the job has precedence.
    env = {"TMPDIR": str(tmp_path), "SLURM_TMPDIR": str(tmp_path / "job")}
    assert cache_folder(env, table) == own_path(tmp_path / "job") / "cache"
    assert own_path(tmp_path).stat().st_mode & 0o777 == 0o700


def test_memory_is_no_disk(home: Path, tmp_path: Path) -> None:
    """A cache in a tmpfs would take the memory of the run."""
    (tmp_path / "memory").mkdir()
    (tmp_path / "disk").mkdir()
    table = mounts(tmp_path, home="nfs4", memory="tmpfs")
    env = {
        "SLURM_TMPDIR": str(tmp_path / "memory"),
        "TMPDIR": str(tmp_path / "disk"),
    }
    assert cache_folder(env, table) == own_path(tmp_path / "disk") / "cache"
    assert not own_path(tmp_path / "memory").exists()


def test_without_a_disk_the_cache_is_in_the_home(home: Path, tmp_path: Path) -> None:
    table = tmp_path / "mounts"
    table.write_text("overlay / nfs4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n")
    env = {"TMPDIR": str(tmp_path)}
    assert cache_folder(env, table) == home / ".cache" / "flallm_ds"


def test_a_full_disk_is_used_only_by_the_cache_that_filled_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run would leave its cache when it has grown."""
    table = mounts(tmp_path, home="nfs4")
    env = {"TMPDIR": str(tmp_path)}
    monkeypatch.setattr("flallm_ds.local_disk.LEAST_CACHE_BYTES", 1 << 60)
    monkeypatch.setattr("flallm_ds.local_disk.DEFAULT_TEMPORARY", str(tmp_path))
    assert cache_folder(env, table) == home / ".cache" / "flallm_ds"
    (own_path(tmp_path) / "cache").mkdir(parents=True, mode=0o700)
    own_path(tmp_path).chmod(0o700)
    assert cache_folder(env, table) == own_path(tmp_path) / "cache"


def test_the_environment_names_the_cache(home: Path, tmp_path: Path) -> None:
    env = {"FLALLM_CACHE": "~/mine", "TMPDIR": str(tmp_path)}
    assert cache_folder(env, mounts(tmp_path, home="nfs4")) == home / "mine"


def test_a_store_uses_the_default(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLALLM_CACHE", raising=False)
    store = open_store("https://127.0.0.1:1/shards")
    assert store._cache.folder == cache_folder(os.environ)  # type: ignore[attr-defined]


def test_the_type_of_a_file_system_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    (tmp_path / "a b" / "c").mkdir(parents=True)
    table = tmp_path / "mounts"
    place = str(tmp_path / "a b").replace(" ", "\\040")
    table.write_text(f"x {place} nfs4 rw 0 0\nx / ext4 rw 0 0\nx {place} xfs rw 0 0\n")
    assert file_system(tmp_path / "a b" / "c" / "new", table) == "xfs"
    assert file_system(tmp_path / "other", table) == "ext4"
    assert file_system(tmp_path, tmp_path / "no table") == ""
    assert file_system(Path("/dev/shm")) == "tmpfs"


def test_the_nearest_parent_of_a_new_path_is_found(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path and existing(tmp_path) == tmp_path
