from flallm_ds.cli import run

run()
