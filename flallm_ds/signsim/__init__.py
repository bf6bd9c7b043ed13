"""signsim: a synthetic signed language, its signers and corpora, for machines without a corpus.

signs.py             the lexicon: handshapes, locations, movements, and the signs made of them
words.py             the German words of the signs, and random draws of meanings
plans.py             the kinds of sentences: signs in order, and German wordings
grammar.py           sentences, and the split that owns each
signer.py            the seven signers, and the poses of a sequence of signs
figure.py            where body, arms and hands lie in the frame
paint.py             shapes painted onto a frame
head.py              a signer's head
render.py            the frames of a clip
corpus.py            a release in the PHOENIX14T layout, whole or not at all
sheet.py             a contact sheet of all signs
pretraining_data.py  frames of random signs, and where each hand is
backbone.py          a small ResNet-18 that stands in for ImageNet weights
"""

from flallm_ds.signsim.corpus import write_corpus
from flallm_ds.signsim.sheet import write_sheet
from flallm_ds.signsim.signs import SIGNS, Sign

__all__ = ["SIGNS", "Sign", "write_corpus", "write_sheet"]
