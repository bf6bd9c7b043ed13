"""Read signsim, the synthetic sign language, which has the layout of PHOENIX14T."""

from dataclasses import replace
from pathlib import Path

from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import SIGNSIM_FILE, Corpus, phoenix14t


def read(source: Path, splits: tuple[str, ...]) -> Corpus:
    """signsim. --source: the folder that flallm signsim corpus wrote."""
    if not (source / SIGNSIM_FILE).is_file():
        raise UserError(
            "--source must be a folder that flallm signsim corpus wrote, with "
            f"{SIGNSIM_FILE} in it, got {source}. Check the path."
        )
    return replace(phoenix14t.read_release(source, splits), name="signsim")
