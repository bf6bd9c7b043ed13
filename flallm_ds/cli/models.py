"""`flallm translate`, `export`, `push` and `standin_llm`: what is done with models in one
process."""

from pathlib import Path
from typing import Literal

from flallm_ds.errors import UserError


def translate(
    video: Path,
    *,
    model: str,
    language: str = "",
    beams: int | None = None,
    nbest: int = 1,
    length_penalty: float | None = None,
    stream: bool = False,
    bits: Literal[32, 16, 8, 4] | None = None,
    hub_code: bool = False,
) -> None:
    """Translate one video file or folder of frames: flallm translate VIDEO --model FOLDER.

    model: an export, a run folder (its best export), or USER/NAME of the hub. language:
    of the sentence, where the model speaks several: de, German. nbest: as many sentences,
    each after its score. length_penalty: above 0 for longer sentences. stream: word by
    word, with one beam. bits: of the LLM's weights; default those of its training.
    hub_code: run code that comes with the LLM.
    """
    # torch takes seconds to import: not for --help, nor for a mistyped option.
    from flallm_ds.inference.translator import Translator

    if stream and (nbest > 1 or (beams or 1) > 1):
        raise UserError(
            f"--stream must go with one beam and one sentence, but --beams is {beams} and "
            f"--nbest {nbest}."
        )
    translator = Translator.from_pretrained(model, bits=bits, hub_code=hub_code)
    translator = translator.searching(beams, nbest, length_penalty)
    if stream:
        for piece in translator.stream(video, language):
            print(piece, end="", flush=True)
        print()
    elif nbest == 1:
        print(translator.translate(video, language))
    else:
        for sentence, score in translator.nbest(video, language):
            print(f"{score:.4f}\t{sentence}")


def export(
    *,
    run: Path,
    out: Path,
    lora: Literal["merged", "apart"] = "merged",
    untrimmed: bool = False,
    llm_name: str = "",
    hub_code: bool = False,
) -> None:
    """Make a run's best model ready to be given away: flallm export --run RUN --out FOLDER.

    The model card includes the scores of launch/evaluate.py. lora: merge LoRA adapters into
    the LLM, or keep them apart, next to the name (or a copy) of their base LLM. untrimmed:
    restore the whole vocabulary; the entries that training left out are taken from
    --llm_name, the LLM that training started from.
    """
    # torch takes seconds to import: not for --help, nor for a mistyped option.
    from flallm_ds.export.publish import publish

    folder = publish(
        run, out, lora=lora, untrimmed=untrimmed, llm_name=llm_name, hub_code=hub_code
    )
    print(f"{folder} is ready.")


def push(*, model: Path, repo: str, private: bool = False) -> None:
    """Upload an export to the Hugging Face hub: flallm push --model FOLDER --repo USER/NAME.

    model: an export, or a run folder (its best export).
    """
    # torch takes seconds to import: not for --help, nor for a mistyped option.
    from flallm_ds.export.hub import push as upload

    print(upload(model, repo, private))


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
    """Make a small mBART where no hub can be reached: flallm standin_llm --texts
    FILE[,FILE] --out FOLDER.

    It is pretrained on the files' sentences (one a line) and loads as
    facebook/mbart-large-cc25 does. layers: of encoder and decoder each. steps: batches of
    32 sentences.
    """
    # torch takes seconds to import: not for --help, nor for a mistyped option.
    from flallm_ds.models.llm.standin import standin_llm as make

    make(
        texts,
        out,
        language=language,
        vocab_size=vocab_size,
        layers=layers,
        steps=steps,
        seed=seed,
    )
