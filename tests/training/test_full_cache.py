"""A full disk of the cache ends a run on all ranks with a sentence."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers.http_server import Server
from tests.helpers.launching import flags, launch, tiny_options
from tests.helpers.paths import ROOT


def test_a_full_disk_of_the_cache_ends_all_ranks_with_one_sentence(
    tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tiny_corpus / "shards"
    tars = [tar.stat().st_size for tar in shards.glob("train-*.tar")]
    tables = [path.stat().st_size for path in shards.iterdir() if path.suffix != ".tar"]
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for the tables and half of a tar.
    size = f"size={sum(tables) + 50_000 + min(tars) // 2}"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        monkeypatch.setenv("FLALLM_CACHE", str(disk / "cache"))
        with Server(shards) as server:
            options = tiny_options(
                tiny_corpus, "visual", tmp_path / "run", **{"data.shards": server.url}
            )
            train = ROOT / "launch" / "train.py"
            done = launch(train, *flags("visual", options), timeout_s=600)
        assert done.returncode not in (0, None)
        sentence = "error: Cannot write to the cache: No space left on device. Free some"
        assert sentence in done.stdout and "Traceback" not in done.stdout, done.stdout
    finally:
        subprocess.run(["umount", str(disk)], check=True)
