"""CSL-Daily: Chinese sign language of daily life, folders of 512x512 JPEG frames, by signed agreement.

Texts are the annotated characters put together; their punctuation is full-width and kept. The annotation is a
pickle: it is read without its power to import anything. Where it is absent, video_map.txt says the same.
"""

import pickle
import re
from pathlib import Path
from typing import Any, NoReturn

from flallm_ds.data.codecs.video import Box
from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import Corpus, Row, check_text, first_of, read_split, read_table

FPS = 30.0  # of the recordings, says the corpus's paper (arXiv 2105.12397); the frames have no times
MARGIN: Box = (0.0, 80 / 512, 1.0, 1.0)  # what is left of a frame without the black rows at its top
_FRAMES = (
    "sentence/frames_512x512",
    "sentences/frames_512x512",
    "sentence_frames-512x512/frames_512x512",  # before the next, which holds it
    "sentence_frames-512x512",
)
_MISSING = "S000005_P0004_T00"  # in the split file of every release, in the frames and labels of some


def read(source: Path, splits: tuple[str, ...], *, trim_margin: bool = True) -> Corpus:
    """CSL-Daily. --source: the folder that holds sentence_label and the frames.

    --trim_margin=false keeps the black margin at the top of each frame (rows 0 to 80 of 512).
    """
    root = _find_root(source)
    frames = _find_frames(root)
    labels, table = read_labels(root / "sentence_label")
    rows: dict[str, list[Row]] = {split: [] for split in splits}
    absent: list[str] = []
    split_table = root / "sentence_label" / "split_1.txt"
    listed = set()
    for line, fields in read_table(split_table, "|", ("name", "split"), quoted=False):
        name = fields["name"].strip()
        listed.add(name)
        split = read_split(fields["split"], f"{split_table}, line {line}:")
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
    notes = [f"labels from {table.name}", f"the black margin (rows 0 to 80 of 512) is {margin}"]
    if absent:
        notes.append(f"{len(absent):,} clips of split_1.txt are not in this release ({first_of(absent)})")
    if unlisted := [name for name in labels if name not in listed]:
        notes.append(f"{len(unlisted):,} labelled clips are in no split ({first_of(unlisted)})")
    return Corpus("csl_daily", "zh", rows, notes)


def _find_frames(root: Path) -> Path:
    """The folder that holds a folder of frames for each clip. Raises UserError without one, and for two."""
    found: list[Path] = []
    for name in _FRAMES:
        folder = root / name
        # sentence_frames-512x512 is no second folder where it only holds frames_512x512.
        known = any(other.samefile(folder) or folder in other.parents for other in found if folder.is_dir())
        if folder.is_dir() and not known and any(folder.iterdir()):
            found.append(folder)
    if not found:
        raise UserError(f"the frames must be in one of {', '.join(_FRAMES)}, but are not: {root}.")
    if len(found) > 1:
        raise UserError(
            f"the frames must be in one folder, got two: {found[0]} and {found[1]}. Move one of them away."
        )
    return found[0]


def read_labels(folder: Path) -> tuple[dict[str, tuple[str, str]], Path]:
    """(text and gloss by clip name, the file that they are from): csl2020ct_v2.pkl, else video_map.txt."""
    table = folder / "csl2020ct_v2.pkl"
    if table.is_file():
        found = [(info["name"], _label(info, table)) for info in _read_infos(table)]
    else:
        table = folder / "video_map.txt"
        columns = ("name", "gloss", "char")
        found = [
            (fields["name"].strip(), ("".join(fields["char"].split()), " ".join(fields["gloss"].split())))
            for _, fields in read_table(table, "|", columns, quoted=False)
        ]
    labels: dict[str, tuple[str, str]] = {}
    for name, label in found:
        if labels.setdefault(name, label) != label:
            raise UserError(
                f"a clip must have one label, got two that differ for {name}: {table}. Correct the table."
            )
        check_text(label[0], f"{table}: the text of {name}")
    return labels, table


def _label(info: dict[str, Any], table: Path) -> tuple[str, str]:
    """(text, gloss) of one clip; either may be a list of strings or one string, by release."""
    words = []
    for field in ("label_char", "label_gloss"):
        value = info.get(field)
        parts = value.split() if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise UserError(
                f"{field} of {info['name']} must be text or a list of texts, but is {value!r:.80}: {table}."
            )
        words.append(parts)
    return "".join(words[0]).strip(), " ".join(words[1]).strip()


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, texts and numbers. Whatever would import or call anything is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


_DAMAGED = (
    pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, OverflowError,
    RecursionError, MemoryError,  # a damaged length asks for any number of bytes
)  # fmt: skip


def _read_infos(table: Path) -> list[dict[str, Any]]:
    try:
        with table.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except OSError as error:
        raise UserError(f"the annotation must be readable, but {error.strerror}: {table}.") from error
    except _DAMAGED as error:
        raise UserError(
            f"the annotation must be a pickle of plain values, but {str(error) or 'it is damaged'}: {table}. "
            "Fetch it again, or take it away: video_map.txt beside it will do."
        ) from error
    infos = content.get("info") if isinstance(content, dict) else None
    if not isinstance(infos, list) or not all(
        isinstance(info, dict) and isinstance(info.get("name"), str) for info in infos
    ):
        raise UserError(f"the annotation must hold a list 'info' of clips with names, but does not: {table}.")
    return infos


def _find_root(source: Path) -> Path:
    """The folder that holds sentence_label: the source itself or one below it."""
    below = sorted(source.glob("*/sentence_label")) if source.is_dir() else []
    for place in (source / "sentence_label", *below):
        if place.is_dir():
            return place.parent
    raise UserError(
        f"--source must be the CSL-Daily folder, but holds no sentence_label: {source}. Check --source."
    )
