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
"""Rises with every change of what the same options write."""

RELEASE = Path("PHOENIX-2014-T-release-v3/PHOENIX-2014-T")
FRAMES = RELEASE / "features/fullFrame-210x260px"
ANNOTATIONS = RELEASE / "annotations/manual"
HEADER = "name|video|start|end|speaker|orth|translation"
MIN_CLIPS = 12  # fewer leave a split without a clip of each kind
_PNG = (cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE)
_CLIP_BYTES = 2_000_000  # measured mean
_MONOLINGUAL_STREAM = 2**32  # keeps the monolingual text's draws apart from every clip's


@dataclass(frozen=True)
class Clip:
    """What one clip shows; its frames follow from (seed, index)."""

    index: int
    name: str
    split: str
    signer: Signer
    sentence: Sentence

    @property
    def row(self) -> str:
        """The clip's line of the annotation table."""
        orth, text = " ".join(self.sentence.glosses), self.sentence.text
        return f"{self.name}|{self.name}/1/*.png|-1|-1|{self.signer.name}|{orth}|{text}"


def split_sizes(num_clips: int) -> dict[str, int]:
    """Return the number of clips of each split: 1,200 give 1,000 / 80 / 120."""
    # At least 3 for test: the unseen signer and two others.
    num_dev, num_test = max(2, num_clips // 15), max(3, num_clips // 10)
    return {"train": num_clips - num_dev - num_test, "dev": num_dev, "test": num_test}


def _signer(split: str, index: int) -> Signer:
    """Return the signer of clip `index` of a split.

    Signers take turns; the last one only in test, where it begins.
    """
    if split == "test":
        return SIGNERS[(index - 1) % len(SIGNERS)]
    return SEEN[index % len(SEEN)]


def _locate(index: int, num_clips: int) -> tuple[str, int]:
    """Return the split of clip `index`, and its place within the split."""
    for split, size in split_sizes(num_clips).items():
        if index < size:
            return split, index
        index -= size
    raise IndexError(index)


def plan_clip(index: int, num_clips: int, seed: int) -> tuple[Clip, np.random.Generator]:
    """Draw clip `index` of a corpus; return it and the generator that its frames are
    drawn from."""
    # A generator for each clip: its frames do not depend on which process renders it.
    rng = np.random.default_rng([seed, index])
    split, within = _locate(index, num_clips)
    name = f"signsim_{split}-{within:06d}"
    clip = Clip(index, name, split, _signer(split, within), draw_sentence(rng, split))
    return clip, rng


def write_clip(index: int, num_clips: int, seed: int, root: Path) -> tuple[str, str, int]:
    """Render one clip into `root`. Returns its split, its table row, and its number of frames."""
    cv2.setNumThreads(1)  # the pool already has a process per core
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
    """Draw different sentences of the grammar, none of which a dev or test split may hold."""
    rng = np.random.default_rng([seed, _MONOLINGUAL_STREAM])
    # A dict instead of a set: it keeps the order in which sentences were drawn.
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
    """Write a corpus into `out`, which appears whole or not at all.

    The bytes depend on num_clips, seed and num_monolingual alone. workers: processes, by
    default one per usable core. Besides the release, `out` receives monolingual.txt (text
    for a language model, free of dev and test sentences) and signsim.json (the options,
    and what was made). Returns the release's root,
    `out`/PHOENIX-2014-T-release-v3/PHOENIX-2014-T. Raises UserError when an option is out
    of range, `out` is not empty, or the disk is too small.
    """
    out = Path(out).absolute()
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    _check_options(num_clips, seed, workers, num_monolingual)
    _check_place(out, num_clips)
    with _whole_or_nothing(out) as root:
        rows: dict[str, list[str]] = {split: [] for split in SPLITS}
        num_frames = dict.fromkeys(SPLITS, 0)
        render = partial(write_clip, num_clips=num_clips, seed=seed, root=root)
        # _map yields clips in their order, so tables do not depend on the processes.
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
    """Write signsim.json: the options, and what was made of them.

    num_clips, num_frames: by split.
    """
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
    if not MIN_CLIPS <= num_clips < 1_000_000:
        raise UserError(f"clips must be from {MIN_CLIPS} to 999999, but is {num_clips}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be from 0 to {2**32 - 1}, but is {seed}.")
    if workers < 1:
        raise UserError(f"workers must be at least 1, but is {workers}.")
    # The grammar has millions of sentences, but the last ones would take long to find.
    if not 0 <= num_monolingual <= 500_000:
        bounds = "from 0 to 500000 sentences"
        raise UserError(f"monolingual must be {bounds}, but is {num_monolingual}.")


def _check_place(out: Path, num_clips: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "holds files" if out.is_dir() else "is a file"
        remedy = "Choose another --out, or delete it."
        raise UserError(
            f"the output folder must be new or empty, but {out} {what}. {remedy}"
        )
    # The disk is that of the nearest folder that exists.
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    free, needed = shutil.disk_usage(parent).free, num_clips * _CLIP_BYTES
    if free < needed:
        raise UserError(
            f"{num_clips} clips need about {needed / 1e9:.1f} GB, but {parent} has "
            f"{free / 1e9:.1f} GB free. Ask for fewer --clips, or choose another --out."
        )


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out`, as `new_folder` does.

    Raises UserError where the disk refuses.
    """
    try:
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(new_folder(out))
            except OSError as error:
                raise UserError(
                    f"the output must go where folders can be made, but {out.parent}: "
                    f"{error.strerror}. Choose another --out."
                ) from error
            yield folder
    except OSError as error:
        # Only a rename has two names: the folder at its end is not empty any more.
        if error.filename2 is not None:
            why = f"{out}: {error.strerror}"
            raise UserError(
                f"the output folder must stay empty while the corpus is made, but {why}."
            ) from error
        raise UserError(
            f"the corpus must fit on a disk that can be written, but {error}. "
            "Nothing was left behind; choose another --out."
        ) from error


def _map(
    render: Callable[[int], tuple[str, str, int]], num_clips: int, workers: int
) -> Iterator[tuple[str, str, int]]:
    """Yield results in the order of the clips, whichever process made them."""
    if workers == 1:
        yield from map(render, range(num_clips))
        return
    context = multiprocessing.get_context("spawn")
    with signals_held():  # workers start now
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
