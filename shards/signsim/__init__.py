"""signsim: a synthetic signed language, its signers, and corpora of it, for machines without a corpus.

signs.py    the lexicon: handshapes, locations, movements, and the signs made of them
grammar.py  weather meanings, their signs in order, their German wordings, and the split that owns each
signer.py   the seven signers, and the poses of a sequence of signs
figure.py   where body, arms and hands lie in the frame
render.py   drawing them
corpus.py   a release in the PHOENIX14T layout, whole or not at all
sheet.py    a contact sheet of all signs
make.py     the command line
"""

from shards.signsim.corpus import write_corpus
from shards.signsim.sheet import write_sheet
from shards.signsim.signs import SIGNS, Sign

__all__ = ["SIGNS", "Sign", "write_corpus", "write_sheet"]
