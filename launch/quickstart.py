"""Run `make quickstart`: corpus, shards, both stages and their scores, a translated video."""

from flallm_ds.cli import FLALLM
from flallm_ds.command import main

if __name__ == "__main__":
    main(FLALLM.verbs["quickstart"])
