"""`flallm signsim`: the synthetic signed language, for machines without a corpus."""

from pathlib import Path

from flallm_ds.command import Verb
from flallm_ds.signsim.corpus import RELEASE, write_corpus
from flallm_ds.signsim.sheet import write_sheet


def corpus(
    *,
    out: Path,
    clips: int = 1200,
    seed: int = 0,
    workers: int | None = None,
    monolingual: int = 20000,
) -> None:
    """Make a corpus of the synthetic signed language: flallm signsim corpus --out FOLDER.

    The corpus has the layout of PHOENIX14T. clips: in all splits together. monolingual:
    sentences of text for a language model. workers: processes, by default one per core.
    """
    write_corpus(out, clips, seed, workers, monolingual)
    print(out / RELEASE)


def sheet(*, out: Path) -> None:
    """Draw all signs of the synthetic signed language: flallm signsim sheet --out FILE.png."""
    print(write_sheet(out))


VERBS = {
    "corpus": corpus,
    "sheet": sheet,
    "backbone": Verb(
        "Train a small ResNet-18 that stands in for ImageNet weights.",
        "flallm_ds.signsim.backbone:backbone",
    ),
}
