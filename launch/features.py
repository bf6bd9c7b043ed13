"""Cache the features of a frozen visual encoder: `deepspeed launch/features.py
--visual_run=RUN --out=FOLDER`."""

from flallm_ds.cli.features import features
from flallm_ds.command import main

if __name__ == "__main__":
    main(features)
