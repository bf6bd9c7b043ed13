"""Make a corpus of the synthetic signed language, or a picture of all its signs.

Run as

    python shards/signsim/make.py --out DIR [--clips 1200] [--seed 0] [--workers N]
    python shards/signsim/make.py --sheet FILE.png
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file, Python looks in this folder alone

if __name__ == "__main__":  # the imports below take seconds
    from flallm_ds.command import answer_signals

    answer_signals(importing=True)

from flallm_ds.command import main  # noqa: E402
from flallm_ds.errors import UserError  # noqa: E402
from shards.signsim.corpus import RELEASE, write_corpus  # noqa: E402
from shards.signsim.sheet import write_sheet  # noqa: E402


def make(
    *,
    out: Path | None = None,
    clips: int = 1200,
    seed: int = 0,
    workers: int | None = None,
    monolingual: int = 20000,
    sheet: Path | None = None,
) -> None:
    """Make a corpus of the synthetic signed language (--out=DIR), or a picture of it (--sheet=FILE.png).

    The corpus has the layout of PHOENIX14T. clips: in all splits together. monolingual: sentences of text
    for a language model. workers: processes, by default one per core.
    """
    if out is None and sheet is None:
        raise UserError("--out=DIR (a corpus) or --sheet=FILE.png (a picture of all signs) must be given.")
    if sheet is not None:
        print(write_sheet(sheet))
    if out is not None:
        write_corpus(out, clips, seed, workers, monolingual)
        print(Path(out) / RELEASE)


if __name__ == "__main__":
    main(make)
