"""Write a corpus of the synthetic language in the layout of the PHOENIX14T release."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from flallm_ds.errors import UserError
from flallm_ds.files import new_folder
from flallm_ds.sharding.corpora import SIGNSIM_FILE
from flallm_ds.sharding.pool import begin_worker, signals_held
from flallm_ds.signsim.grammar import SPLITS, Sentence, draw_sentence
from flallm_ds.signsim.render import render_clip
from flallm_ds.signsim.signer import SEEN, SIGNERS, UNSEEN, Signer, clip_poses
from flallm_ds.signsim.signs import SIGNS
from flallm_ds.terminal import progress

VERSION = 6
"""Increase this whenever the same options write other bytes."""

RELEASE = Path("PHOENIX-2014-T-release-v3/PHOENIX-2014-T")
FRAMES = RELEASE / "features/fullFrame-210x260px"
ANNOTATIONS = RELEASE / "annotations/manual"
HEADER = "name|video|start|end|speaker|orth|translation"
MIN_CLIPS = 12  # fewer clips would make splits too small
_PNG = (cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE)
_CLIP_BYTES = 2_000_000  # measured mean
# Seed of the monolingual text: above the index of every clip.
_MONOLINGUAL_STREAM = 2**32


@dataclass(frozen=True)
class Clip:
    """Hold the contents of one clip. Its frames depend on (seed, index) only."""

    index: int
    name: str
    split: str
    signer: Signer
    sentence: Sentence

    @property
    def row(self) -> str:
        """Return the line of the clip in the annotation table."""
        orth, text = " ".join(self.sentence.glosses), self.sentence.text
        return f"{self.name}|{self.name}/1/*.png|-1|-1|{self.signer.name}|{orth}|{text}"


def split_sizes(num_clips: int) -> dict[str, int]:
    """Return the number of clips of each split: 1,200 give 1,000 / 80 / 120."""
    # At least 3 for test: the unseen signer and two others.
    num_dev, num_test = max(2, num_clips // 15), max(3, num_clips // 10)
    return {"train": num_clips - num_dev - num_test, "dev": num_dev, "test": num_test}


def _signer(split: str, index: int) -> Signer:
    """Return the signer of clip `index` of a split.

    Signers take turns. The last signer occurs in test only, in its first clip.
    """
    if split == "test":
        return SIGNERS[(index - 1) % len(SIGNERS)]
    return SEEN[index % len(SEEN)]


def _locate(index: int, num_clips: int) -> tuple[str, int]:
    """Return (split of clip `index`, its index within the split)."""
    for split, size in split_sizes(num_clips).items():
        if index < size:
            return split, index
        index -= size
    raise IndexError(index)


def plan_clip(index: int, num_clips: int, seed: int) -> tuple[Clip, np.random.Generator]:
    """Draw clip `index` of a corpus. Returns (clip, random generator of its frames)."""
    # Each clip has its own generator, so frames do not depend on the number of processes.
    rng = np.random.default_rng([seed, index])
    split, within = _locate(index, num_clips)
    name = f"signsim_{split}-{within:06d}"
    clip = Clip(index, name, split, _signer(split, within), draw_sentence(rng, split))
    return clip, rng


def write_clip(index: int, num_clips: int, seed: int, root: Path) -> tuple[str, str, int]:
    """Render one clip into `root`. Returns (split, table row, number of frames)."""
    cv2.setNumThreads(1)  # the pool already has one process per core
    clip, rng = plan_clip(index, num_clips, seed)
    folder = root / FRAMES / clip.split / clip.name
    folder.mkdir(parents=True)
    signs = [SIGNS[gloss] for gloss in clip.sentence.glosses]
    poses_FP = clip_poses(signs, clip.signer, rng)
    for number, frame in enumerate(render_clip(poses_FP, clip.signer, rng), start=1):
        encoded, png = cv2.imencode(".png", frame, _PNG)
        assert encoded
        (folder / f"images{number:04d}.png").write_bytes(png.tobytes())
    return clip.split, clip.row, len(poses_FP)


def draw_monolingual(num_sentences: int, seed: int) -> list[str]:
    """Draw distinct sentences of the grammar that belong to the train split."""
    rng = np.random.default_rng([seed, _MONOLINGUAL_STREAM])
    # A dict, not a set: it keeps the order of the draws.
    sentences: dict[str, None] = {}
    while len(sentences) < num_sentences:
        sentences[draw_sentence(rng, "train").text] = None
    return list(sentences)


def write_corpus(
    out: Path,
    num_clips: int = 1200,
    seed: int = 0,
    workers: int | None = None,
    num_monolingual: int = 20000,
) -> Path:
    """Write a corpus into `out`, which appears complete or not at all.

    The bytes depend on num_clips, seed and num_monolingual only. workers: processes, by
    default one per usable core. `out` contains the release, monolingual.txt (text for a
    language model, without dev and test sentences) and signsim.json (the options, and
    counts of clips and frames). Returns the root of the release,
    `out`/PHOENIX-2014-T-release-v3/PHOENIX-2014-T. Raises UserError if an option is out of
    range, `out` is not empty, or the disk is too small.
    """
    out = Path(out).absolute()
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    _check_options(num_clips, seed, workers, num_monolingual)
    _check_place(out, num_clips)
    with _whole_or_nothing(out) as root:
        rows: dict[str, list[str]] = {split: [] for split in SPLITS}
        num_frames = dict.fromkeys(SPLITS, 0)
        render = partial(write_clip, num_clips=num_clips, seed=seed, root=root)
        # _map yields the clips in order, so tables do not depend on the processes.
        with progress(num_clips, "signsim") as bar:
            for split, row, frames in _map(render, num_clips, workers):
                rows[split].append(row)
                num_frames[split] += frames
                bar.update(1)
        _write_tables(root, rows)
        _write_lines(root / "monolingual.txt", draw_monolingual(num_monolingual, seed))
        options = {
            "num_clips": num_clips,
            "seed": seed,
            "num_monolingual": num_monolingual,
        }
        _write_summary(root / SIGNSIM_FILE, options, split_sizes(num_clips), num_frames)
    return out / RELEASE


def _write_summary(
    path: Path,
    options: dict[str, int],
    num_clips: dict[str, int],
    num_frames: dict[str, int],
) -> None:
    """Write signsim.json. num_clips, num_frames: counts by split."""
    signers = {signer.name: list(SPLITS) for signer in SEEN}
    signers[UNSEEN.name] = ["test"]
    summary = {
        "version": VERSION,
        "options": options,
        "clips": num_clips,
        "frames": num_frames,
        "signers": signers,
        "signs": list(map(asdict, SIGNS.values())),
    }
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, "utf-8")


def _check_options(num_clips: int, seed: int, workers: int, num_monolingual: int) -> None:
    """Raise UserError for an option out of range."""
    if not MIN_CLIPS <= num_clips < 1_000_000:
        raise UserError(f"--clips must be from {MIN_CLIPS} to 999999, got {num_clips}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed must be from 0 to {2**32 - 1}, got {seed}.")
    if workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}.")
    # The grammar has millions of sentences, but the last ones would take long to find.
    if not 0 <= num_monolingual <= 500_000:
        raise UserError(f"--monolingual must be from 0 to 500000, got {num_monolingual}.")


def _check_place(out: Path, num_clips: int) -> None:
    """Raise UserError if `out` contains files or its disk is too small."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "contains files" if out.is_dir() else "is a file"
        raise UserError(
            f"--out must be a new or empty folder, got {out}, which {what}. Choose another "
            "--out, or delete it."
        )
    # The disk of the nearest folder that exists.
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    free, needed = shutil.disk_usage(parent).free, num_clips * _CLIP_BYTES
    if free < needed:
        raise UserError(
            f"Cannot write {num_clips} clips to {parent}: they need about "
            f"{needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free. Use fewer --clips, or "
            "another --out."
        )


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out`, with `new_folder`.

    Raises UserError if the disk cannot be written.
    """
    try:
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(new_folder(out))
            except OSError as error:
                raise UserError(
                    f"Cannot create a folder in {out.parent}: {error.strerror}. Choose "
                    "another --out."
                ) from error
            yield folder
    except OSError as error:
        # Only the final rename has two names. It fails if the target is no longer empty.
        if error.filename2 is not None:
            raise UserError(
                f"Cannot move the corpus to {out}: {error.strerror}. Keep the folder empty "
                "while the corpus is written."
            ) from error
        raise UserError(
            f"Cannot write the corpus: {error}. All files were removed; choose another --out."
        ) from error


def _map(
    render: Callable[[int], tuple[str, str, int]], num_clips: int, workers: int
) -> Iterator[tuple[str, str, int]]:
    """Yield the results of all processes in the order of the clips."""
    if workers == 1:
        yield from map(render, range(num_clips))
        return
    context = multiprocessing.get_context("spawn")
    with signals_held():  # the workers start here
        pool = ProcessPoolExecutor(workers, context, begin_worker)
        results = pool.map(render, range(num_clips), chunksize=4)
    try:
        yield from results
    finally:
        pool.shutdown(cancel_futures=True)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join([*lines, ""]), "utf-8")


def _write_tables(root: Path, rows: dict[str, list[str]]) -> None:
    (root / ANNOTATIONS).mkdir(parents=True)
    for split, lines in rows.items():
        table = root / ANNOTATIONS / f"PHOENIX-2014-T.{split}.corpus.csv"
        _write_lines(table, [HEADER, *lines])
