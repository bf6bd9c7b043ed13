"""Controls of an evaluation: the same model with videos that do not show the sentence.

If a control scores as high as the model, the model does not use what the control lacks.

    blind            each clip has the video of another clip; needs no second search
    another_signer   each clip has the video of another signer with another sentence; needs
                     no second search
    shuffled_frames  the frames of each clip are in random order
    blank            all frames are gray, or all features are 0
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flallm_ds.errors import UserError
from flallm_ds.metrics import Scores

BLIND, ANOTHER_SIGNER = "blind", "another_signer"
SHUFFLED_FRAMES, BLANK = "shuffled_frames", "blank"
CONTROLS = (BLIND, ANOTHER_SIGNER, SHUFFLED_FRAMES, BLANK)
# A difference is significant if fewer resampled test sets contradict it.
MAX_CHANCE = 0.05


def check_controls(controls: Sequence[str]) -> None:
    """Raise UserError for a control that does not exist."""
    for name in controls:
        if name not in CONTROLS:
            raise UserError(f"--controls must be of {', '.join(CONTROLS)}, got {name!r}.")


@dataclass(frozen=True)
class _Words:
    """What is said of a control.

    higher: if the other score is higher than that of the control. not_higher: otherwise.
    control: the videos of the control. other: those of the score it is compared with.
    """

    higher: str
    not_higher: str
    control: str
    other: str = "as it is"


_WORDS = {
    BLIND: _Words(
        "The model uses the video",
        "The model does not use the video",
        "with the videos of other clips",
    ),
    # A model that reads the signs alone also says what its signer usually says. So this
    # control cannot prove that the model looks at the signer: "may".
    ANOTHER_SIGNER: _Words(
        "The model may use who signs and not only what is signed, because the signers say "
        "different things",
        "The model does not use who signs",
        "with the videos of other signers",
        "with those of any signer",
    ),
    SHUFFLED_FRAMES: _Words(
        "The model uses the order of the frames",
        "The model does not use the order of the frames",
        "with the frames of each clip in random order",
    ),
    BLANK: _Words(
        "The model needs the pictures",
        "The model does not need the pictures",
        "with blank frames",
    ),
}


def meaning(control: str, other: Scores, scores: Scores) -> str:
    """Say what a control shows.

    scores: those of the control. other: those of the model, or of the videos of any signer
    for ANOTHER_SIGNER. Both must have the same resampled test sets.
    """
    gaps = other.resampled["bleu4"] - scores.resampled["bleu4"]
    chance = float((gaps <= 0).mean())
    words = _WORDS[control]
    sentence = words.higher
    if chance >= MAX_CHANCE:
        sentence = f"{words.not_higher}, as far as {other.num_sentences:,} clips show"
    # With 1,000 resampled test sets, 0 of them do not mean a chance of 0.
    least = 1 / len(gaps)
    probability = f"p = {chance:.3f}" if chance >= least else f"p < {least:g}"
    return (
        f"{sentence}: BLEU-4 is {scores.bleu4:.2f} {words.control}, and {other.bleu4:.2f} "
        f"{words.other} ({probability})."
    )


def no_other_signer(signers: Iterable[str]) -> str:
    """Say why a split has no control with another signer. signers: of its clips."""
    names = set(signers) - {""}
    why = "no other signer signs another sentence in the same language"
    if not names:
        why = "the shards do not say who signs"
    elif len(names) == 1:
        why = f"all clips are by the signer {names.pop()}"
    return f"There is no control with another signer: {why}."
