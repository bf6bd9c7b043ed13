"""`flallm shards`: build, check and look at shard folders."""

from flallm_ds.command import Verb

VERBS = {
    "build": Verb("Build shards of a corpus.", "flallm_ds.sharding.build:VERBS"),
    "verify": Verb(
        "Check every byte of a shard folder, and repair it.",
        "flallm_ds.sharding.verify:verify",
    ),
    "stats": Verb(
        "Print what a shard folder holds, in numbers.", "flallm_ds.sharding.stats:stats"
    ),
    "preview": Verb(
        "Make a picture and a page of some clips.", "flallm_ds.sharding.preview:preview"
    ),
}
