"""Clips of a shard folder to look at: python shards/preview.py FOLDER --out=PREFIX."""

from flallm_ds.command import main
from flallm_ds.sharding.preview import preview

if __name__ == "__main__":
    main(preview)
