"""Access shard folders on a local disk, or at an address through a bounded cache."""
