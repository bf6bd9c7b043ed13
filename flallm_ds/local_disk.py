"""Choose folders on a disk of this machine, for files that other machines do not need.

A home folder is often on a network disk: slow for many small files, and shared by machines
with different processors. This module must not import torch.
"""

import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from flallm_ds.errors import UserError

DEFAULT_TEMPORARY = "/tmp"
MOUNTS = Path("/proc/self/mounts")
# File systems on a disk of the machine. Others are on the network or in memory.
LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "overlay")
# A smaller disk is not worth a cache: a shard has about 1 GB, and 16 are mixed at a time.
LEAST_CACHE_BYTES = 20 * 10**9


def own_path(parent: str | Path) -> Path:
    """Return the path of this user's folder in a folder that all users share."""
    return Path(parent) / f"flallm_ds-{os.getuid()}"


def own_folder(parent: str | Path) -> Path:
    """Create this user's folder in a folder that all users share, and return its path.

    Raises UserError if it belongs to another user or if others can write to it, OSError if
    it cannot be created.
    """
    folder = own_path(parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    # Another user may have created this name: as a link, or to replace the libraries in
    # the folder by others.
    found = folder.lstat()
    is_private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022
    if not is_private or found.st_uid != os.getuid():
        raise UserError(
            f"{folder} must be a folder of this user that nobody else can write to, got "
            f"mode {stat.filemode(found.st_mode)} of user {found.st_uid}. Remove it, or set "
            "TMPDIR to another folder."
        )
    return folder


def temporary_folder(env: Mapping[str, str]) -> Path:
    """Return the folder for temporary files: $TMPDIR, or /tmp."""
    return Path(env.get("TMPDIR") or DEFAULT_TEMPORARY)


def cache_folder(env: Mapping[str, str], mounts: Path = MOUNTS) -> Path:
    """Return the default folder for the cache of remote shards.

    The first of $FLALLM_CACHE; ~/.cache/flallm_ds if the home is on a disk of this machine,
    where it stays after a reboot; a private folder in $SLURM_TMPDIR, $TMPDIR or /tmp, if
    that is on a disk with 20 GB of free space, or has such a cache; ~/.cache/flallm_ds.
    mounts: the table of file systems, as Linux writes it.
    """
    if env.get("FLALLM_CACHE"):
        return Path(env["FLALLM_CACHE"]).expanduser()
    home = Path.home() / ".cache" / "flallm_ds"
    if file_system(home, mounts) in LOCAL:
        return home
    for parent in (env.get("SLURM_TMPDIR"), env.get("TMPDIR"), DEFAULT_TEMPORARY):
        if parent and file_system(Path(parent), mounts) in LOCAL and _has_room(parent):
            try:
                return own_folder(parent) / "cache"
            except (OSError, UserError):
                continue  # not writable, or of another user
    return home


def _has_room(parent: str) -> bool:
    """Return whether a cache fits, or is there already and has taken the space."""
    return (own_path(parent) / "cache").is_dir() or free_bytes(
        Path(parent)
    ) >= LEAST_CACHE_BYTES


def file_system(path: Path, mounts: Path = MOUNTS) -> str:
    """Return the type of the file system of a path (ext4, nfs4), empty if it is not known.

    The path need not exist.
    """
    place = existing(path).resolve()
    # Of two mounts of one place, the later hides the earlier.
    longest, found = -1, ""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        _, mount, kind, *_ = line.split(" ")
        folder = Path(mount.replace("\\040", " "))
        if place.is_relative_to(folder) and len(folder.parts) >= longest:
            longest, found = len(folder.parts), kind
    return found


def free_bytes(path: Path) -> int:
    """Return the free space where a path is or will be, in bytes. Raises OSError."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
