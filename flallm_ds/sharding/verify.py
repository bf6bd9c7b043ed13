"""Every byte of a shard folder against its index: python shards/verify.py FOLDER (see its
--help).

Prints one line for each fault and exits with 1, or prints one line that says that all is
well.
"""

from pathlib import Path
from typing import Literal

from flallm_ds.data.index import check_video, read_manifest
from flallm_ds.errors import UserError
from flallm_ds.sharding import stats
from flallm_ds.sharding.check import Report, check
from flallm_ds.sharding.repair import SCRATCH, mend


class ShardFault(UserError):
    """The shards are not what their index says."""

    exit_code = 1


def verify(
    folder: Path,
    *,
    workers: int = 0,
    repair: Literal["drop", "rebuild"] | None = None,
    source: Path | None = None,
) -> None:
    """Check tars, their checksums, tables, each clip and its JSON, and that every frame decodes.

    Of a folder of features, that every clip's are whole. What splits share is said too:
    signers and texts in notes, source videos in warnings.

    --workers: processes, 0 for one a core.
    --repair: `rebuild` makes broken tars again from the corpus, byte by byte as they were; `drop`
        takes broken clips out of tars and index. Both restore a lost table from whole tars. Let
        nothing read the folder meanwhile. It may be killed at any moment and started again.
    --source: with --repair=rebuild, the corpus, as it was given to build.py.
    """
    if (repair == "rebuild") != (source is not None):
        raise UserError(
            "--repair=rebuild and --source must be given together, but one is missing."
        )
    if repair is not None:
        remedy = "Remove broken tars and run launch/features.py as before"
        remedy += "; mend a broken source first"
        check_video(read_manifest(folder), folder, "--repair", remedy)
    report = check(folder, workers)
    # A repair that was killed leaves its folder, perhaps next to shards without a fault.
    if repair is not None and (report.faults or (folder / SCRATCH).exists()):
        for sentence in report.sentences:
            print(sentence)
        report = mend(folder, report, source, workers)
    for sentence in report.sentences:
        print(sentence)
    _print_overlaps(report)
    if report.faults:
        raise ShardFault(
            f"shards must be as their index says, but {folder} has "
            f"{len(report.sentences):,} fault(s), the first: {report.sentences[0]} See "
            "--repair in docs/data.md."
        )
    entries = report.manifest["splits"].values()
    num_clips = sum(entry["clips"] for entry in entries)
    num_frames = sum(entry["frames"] for entry in entries)
    size = sum(tar.shard.bytes for tar in report.tars)
    print(
        f"all is well: {num_clips:,} clips, {num_frames:,} frames, {len(report.tars):,} "
        f"shards, {size / 1e6:,.1f} MB"
    )


def _print_overlaps(report: Report) -> None:
    # Clips of one video in two splits make scores too good. Signers and texts often recur.
    leaks = stats.leakage_notes(report.splits)
    for note in stats.overlap_notes(report.splits):
        kind = "warning" if note in leaks else "note"
        print(f"{kind}: {note}")
