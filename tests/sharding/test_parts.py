"""Builds in parts give the bytes of one build."""

from pathlib import Path

import pytest

from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.partial import hold
from tests.helpers.trees import make_phoenix


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phoenix(tmp_path_factory.mktemp("phoenix"))


def make(release: Path, out: Path, part: str = "", **more: object) -> None:
    given = {"short_side": 16, "workers": 1, "clips_per_shard": 2} | more
    build("phoenix14t", release, out, Options(part=part, **given))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("limit", [{"clips_per_shard": 2}, {"mb_per_shard": 0.1}])
def test_three_parts_in_any_order_are_merged_to_the_bytes_of_one_build(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: dict
) -> None:
    size = {"clips_per_shard": None} | limit
    make(release, tmp_path / "whole", **size)
    out = tmp_path / "out"
    make(release, out, "2/3", **size)
    assert "part 2/3 is finished; not finished yet: 1/3, 3/3" in capsys.readouterr().out
    make(release, out, "3/3", **size)
    make(release, out, "3/3", **size)  # a job that was requeued
    assert not out.exists()
    make(release, out, "1/3", **size)
    assert "merging 3 parts" in capsys.readouterr().out
    assert len(list(out.glob("*.tar"))) >= 3
    assert content(out) == content(tmp_path / "whole")
    make(release, out, "1/3", **size)
    assert "already built" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_more_parts_than_shards_are_no_error(release: Path, tmp_path: Path) -> None:
    make(release, tmp_path / "whole", limit=1)
    for number in range(1, 6):
        make(release, tmp_path / "out", f"{number}/5", limit=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_parts_that_do_not_fit_are_refused(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(release, out, "1/2")
    with pytest.raises(
        UserError, match=r"Cannot merge .*: 2/2 missing or unfinished\. Run"
    ):
        make(release, out)
    with pytest.raises(UserError, match=r"1-of-2 was made with other settings \(--quality"):
        make(release, out, "1/2", quality=50)
    with pytest.raises(UserError, match=r"1-of-2 was made with other settings \(--quality"):
        make(release, out, "2/2", quality=50)
    make(release, out, "2/2", restart=True)
    assert out.is_dir()


def test_other_numbers_of_parts_are_not_mixed(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(release, out, "1/2")
    make(release, out, "1/3")
    with pytest.raises(UserError, match=r"the number of parts differs \(2 and 3\)"):
        make(release, out, "2/2")


def test_a_part_that_is_built_again_replaces_the_first(
    release: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make(release, tmp_path / "whole", quality=50)
    make(release, out, "1/2")
    make(release, out, "1/2", quality=50, restart=True)
    make(release, out, "2/2", quality=50)
    assert content(out) == content(tmp_path / "whole")


def test_two_parts_that_finish_together_merge_once(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make(release, out, "1/2")
    with hold(out):  # the other part, while it merges
        make(release, out, "2/2")
    assert "another process merges the parts" in capsys.readouterr().out
    assert not out.exists()
    make(release, out)
    assert out.is_dir()


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/2/3", "-1/2", "a/b"])
def test_a_wrong_part_is_refused(part: str) -> None:
    with pytest.raises(UserError, match=r"--part must be I/N with I from 1 to N"):
        Options(part=part)
