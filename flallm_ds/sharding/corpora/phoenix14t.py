"""Read RWTH-PHOENIX-Weather 2014 T: German weather forecasts in sign language.

The frames are PNG at 25 fps, 210x260, squeezed from 210x300. By default they are stored at
210x260, because training scales them to a square anyway. Texts are kept as they are in the
tables (lower case, no final period). Tables in which every sentence ends in " ." score
about 1.1 BLEU-4 higher; this is a matter of the metric, so the shards do not hide it.
"""

import re
from pathlib import Path

from flallm_ds.data.codecs.video import image_paths
from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import SIGNSIM_FILE, Corpus, Row, check_text, read_table

FPS = 25.0
# The README of the release: "to undistort stretch images to 210x300".
UNDISTORTED_HW = (300, 210)
_COLUMNS = ("name", "video", "speaker", "orth", "translation")
# Possible places of the folder PHOENIX-2014-T below the source.
_ROOTS = ("", "PHOENIX-2014-T", "PHOENIX-2014-T-release-v3/PHOENIX-2014-T")


def read(source: Path, splits: tuple[str, ...], *, stretch: bool = False) -> Corpus:
    """PHOENIX14T. --source: the release, its PHOENIX-2014-T folder, or the folder above it.

    --stretch=true stores undistorted frames, 210x300 instead of the squeezed 210x260.
    """
    # The synthetic corpus has the same layout, and must not be mistaken for the real one.
    for folder in (source.resolve(), *source.resolve().parents[:2]):
        if (folder / SIGNSIM_FILE).is_file():
            raise UserError(
                "--source must be the PHOENIX14T release, got the synthetic corpus in "
                f"{folder}. Run shards/build.py signsim --source={folder}."
            )
    return read_release(source, splits, stretch)


def read_release(source: Path, splits: tuple[str, ...], stretch: bool = False) -> Corpus:
    """Read any corpus in the layout of PHOENIX14T."""
    root = find_root(source)
    frames = root / "features" / "fullFrame-210x260px"
    rows, notes = {}, []
    for split in splits:
        table = root / "annotations" / "manual" / f"PHOENIX-2014-T.{split}.corpus.csv"
        rows[split] = read_rows(table, frames / split, UNDISTORTED_HW if stretch else None)
        num_dots = sum(row.text.endswith(" .") for row in rows[split])
        if num_dots:
            what = f'{num_dots:,} texts end in " ." and are kept so'
            notes.append(f"{split}: {what}; the usual table has none")
    return Corpus("phoenix14t", "de", rows, notes)


def find_root(source: Path) -> Path:
    """Find the folder PHOENIX-2014-T: the source, or one or two levels below it."""
    for name in _ROOTS:
        if (source / name / "annotations" / "manual").is_dir():
            return source / name
    raise UserError(
        "--source must be the PHOENIX14T release with annotations/manual in it or in "
        f"{_ROOTS[-1]} below it, got {source}. Set it to PHOENIX-2014-T-release-v3."
    )


def read_rows(
    table: Path, frames: Path, stretch_hw: tuple[int, int] | None = None
) -> list[Row]:
    """Read the rows of one table, with `|` between fields and no quoting.

    frames: the folder with a folder of frames for each clip.
    """
    rows = []
    for line, fields in read_table(table, "|", _COLUMNS, quoted=False):
        text = fields["translation"].strip()
        check_text(text, f"{table}, line {line}: translation")
        # The name of a clip is the name of its broadcast with a number.
        broadcast = re.sub(r"-[0-9]+$", "", fields["name"])
        rows.append(
            Row(
                id=fields["name"],
                path=_frame_folder(frames, fields["video"] or fields["name"]),
                text=text,
                language="de",
                signer=fields["speaker"],
                video=broadcast,
                gloss=fields["orth"].strip(),
                image_fps=FPS,
                stretch_hw=stretch_hw,
            )
        )
    return rows


def _frame_folder(frames: Path, pattern: str) -> Path:
    """Find the folder of `<name>/1/*.png`; most copies have no `/1`.

    Raises UserError if both folders contain images.
    """
    # Remove the "*.png" at the end, and the "1" before it.
    named = frames / re.sub(r"/[^/]*\*[^/]*$", "", pattern)
    clip = named.parent if named.name == "1" else named
    if not (clip / "1").is_dir():
        return clip
    # The images decide, not the table: an empty "1" may be left over.
    below, above = image_paths(clip / "1"), image_paths(clip)
    if below and above and not (clip / "1").samefile(clip):
        raise UserError(
            f"A clip must have one folder of frames, got two: {clip} and {clip / '1'}. Move "
            "one of them away."
        )
    return clip if above else clip / "1"
