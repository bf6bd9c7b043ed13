"""Find the video file of a clip by its name. Renderings of poses are never used, and two
different files with one name are an error."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flallm_ds.data.codecs.video import VIDEO_SUFFIXES
from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import files_below, same_content

# Names of folders whose videos have the names of clips, but were computed from the clips
# or show another view.
_RENDERING = re.compile(
    r"(?<![a-z])([a-z]*(?<!pur)poses?|[a-z]*key[ _-]?points?|kpts?|landmarks?|skeletons?|mediapipe|"
    r"holistic|masks?|segmentations?|silhouettes?|depth|(optical[ _-]?)?flow|heatmaps?|smplx?|"
    r"render(ing|ed|s)?|overlays?|visuali[sz]ations?|side)(?![a-z])"
)


def _stem(path: Path) -> str:
    return path.stem


def _all_of(files: Mapping[str, list[Path]], names: Sequence[str]) -> list[Path]:
    """Return the files with one of several names, in the order of the names."""
    found: list[Path] = []
    for name in names:
        found += files.get(name, ())
    return found


class Videos:
    """Hold the video files below a folder by their names.

    name_of: returns the name of the video in a file, "" for none.
    """

    def __init__(self, source: Path, name_of: Callable[[Path], str] = _stem) -> None:
        self._source = source
        self._files: dict[str, list[Path]] = {}
        self._renderings: dict[str, list[Path]] = {}
        # Renderings are only counted: they have the same names as the clips.
        for path in files_below(source):
            name = name_of(path) if path.suffix.lower() in VIDEO_SUFFIXES else ""
            if name and path.is_file():
                kind = self._renderings if self._is_rendering(path) else self._files
                kind.setdefault(name, []).append(path)

    def have(self, names: Sequence[str]) -> bool:
        """Return whether there is a video with one of these names."""
        return not self._files.keys().isdisjoint(names)

    def choose(
        self, clips: Mapping[str, Sequence[str]], own: str | None = None
    ) -> tuple[dict[str, Path], list[str]]:
        """Choose the video of each clip.

        clips: the possible file names of each clip.
        own: a regular expression for the end of the path of the corpus's own folder;
            files in this folder have priority.
        Returns (the video of each clip that has one, notes about files that are not
        used). Raises UserError if a clip has two files that differ, or if there are
        renderings only.
        """
        chosen: dict[str, Path] = {}
        clashes: list[tuple[Path, Path]] = []
        unused: list[Path] = []
        only_rendered: list[Path] = []  # renderings of clips without a video
        for clip, names in clips.items():
            # Use the corpus's own folder if it has a file, otherwise any folder.
            own_files, other_files = self._files_of(names, own)
            renderings = _all_of(self._renderings, names)
            candidates = own_files or other_files
            if not candidates:
                only_rendered += renderings[:1]
                continue
            chosen[clip] = candidates[0]
            # Copies of one video are no conflict.
            for other in candidates[1:]:
                if not same_content(candidates[0], other):
                    clashes.append((candidates[0], other))
                    break
            if own_files:
                unused += other_files
            unused += renderings
        self._check_choice(chosen, clashes, only_rendered)
        notes = []
        if unused:
            what = "other files of the same names are not used"
            notes.append(f"{len(unused):,} {what} ({self._short(unused[0])})")
        if only_rendered:
            what = "clips have only renderings or other views, which are not used"
            first = self._short(only_rendered[0])
            notes.append(f"{len(only_rendered):,} {what} ({first})")
        return chosen, notes

    def _files_of(
        self, names: Sequence[str], own: str | None
    ) -> tuple[list[Path], list[Path]]:
        """Return (files of one clip in the corpus's own folder, its other files)."""
        own_files, other_files = [], []
        for path in _all_of(self._files, names):
            if own and self._is_in(path, own):
                own_files.append(path)
            else:
                other_files.append(path)
        return own_files, other_files

    def _check_choice(
        self,
        chosen: dict[str, Path],
        clashes: list[tuple[Path, Path]],
        only_rendered: list[Path],
    ) -> None:
        """Raise UserError for two videos of one clip, or if there are renderings only."""
        if clashes:
            first, second = clashes[0]
            more = f" ({len(clashes):,} clips have two)" if len(clashes) > 1 else ""
            raise UserError(
                f"A clip must have one video, got two that differ: {first} and "
                f"{second}{more}. Move the wrong one out of {self._source}."
            )
        if only_rendered and not chosen:
            raise UserError(
                "Clips must have RGB videos, got only renderings or other views, such as "
                f"{only_rendered[0]}. Put the clips below {self._source}, in a folder that "
                "is not named after poses, masks or views."
            )

    def _is_rendering(self, path: Path) -> bool:
        folders = path.relative_to(self._source).parts[:-1]
        return any(_RENDERING.search(folder.lower()) for folder in folders)

    def _is_in(self, path: Path, own: str) -> bool:
        return re.search(f"(^|/)({own})$", self._short(path.parent)) is not None

    def _short(self, path: Path) -> str:
        return path.relative_to(self._source).as_posix()
