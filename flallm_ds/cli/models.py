"""`flallm export`, `push` and `standin_llm`: commands that use one process."""

from pathlib import Path
from typing import Literal

from flallm_ds.cli.checks import check_exists, check_new_folder
from flallm_ds.errors import UserError
from flallm_ds.export_folder import HUB_ID, find_export


def export(
    *,
    run: Path,
    out: Path,
    lora: Literal["merged", "apart"] = "merged",
    untrimmed: bool = False,
    llm_name: str = "",
    hub_code: bool = False,
) -> None:
    """Write the best model of a run to a folder that needs nothing else of the run.

    Its model card has the scores of `flallm evaluate`.

    Example: flallm export --run=runs/mine_llm --out=my_model

    Options:
        run: a run folder
        out: the folder to write
        lora: merge LoRA adapter weights into the LLM (merged), or store them next to the
            name or a copy of their base model (apart)
        untrimmed: restore the vocabulary entries that training left out
        llm_name: the LLM that the entries are taken from; that of the run by default
        hub_code: run code that comes with the LLM on the hub
    """
    find_export(run)
    check_new_folder("--out", out)
    # torch takes seconds to import: only after the options are checked.
    from flallm_ds.export.publish import publish

    folder = publish(
        run, out, lora=lora, untrimmed=untrimmed, llm_name=llm_name, hub_code=hub_code
    )
    print(f"{folder} is ready.")


def push(*, model: Path, repo: str, private: bool = False) -> None:
    """Upload an exported model to the Hugging Face hub.

    Example: flallm push --model=my_model --repo=USER/NAME

    Options:
        model: an export, or a run folder (its best export)
        repo: USER/NAME on the hub
        private: make a new repository private
    """
    find_export(model)
    if not HUB_ID.fullmatch(repo):
        raise UserError(f"--repo must be USER/NAME, got {repo!r}.")
    # torch takes seconds to import: only after the options are checked.
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
    """Train a small mBART on sentences, for machines that cannot reach the hub.

    It loads as facebook/mbart-large-cc25 does.

    Example: flallm standin_llm --texts=sentences.txt --out=data/llm

    Options:
        texts: text files with a sentence on each line, separated by commas
        out: the folder to write
        language: language of the sentences: de, German, or mBART's token de_DE
        vocab_size: number of vocabulary entries
        layers: of the encoder, and of the decoder
        steps: number of training steps, of 32 sentences each
        seed: of the initial weights and the order of the sentences
    """
    for file in texts.split(","):
        check_exists("--texts", Path(file))
    # torch takes seconds to import: only after the options are checked.
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
