"""Check a shard folder against its index: python shards/verify.py FOLDER (see --help).

Prints one line for each fault and exits with code 1, or prints one line if there is no
fault.
"""

from pathlib import Path
from typing import Literal

from flallm_ds.data.index import check_video, read_manifest
from flallm_ds.errors import UserError
from flallm_ds.sharding import stats
from flallm_ds.sharding.check import Report, check
from flallm_ds.sharding.repair import SCRATCH, repair_folder


class ShardFault(UserError):
    """Raised if the shards do not match their index. The exit code is 1."""

    exit_code = 1


def verify(
    folder: Path,
    *,
    workers: int = 0,
    repair: Literal["drop", "rebuild"] | None = None,
    source: Path | None = None,
) -> None:
    """Check tars, checksums, tables, every clip and its JSON, and decode every frame.

    In a folder of cached features, check the features of every clip. Also print overlaps
    between splits: notes for signers and texts, warnings for source videos.

    --workers: number of processes; 0 for one per core.
    --repair: `rebuild` builds broken tars again from the corpus, identical to the originals; `drop`
        removes broken clips from tars and index. Both restore a lost table from undamaged tars. Do
        not read the folder during a repair. A killed repair can be started again.
    --source: with --repair=rebuild, the --source of the build.
    """
    if (repair == "rebuild") != (source is not None):
        raise UserError(
            "--repair=rebuild and --source must be given together, got only one of them. "
            "Add the other."
        )
    # Cached features have no corpus to rebuild from, and are quickly computed again.
    if repair is not None:
        remedy = "Repair the source shards if they are broken, remove the broken tars of "
        remedy += "features, and run the same launch/features.py command again"
        check_video(read_manifest(folder), folder, "--repair", remedy)
    report = check(folder, workers)
    # A killed repair leaves its temporary folder, even if the shards have no fault.
    if repair is not None and (report.faults or (folder / SCRATCH).exists()):
        for sentence in report.sentences:
            print(sentence)
        report = repair_folder(folder, report, source, workers)
    for sentence in report.sentences:
        print(sentence)
    _print_overlaps(report)
    if report.faults:
        raise ShardFault(
            f"Shards must match their index, got {len(report.sentences):,} fault(s) in "
            f"{folder}, the first: {report.sentences[0]} See --repair in docs/data.md."
        )
    # Without faults, the numbers in index.json are those of the tables and tars.
    entries = report.manifest["splits"].values()
    num_clips = sum(entry["clips"] for entry in entries)
    num_frames = sum(entry["frames"] for entry in entries)
    size = sum(tar.shard.bytes for tar in report.tars)
    print(
        f"all is well: {num_clips:,} clips, {num_frames:,} frames, {len(report.tars):,} "
        f"shards, {size / 1e6:,.1f} MB"
    )


def _print_overlaps(report: Report) -> None:
    """Print the common source videos, signers and texts of each pair of splits."""
    # Clips of one video in two splits make scores too high. Common signers and texts are
    # normal.
    leaks = stats.leakage_notes(report.splits)
    for note in stats.overlap_notes(report.splits):
        kind = "warning" if note in leaks else "note"
        print(f"{kind}: {note}")
