"""What a shard folder holds, in numbers: python shards/stats.py FOLDER."""

from flallm_ds.command import main
from flallm_ds.sharding.stats import stats

if __name__ == "__main__":
    main(stats)
