"""Find the file of a clip's video: by its name, never a rendering, never one of two by chance."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flallm_ds.data.codecs.video import VIDEO_SUFFIXES
from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import files_below, same_content

# In the name of a folder: what was computed from the videos, or another view, under the
# names of the clips.
_RENDERING = re.compile(
    r"(?<![a-z])([a-z]*(?<!pur)poses?|[a-z]*key[ _-]?points?|kpts?|landmarks?|skeletons?|mediapipe|"
    r"holistic|masks?|segmentations?|silhouettes?|depth|(optical[ _-]?)?flow|heatmaps?|smplx?|"
    r"render(ing|ed|s)?|overlays?|visuali[sz]ations?|side)(?![a-z])"
)


def _stem(path: Path) -> str:
    return path.stem


def _all_of(files: Mapping[str, list[Path]], names: Sequence[str]) -> list[Path]:
    """Return the files of several names, in the order of the names."""
    found: list[Path] = []
    for name in names:
        found += files.get(name, ())
    return found


class Videos:
    """The video files below a folder by their names.

    name_of: gives the name that a path has as a video, "" for none.
    """

    def __init__(self, source: Path, name_of: Callable[[Path], str] = _stem) -> None:
        self._source = source
        self._files: dict[str, list[Path]] = {}
        self._renderings: dict[str, list[Path]] = {}
        # Renderings have the names of the clips: they are kept apart, for the notes.
        for path in files_below(source):
            name = name_of(path) if path.suffix.lower() in VIDEO_SUFFIXES else ""
            if name and path.is_file():
                kind = self._renderings if self._is_rendering(path) else self._files
                kind.setdefault(name, []).append(path)

    def have(self, names: Sequence[str]) -> bool:
        """Whether there is a video under one of these names."""
        return not self._files.keys().isdisjoint(names)

    def choose(
        self, clips: Mapping[str, Sequence[str]], own: str | None = None
    ) -> tuple[dict[str, Path], list[str]]:
        """Choose the video of each clip.

        clips: for each clip the names that its file may have.
        own: the corpus's own folder as a regular expression of the end of a path; its files go
            first.
        Returns (the video of each clip that has one, notes on files that were not taken). Raises
        UserError if two files that differ could be a clip, or if there are renderings alone.
        """
        chosen: dict[str, Path] = {}
        clashes: list[tuple[Path, Path]] = []
        not_taken: list[Path] = []
        unseen: list[Path] = []  # renderings of clips without a video
        for clip, names in clips.items():
            # The corpus's own folder goes first; without a file there, any folder will do.
            own_files, other_files = self._files_of(names, own)
            renderings = _all_of(self._renderings, names)
            candidates = own_files or other_files
            if not candidates:
                unseen += renderings[:1]
                continue
            chosen[clip] = candidates[0]
            # Copies of one video are one: any of them will do.
            for other in candidates[1:]:
                if not same_content(candidates[0], other):
                    clashes.append((candidates[0], other))
                    break
            if own_files:
                not_taken += other_files
            not_taken += renderings
        self._check_choice(chosen, clashes, unseen)
        notes = []
        if not_taken:
            what = "other files of the same names are not taken"
            notes.append(f"{len(not_taken):,} {what} ({self._short(not_taken[0])})")
        if unseen:
            what = "clips have renderings or other views alone, which are not taken"
            notes.append(f"{len(unseen):,} {what} ({self._short(unseen[0])})")
        return chosen, notes

    def _files_of(
        self, names: Sequence[str], own: str | None
    ) -> tuple[list[Path], list[Path]]:
        """Return the files of one clip: those in the corpus's own folder, and the others."""
        own_files, other_files = [], []
        for path in _all_of(self._files, names):
            if own and self._lies_in(path, own):
                own_files.append(path)
            else:
                other_files.append(path)
        return own_files, other_files

    def _check_choice(
        self, chosen: dict[str, Path], clashes: list[tuple[Path, Path]], unseen: list[Path]
    ) -> None:
        """Raise UserError for two videos of one clip, and if there are renderings alone."""
        if clashes:
            first, second = clashes[0]
            more = f" ({len(clashes):,} clips have two)" if len(clashes) > 1 else ""
            raise UserError(
                f"a clip must have one video, got two that differ: {first} and "
                f"{second}{more}. Move the one that is not meant out of {self._source}."
            )
        if unseen and not chosen:
            raise UserError(
                "clips must have RGB videos, got renderings or other views alone, such as "
                f"{unseen[0]}. Put the clips themselves below {self._source}, in a folder "
                "not named after poses, masks or views."
            )

    def _is_rendering(self, path: Path) -> bool:
        folders = path.relative_to(self._source).parts[:-1]
        return any(_RENDERING.search(folder.lower()) for folder in folders)

    def _lies_in(self, path: Path, own: str) -> bool:
        return re.search(f"(^|/)({own})$", self._short(path.parent)) is not None

    def _short(self, path: Path) -> str:
        return path.relative_to(self._source).as_posix()
