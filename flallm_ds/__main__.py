"""Run `python -m flallm_ds`, which is the `flallm` command."""

from flallm_ds.cli import run

run()
