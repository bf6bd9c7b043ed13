"""Print sizes, lengths and words of a shard folder: python shards/stats.py FOLDER."""

from flallm_ds.cli.shards import SHARDS
from flallm_ds.command import main

if __name__ == "__main__":
    main(SHARDS.verbs["stats"])
