"""flallm_ds: a distributed trainer for FLa-LLM, gloss-free sign language translation (arXiv 2403.12556)."""

__version__ = "0.1.0"
