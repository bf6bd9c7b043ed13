"""Write a page and a picture of some clips: python shards/preview.py FOLDER --out=PREFIX."""

from flallm_ds.cli.shards import SHARDS
from flallm_ds.command import main

if __name__ == "__main__":
    main(SHARDS.verbs["preview"])
