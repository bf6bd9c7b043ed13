"""Clips of a shard folder to look at: python shards/preview.py FOLDER --out=PREFIX."""

from flallm_ds.cli.shards import VERBS
from flallm_ds.command import main

if __name__ == "__main__":
    main(VERBS["preview"])
