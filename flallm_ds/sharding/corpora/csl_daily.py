"""Read CSL-Daily: Chinese sign language of daily life, folders of 512x512 JPEG frames.

The corpus needs a signed agreement. A text is the annotated characters joined together,
with their full-width punctuation. The annotation is a pickle; it is read by an unpickler
that cannot import anything. video_map.txt replaces the pickle where that is missing.
"""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from flallm_ds.data.codecs.sizes import Box
from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import (
    Corpus,
    Row,
    check_text,
    first_three,
    parse_split,
    read_table,
)

# Frame rate of the recordings (arXiv 2105.12397); the frames have no times.
FPS = 30.0
# The part of a frame below the black rows.
MARGIN: Box = (0.0, 80 / 512, 1.0, 1.0)
_FRAMES = (
    "sentence/frames_512x512",
    "sentences/frames_512x512",
    "sentence_frames-512x512/frames_512x512",  # before its parent folder
    "sentence_frames-512x512",
)
# A clip in the split file of every release, but in the frames and labels of some only.
_MISSING = "S000005_P0004_T00"


def read(source: Path, splits: tuple[str, ...], *, trim_margin: bool = True) -> Corpus:
    """CSL-Daily. --source: the folder that contains sentence_label and the frames.

    --trim_margin=false keeps the black margin at the top of each frame (rows 0 to 80 of
        512).
    """
    root = _find_root(source)
    frames = _find_frames(root)
    labels, table = read_labels(root / "sentence_label")
    rows: dict[str, list[Row]] = {split: [] for split in splits}
    absent: list[str] = []
    # The split file lists the clips; the labels contain their texts.
    split_table = root / "sentence_label" / "split_1.txt"
    listed = set()
    for line, fields in read_table(split_table, "|", ("name", "split"), quoted=False):
        name = fields["name"].strip()
        listed.add(name)
        split = parse_split(fields["split"], f"{split_table}, line {line}:")
        if split not in rows:
            continue
        if name not in labels or (name == _MISSING and not (frames / name).is_dir()):
            absent.append(name)
            continue
        text, gloss = labels[name]
        signer = re.search(r"_(P[0-9]+)_", name)
        rows[split].append(
            Row(
                id=name,
                path=frames / name,
                text=text,
                language="zh",
                signer=signer[1] if signer else "",
                video=name,
                gloss=gloss,
                bbox=MARGIN if trim_margin else None,
                image_fps=FPS,
            )
        )
    margin = "cut off" if trim_margin else "kept"
    notes = [
        f"labels from {table.name}",
        f"the black margin (rows 0 to 80 of 512) is {margin}",
    ]
    if absent:
        what = "clips of split_1.txt are not in this release"
        notes.append(f"{len(absent):,} {what} ({first_three(absent)})")
    unlisted = [name for name in labels if name not in listed]
    if unlisted:
        notes.append(
            f"{len(unlisted):,} labelled clips are in no split ({first_three(unlisted)})"
        )
    return Corpus("csl_daily", "zh", rows, notes)


def _find_frames(root: Path) -> Path:
    """Find the folder with a folder of frames for each clip.

    Raises UserError if there is none, or more than one.
    """
    found: list[Path] = []
    for name in _FRAMES:
        folder = root / name
        if not folder.is_dir() or not any(folder.iterdir()):
            continue
        if not _is_known(folder, found):
            found.append(folder)
    if not found:
        raise UserError(
            f"Cannot find frames in {root}: {', '.join(_FRAMES)} are missing or empty. "
            "Move the frames to one of them."
        )
    if len(found) > 1:
        raise UserError(
            f"The frames must be in one folder, got two: {found[0]} and {found[1]}. Move "
            "one of them away."
        )
    return found[0]


def _is_known(folder: Path, found: list[Path]) -> bool:
    """Return whether a folder is a link to a found folder, or its parent."""
    # sentence_frames-512x512 is not a second folder if frames_512x512 is in it.
    return any(other.samefile(folder) or folder in other.parents for other in found)


def read_labels(folder: Path) -> tuple[dict[str, tuple[str, str]], Path]:
    """Read csl2020ct_v2.pkl, or video_map.txt if the pickle is missing.

    Returns (text and gloss by clip name, the file that was read).
    """
    found: list[tuple[str, tuple[str, str]]] = []
    table = folder / "csl2020ct_v2.pkl"
    if table.is_file():
        for info in _read_infos(table):
            found.append((info["name"], _label(info, table)))
    else:
        table = folder / "video_map.txt"
        for _, fields in read_table(table, "|", ("name", "gloss", "char"), quoted=False):
            text, gloss = "".join(fields["char"].split()), " ".join(fields["gloss"].split())
            found.append((fields["name"].strip(), (text, gloss)))
    # A clip may be listed twice, with the same label.
    labels: dict[str, tuple[str, str]] = {}
    for name, label in found:
        if labels.setdefault(name, label) != label:
            raise UserError(
                f"{table}: a clip must have one label, got two that differ for {name}. "
                "Correct the table."
            )
        check_text(label[0], f"{table}: the text of {name}")
    return labels, table


def _label(info: dict[str, Any], table: Path) -> tuple[str, str]:
    """Return (text, gloss) of one clip. Each is stored as a string or a list of strings."""
    text = "".join(_words(info, "label_char", table))
    gloss = " ".join(_words(info, "label_gloss", table))
    return text.strip(), gloss.strip()


def _words(info: dict[str, Any], field: str, table: Path) -> Sequence[str]:
    """Return the strings of one field of a clip."""
    value = info.get(field)
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list | tuple) and set(map(type, value)) <= {str}:
        return value
    raise UserError(
        f"{table}: {field} of {info['name']} must be a string or a list of strings, got "
        f"{value!r:.80}. Download the file again."
    )


class _PlainUnpickler(pickle.Unpickler):
    """Read dicts, lists, strings and numbers. A pickle that imports anything is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it imports {module}.{name}")


# Exceptions that a damaged pickle raises.
_DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    OverflowError,
    RecursionError,
    MemoryError,  # a damaged length may be any number of bytes
)


def _read_infos(table: Path) -> list[dict[str, Any]]:
    """Read the entries of the clips from the pickle, without importing anything."""
    try:
        with table.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except OSError as error:
        raise UserError(
            f"Cannot read {table}: {error.strerror}. Check the file."
        ) from error
    except _DAMAGED as error:
        why = str(error) or "it is damaged"
        raise UserError(
            f"Cannot read {table} as a pickle of plain values: {why}. Download it again, "
            "or move it away: then video_map.txt is read."
        ) from error
    infos = content.get("info") if isinstance(content, dict) else None
    if not isinstance(infos, list) or not all(map(_has_name, infos)):
        raise UserError(
            f"{table} must have a list 'info' of clips with names, got {content!r:.80}. "
            "Download it again."
        )
    return infos


def _has_name(info: Any) -> bool:
    return isinstance(info, dict) and isinstance(info.get("name"), str)


def _find_root(source: Path) -> Path:
    """Find the folder that contains sentence_label: the source or a folder in it."""
    below = sorted(source.glob("*/sentence_label")) if source.is_dir() else []
    for place in (source / "sentence_label", *below):
        if place.is_dir():
            return place.parent
    raise UserError(
        f"--source must be the CSL-Daily folder with sentence_label in it, got {source}. "
        "Check the path."
    )
