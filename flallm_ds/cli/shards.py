"""Define `flallm shards`: build, check, repair and show shard folders."""

from flallm_ds.command_help import Verb, VerbTable

SHARDS = VerbTable(
    about="Shards are tar files with an index, from which training reads a corpus.",
    verbs={
        "build": Verb("Build shards of a corpus.", "flallm_ds.cli.build:BUILD"),
        "verify": Verb(
            "Check a shard folder against its index, and repair it.",
            "flallm_ds.sharding.verify:verify",
        ),
        "stats": Verb(
            "Print statistics of a shard folder.",
            "flallm_ds.sharding.stats:stats",
        ),
        "preview": Verb(
            "Write a contact sheet and a web page of some clips.",
            "flallm_ds.sharding.preview:preview",
        ),
    },
)
