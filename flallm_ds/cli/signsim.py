"""`flallm signsim`: the synthetic signed language, for machines without a corpus."""

from pathlib import Path

from flallm_ds.command_help import VerbTable


def corpus(
    *,
    out: Path,
    clips: int = 1200,
    seed: int = 0,
    workers: int | None = None,
    monolingual: int = 20000,
) -> None:
    """Write a corpus of the synthetic signed language, in the layout of PHOENIX14T.

    Options:
        out: the folder to write
        clips: number of clips of all splits together
        seed: of the random sentences and signers
        workers: number of processes; one for each core by default
        monolingual: number of sentences of text for a language model
    """
    # Rendering needs OpenCV: not for --help, nor for a mistyped option.
    from flallm_ds.signsim.corpus import RELEASE, write_corpus

    write_corpus(out, clips, seed, workers, monolingual)
    print(out / RELEASE)


def sheet(*, out: Path) -> None:
    """Draw all signs of the synthetic signed language.

    Options:
        out: the PNG file to write
    """
    from flallm_ds.signsim.sheet import write_sheet

    print(write_sheet(out))


def backbone(
    *,
    out: Path,
    width: int = 16,
    frames: int = 20000,
    epochs: int = 4,
    seed: int = 0,
) -> None:
    """Train a small ResNet-18 that stands in for ImageNet weights.

    Options:
        out: the folder to write, which --visual.weights can name
        width: number of channels of its first stage, as visual.width
        frames: number of frames that are rendered, and seen in each epoch
        epochs: number of passes over these frames
        seed: of the random signs and of the initial weights
    """
    # torch takes seconds to import: not for --help, nor for a mistyped option.
    from flallm_ds.signsim.backbone import backbone as make

    make(out=out, width=width, frames=frames, epochs=epochs, seed=seed)


SIGNSIM = VerbTable(
    about="A synthetic signed language: its clips are rendered, its sentences are German.",
    verbs={"corpus": corpus, "sheet": sheet, "backbone": backbone},
)
