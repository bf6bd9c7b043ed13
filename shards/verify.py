"""Every byte of a shard folder against its index: python shards/verify.py FOLDER [--repair=drop|rebuild]."""

from flallm_ds.command import main
from flallm_ds.sharding.verify import verify

if __name__ == "__main__":
    main(verify)
