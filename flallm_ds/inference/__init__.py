"""Using an export: one video to a sentence, a split to hypotheses and a picture."""

from flallm_ds.inference.translator import Translator

__all__ = ["Translator"]
