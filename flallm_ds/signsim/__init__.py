"""signsim: a synthetic signed language, its signers, and corpora of it, for machines without a corpus.

signs.py    the lexicon: handshapes, locations, movements, and the signs made of them
grammar.py  weather meanings, their signs in order, their German wordings, and the split that owns each
signer.py   the seven signers, and the poses of a sequence of signs
figure.py   where body, arms and hands lie in the frame
render.py   drawing them
corpus.py   a release in the PHOENIX14T layout, whole or not at all
sheet.py    a contact sheet of all signs
backbone.py a small ResNet-18 that stands in for ImageNet weights
"""

from flallm_ds.signsim.corpus import write_corpus
from flallm_ds.signsim.sheet import write_sheet
from flallm_ds.signsim.signs import SIGNS, Sign

__all__ = ["SIGNS", "Sign", "write_corpus", "write_sheet"]
