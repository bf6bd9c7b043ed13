"""A sign corpus into shards: python shards/build.py CORPUS --source=DIR --out=DIR (each
has its --help)."""

from flallm_ds.cli.shards import VERBS
from flallm_ds.command import main

if __name__ == "__main__":
    main(VERBS["build"])
