"""Build shards of a corpus: python shards/build.py CORPUS --source=PATH --out=FOLDER."""

from flallm_ds.cli.shards import SHARDS
from flallm_ds.command import main

if __name__ == "__main__":
    main(SHARDS.verbs["build"])
