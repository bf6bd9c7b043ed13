"""The `flallm` command. Each verb's module is imported when the verb is used: some take
seconds."""

import sys

from flallm_ds import __version__
from flallm_ds.command import main
from flallm_ds.command_help import Verb, VerbTable

# Titles of the groups in which help lists the verbs, in the order of a project's work.
PREPARE = "prepare data"
TRAIN = "train"
SCORE = "score and translate"
LOOK = "look at a run"
SHARE = "share a model"
TRY = "try it out"

FLALLM = VerbTable(
    about=(
        "flallm trains and runs sign language translation without glosses (FLa-LLM): sign\n"
        "videos in, spoken-language sentences out, on one or many GPUs or on a CPU."
    ),
    verbs={
        "shards": Verb(
            "Turn a corpus into shards; verify, count and preview them.",
            "flallm_ds.cli.shards:SHARDS",
            PREPARE,
        ),
        "overlap": Verb(
            "Count the clips of a shard folder that another one has, too.",
            "flallm_ds.cli.overlap:overlap",
            PREPARE,
        ),
        "features": Verb(
            "Cache the features of a frozen visual encoder for stage llm.",
            "flallm_ds.cli.features:features",
            PREPARE,
        ),
        "train": Verb(
            "Train a stage (visual, llm, joint), or both stages in turn.",
            "flallm_ds.cli.train:train",
            TRAIN,
        ),
        "submit": Verb(
            "Train on a SLURM cluster, in jobs that follow one another.",
            "flallm_ds.cli.submit:submit",
            TRAIN,
        ),
        "average": Verb(
            "Average the weights of several checkpoints into one model.",
            "flallm_ds.cli.average:average",
            TRAIN,
        ),
        "hosts": Verb(
            "Check that ssh reaches every host of a hostfile.",
            "flallm_ds.cli.hosts:hosts",
            TRAIN,
        ),
        "recipes": Verb(
            "List the named configurations, with the paper's scores.",
            "flallm_ds.cli.recipes:recipes",
            TRAIN,
        ),
        "options": Verb(
            "List the options of a training run, with defaults and meanings.",
            "flallm_ds.cli.options:options",
            TRAIN,
        ),
        "doctor": Verb(
            "Check the machines of a job: versions, devices, folders, network.",
            "flallm_ds.cli.doctor:doctor",
            TRAIN,
        ),
        "plan": Verb(
            "Compute whether an LLM fits on a cluster, and how fast.",
            "flallm_ds.cli.plan:plan",
            TRAIN,
        ),
        "evaluate": Verb(
            "Score the best model of a run on a split.",
            "flallm_ds.cli.evaluate:evaluate",
            SCORE,
        ),
        "score": Verb(
            "Score files of hypotheses, also of other projects, by a preset.",
            "flallm_ds.cli.score:score",
            SCORE,
        ),
        "compare": Verb(
            "Test whether two systems differ; average several seeds.",
            "flallm_ds.cli.compare:compare",
            SCORE,
        ),
        "translate": Verb(
            "Translate videos, short or long, or a growing recording.",
            "flallm_ds.cli.translate:translate",
            SCORE,
        ),
        "demo": Verb(
            "Serve a local page that translates videos and recordings.",
            "flallm_ds.cli.demo:demo",
            SCORE,
        ),
        "watch": Verb(
            "Show speed, ranks and alarms of a run while it trains.",
            "flallm_ds.cli.watch:watch",
            LOOK,
        ),
        "metrics": Verb(
            "Write the steps or the scores of a run as a CSV table.",
            "flallm_ds.cli.watch:metrics",
            LOOK,
        ),
        "checkpoints": Verb(
            "List, verify and remove the checkpoints of a run.",
            "flallm_ds.cli.checkpoints:CHECKPOINTS",
            LOOK,
        ),
        "report": Verb(
            "Write an HTML page: scores, curves, samples with clips.",
            "flallm_ds.cli.report:report",
            LOOK,
        ),
        "strip": Verb(
            "Draw frames of clips with their hypotheses and references.",
            "flallm_ds.cli.pictures:strip",
            LOOK,
        ),
        "curves": Verb(
            "Plot loss and BLEU-4 over the epochs.", "flallm_ds.cli.pictures:curves", LOOK
        ),
        "probe": Verb(
            "Plot the gradient norms of the last layers.",
            "flallm_ds.cli.pictures:probe",
            LOOK,
        ),
        "export": Verb(
            "Write the best model of a run to a folder of its own.",
            "flallm_ds.cli.models:export",
            SHARE,
        ),
        "push": Verb(
            "Upload an exported model to the Hugging Face hub.",
            "flallm_ds.cli.models:push",
            SHARE,
        ),
        "quickstart": Verb(
            "Run every step on a synthetic corpus: 12 minutes on 2 cores.",
            "flallm_ds.quickstart:quickstart",
            TRY,
        ),
        "signsim": Verb(
            "Make the synthetic corpus and its visual backbone.",
            "flallm_ds.cli.signsim:SIGNSIM",
            TRY,
        ),
        "standin_llm": Verb(
            "Make a small mBART, for machines that cannot reach the hub.",
            "flallm_ds.cli.models:standin_llm",
            TRY,
        ),
    },
    more="Version: flallm --version",
)


def run() -> None:
    """Run the `flallm` script, which `python -m flallm_ds` is too."""
    if sys.argv[1:] == ["--version"]:
        print(f"flallm_ds {__version__}")
        return
    main(FLALLM)
