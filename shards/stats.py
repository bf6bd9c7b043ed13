"""What a shard folder holds, in numbers: python shards/stats.py FOLDER."""

from flallm_ds.cli.shards import VERBS
from flallm_ds.command import main

if __name__ == "__main__":
    main(VERBS["stats"])
