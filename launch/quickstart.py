"""`make quickstart`: corpus -> shards -> both stages and their scores -> a translated video."""

from flallm_ds.command import main
from flallm_ds.quickstart import quickstart

if __name__ == "__main__":
    main(quickstart)
