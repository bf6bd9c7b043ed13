"""Load, trim and tune LLMs of transformers."""
