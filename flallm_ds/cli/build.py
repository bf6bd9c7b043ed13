"""`flallm shards build`: one verb for each importer, and the options that all of them share."""

import inspect

from flallm_ds.command_help import VerbTable
from flallm_ds.sharding.build import VERBS
from flallm_ds.sharding.options import Options

BUILD = VerbTable(
    about=(
        "Build shards of a corpus. The verb names its layout; `manifest` reads any corpus\n"
        "that a CSV, TSV or JSON lines file lists."
    ),
    verbs=VERBS,
    more=f"options of every corpus\n{inspect.getdoc(Options)}",
)
