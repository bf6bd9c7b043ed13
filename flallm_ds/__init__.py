"""flallm_ds: a distributed trainer for FLa-LLM, gloss-free sign language translation
(arXiv 2403.12556)."""

import os

# By default, OpenMP threads that wait for each other spin for milliseconds: next to another
# process on the same cores, a step then takes 2 to 30 times as long. Without spinning, a
# process that is alone runs at half its speed (docs/experiments.md). libgomp reads the
# variable when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"
