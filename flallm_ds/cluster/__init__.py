"""Start runs on a cluster: job scripts, the queue of SLURM, hostfiles."""
