"""Check that ssh reaches every host of a hostfile: `python launch/hosts.py HOSTFILE`."""

from flallm_ds.cli.hosts import hosts
from flallm_ds.command import main

if __name__ == "__main__":
    main(hosts)
