"""signsim: generate videos of a synthetic sign language, for machines without a corpus.

signs.py             the lexicon: handshapes, locations, movements, and the signs
words.py             the German words of the signs, and random draws of meanings
plans.py             the kinds of sentences: the order of signs, and German wordings
grammar.py           random sentences, and the split of each sentence
signer.py            the seven signers, and the poses of a sequence of signs
figure.py            the positions of body, arms and hands in the frame
paint.py             drawing of shapes with OpenCV
head.py              drawing of the head
render.py            drawing of the frames of a clip
corpus.py            writing of a release in the PHOENIX14T layout
sheet.py             a contact sheet of all signs
pretraining_data.py  frames of random signs with the positions of the hands
backbone.py          a small ResNet-18 that replaces ImageNet weights
"""

from flallm_ds.signsim.corpus import write_corpus
from flallm_ds.signsim.sheet import write_sheet
from flallm_ds.signsim.signs import SIGNS, Sign

__all__ = ["SIGNS", "Sign", "write_corpus", "write_sheet"]
