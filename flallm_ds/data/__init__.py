"""From shards on a disk or at an address to batches on a device."""
