"""Check every byte of a shard folder against its index: python shards/verify.py FOLDER
[--repair=drop|rebuild]."""

from flallm_ds.cli.shards import SHARDS
from flallm_ds.command import main

if __name__ == "__main__":
    main(SHARDS.verbs["verify"])
