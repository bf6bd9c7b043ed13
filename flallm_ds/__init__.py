"""flallm_ds: a distributed trainer for FLa-LLM, gloss-free sign language translation (arXiv 2403.12556)."""

import os

# OpenMP threads that wait for one another spin by default; beside any other process on the same cores a step
# then takes 10 to 30 times as long. It must be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
