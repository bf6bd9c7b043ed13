"""The `flallm` command: the verbs that need one process only. What runs under a launcher is in launch/."""

from pathlib import Path

from flallm_ds.command import main


def translate(video: Path, *, model: Path, beams: int | None = None) -> None:
    """Translate one video file or folder of frames: flallm translate VIDEO --model FOLDER.

    model: an export, or a run folder (its best export).
    """
    from dataclasses import replace

    from flallm_ds.inference.translator import Translator

    translator = Translator.from_pretrained(model)
    if beams is not None:
        translator = replace(translator, beam=replace(translator.beam, num_beams=beams))
    print(translator.translate(video))


def standin_llm(
    *,
    texts: str,
    out: Path,
    language: str = "de_DE",
    vocab_size: int = 1500,
    layers: int = 2,
    steps: int = 300,
    seed: int = 0,
) -> None:
    """Make a small mBART where no hub can be reached: flallm standin_llm --texts FILE[,FILE] --out FOLDER.

    It is pretrained on the files' sentences (one a line) and loads as facebook/mbart-large-cc25 does.
    layers: of encoder and decoder each. steps: batches of 32 sentences.
    """
    from flallm_ds.standin_llm import standin_llm as make

    make(texts, out, language=language, vocab_size=vocab_size, layers=layers, steps=steps, seed=seed)


def strip(*, run: Path, out: Path, split: str = "test", clips: int = 2) -> None:
    """A picture of clips with hypothesis and reference: flallm strip --run RUN --out FILE.png.

    run: a run folder on which launch/evaluate.py has scored the split.
    """
    from flallm_ds.inference.report import strip_of_run

    strip_of_run(run, out, split, clips)


def curves(*, runs: str, out: Path) -> None:
    """A picture of losses and BLEU-4 over the epochs: flallm curves --runs RUN[,RUN] --out FILE.png."""
    from flallm_ds.inference.report import draw_curves

    draw_curves(out, [Path(run) for run in runs.split(",")])


def run() -> None:
    """Entry point of the `flallm` script and of `python -m flallm_ds`."""
    main({"translate": translate, "standin_llm": standin_llm, "strip": strip, "curves": curves})


if __name__ == "__main__":
    run()
