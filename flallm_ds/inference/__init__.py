"""Use an export: translate a video, evaluate a split, draw pictures."""

from flallm_ds.inference.translator import Translator

__all__ = ["Translator"]
