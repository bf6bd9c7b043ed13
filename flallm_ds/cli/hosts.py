"""`flallm hosts`: check the hosts of a hostfile."""

from pathlib import Path

from flallm_ds.command import main
from flallm_ds.hosts import check_hostfile


def hosts(hostfile: Path, *, timeout_s: float = 10.0) -> None:
    """Check that ssh reaches every host of a hostfile, before `deepspeed --hostfile` runs.

    Prints the hosts and their GPUs. The exit code is 2 if a host cannot be reached.

    Example: flallm hosts hostfile

    Options:
        timeout_s: seconds to wait for the answer of each host
    """
    found = check_hostfile(hostfile, timeout_s)
    for host, num_gpus in found.items():
        print(f"{host}  {num_gpus} GPUs")
    print(f"{len(found)} hosts answer, with {sum(found.values())} GPUs")


if __name__ == "__main__":
    main(hosts)
