"""Using an export: one video to a sentence, a split to hypotheses and a picture."""
