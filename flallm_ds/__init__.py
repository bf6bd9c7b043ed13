"""flallm_ds: a distributed trainer for FLa-LLM, gloss-free sign language translation
(arXiv 2403.12556)."""

import os

# OpenMP threads that wait for one another spin for milliseconds by default: beside any
# other process on the same cores a step then takes 2 to 30 times as long. Not to spin at
# all halves the rate of a process that is alone (docs/experiments.md). It must be said
# before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"
