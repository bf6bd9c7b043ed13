"""The `flallm` command. Each verb's module is imported when the verb is used: some take
seconds."""

from flallm_ds.command import Verb, main

VERBS = {
    "train": Verb("Train a stage, or both.", "flallm_ds.cli.train:train"),
    "recipes": Verb(
        "List the named runs, with the paper's scores.", "flallm_ds.cli.recipes:recipes"
    ),
    "evaluate": Verb(
        "Score the best export of a run on a split.", "flallm_ds.cli.evaluate:evaluate"
    ),
    "features": Verb(
        "Write the features of a frozen encoder.", "flallm_ds.cli.features:features"
    ),
    "translate": Verb("Translate one video.", "flallm_ds.cli.models:translate"),
    "export": Verb(
        "Make a run's best model ready to give away.", "flallm_ds.cli.models:export"
    ),
    "push": Verb("Upload an export to the Hugging Face hub.", "flallm_ds.cli.models:push"),
    "shards": Verb(
        "Shards of a corpus: build, verify, stats, preview.", "flallm_ds.cli.shards:VERBS"
    ),
    "signsim": Verb(
        "Make the synthetic corpus: corpus, sheet, backbone.", "flallm_ds.cli.signsim:VERBS"
    ),
    "standin_llm": Verb(
        "Make a small mBART for machines without a hub.", "flallm_ds.cli.models:standin_llm"
    ),
    "strip": Verb(
        "Draw clips with hypothesis and reference.", "flallm_ds.cli.pictures:strip"
    ),
    "curves": Verb(
        "Draw losses and BLEU-4 over the epochs.", "flallm_ds.cli.pictures:curves"
    ),
    "probe": Verb("Draw the last layers' gradients.", "flallm_ds.cli.pictures:probe"),
    "quickstart": Verb(
        "Corpus, shards, training, scores, a translation.",
        "flallm_ds.quickstart:quickstart",
    ),
}


def run() -> None:
    """Entry point of the `flallm` script and of `python -m flallm_ds`."""
    main(VERBS)
