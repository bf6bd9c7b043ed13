"""Tests of the parts of a test set."""

from flallm_ds.batch import Hypothesis
from flallm_ds.inference.analysis import Known, analyse
from flallm_ds.metrics.slices import (
    MAX_SIGNERS,
    OTHER_SIGNERS,
    Nearest,
    by_length,
    by_signer,
    by_training_text,
    word_pairs,
)

TEXTS = [
    "im Norden regnet es am Abend",
    "Im Norden regnet es am Abend .",
    "im Norden regnet es am Tag",
    "wir danken für Ihr Interesse",
    "Schnee",
]


def clips(texts: list[str]) -> list[Hypothesis]:
    return [Hypothesis(str(n), text, text, "c", "de") for n, text in enumerate(texts)]


def keys(parts: dict[str, list[Hypothesis]]) -> dict[str, str]:
    return {name: "".join(clip.key for clip in found) for name, found in parts.items()}


def test_clips_are_divided_by_the_length_of_their_references() -> None:
    long = " ".join(["wort"] * 21)
    assert keys(by_length(clips([*TEXTS, long]))) == {
        "1 to 5 words": "34", "6 to 10 words": "012", "more than 20 words": "5"
    }  # fmt: skip


def test_clips_are_divided_by_signer_if_there_are_several() -> None:
    some = clips(TEXTS)
    signers = {"0": "B", "1": "A", "2": "B", "3": "A", "4": "B"}
    assert keys(by_signer(some, signers)) == {"signer B": "024", "signer A": "13"}
    assert by_signer(some, {}) == {} == by_signer(some, dict.fromkeys(signers, "A"))
    many = clips(["x"] * 30)
    found = by_signer(many, {clip.key: clip.key for clip in many})
    assert len(found) == MAX_SIGNERS + 1 and len(found[OTHER_SIGNERS]) == 20


def test_clips_are_divided_by_their_nearest_training_sentence() -> None:
    training = ["im norden regnet es am abend", "morgen scheint die Sonne"]
    found = by_training_text(clips(TEXTS), training, ["de", "de"])
    # Case and punctuation do not matter; one other word is near.
    assert keys(found) == {"exact": "01", "near": "2", "far": "34"}


def test_similarity_is_the_highest_dice_coefficient() -> None:
    sets = [word_pairs(text, "de") for text in ("a b c", "a b d e", "x")]
    nearest = Nearest(sets)
    # Pairs: (start, a), (a, b) in common of 4 and 4, and of 4 and 5.
    assert nearest.similarity(word_pairs("a b z", "de")) == 2 * 2 / 8
    assert nearest.similarity(word_pairs("x", "de")) == 1
    assert nearest.similarity(word_pairs("q", "de")) == 0


def test_every_part_has_scores_with_intervals() -> None:
    some = clips(TEXTS * 4)
    signers = {clip.key: str(int(clip.key) % 2) for clip in some}
    known = Known(signers, ["im norden regnet es am abend"], ["de"])
    found = analyse(some, known, resamples=20)
    stored = found.as_dict()
    assert stored["slices"].keys() == {"length", "signer", "training_text"}
    for parts in stored["slices"].values():
        assert sum(part["num_sentences"] for part in parts.values()) == 20
        for part in parts.values():
            assert {"bleu4", "chrf", "intervals"} <= part.keys()
            assert "bleu_signature" not in part
    assert stored["words"]["de"]["with content"]["recall"] == 100
    printed = str(found)
    assert "| exact training sentence" in printed and "| signer 1" in printed
    assert "words: with content: recall 100.0" in printed
