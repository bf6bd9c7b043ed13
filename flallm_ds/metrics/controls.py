"""Controls of an evaluation: the same model with videos that do not show the sentence.

If a control scores as high as the model, the model does not use what the control lacks.

    blind            each clip has the video of another clip; needs no second search
    shuffled_frames  the frames of each clip are in random order
    blank            all frames are gray, or all features are 0
"""

from collections.abc import Sequence

from flallm_ds.errors import UserError
from flallm_ds.metrics import Scores

BLIND, SHUFFLED_FRAMES, BLANK = "blind", "shuffled_frames", "blank"
CONTROLS = (BLIND, SHUFFLED_FRAMES, BLANK)
# A difference is significant if fewer resampled test sets contradict it.
MAX_CHANCE = 0.05


def check_controls(controls: Sequence[str]) -> None:
    """Raise UserError for a control that does not exist."""
    for name in controls:
        if name not in CONTROLS:
            raise UserError(f"--controls must be of {', '.join(CONTROLS)}, got {name!r}.")


_MEANINGS = {
    BLIND: (
        "The model uses the video",
        "The model does not use the video",
        "with the videos of other clips",
    ),
    SHUFFLED_FRAMES: (
        "The model uses the order of the frames",
        "The model does not use the order of the frames",
        "with the frames of each clip in random order",
    ),
    BLANK: (
        "The model needs the pictures",
        "The model does not need the pictures",
        "with blank frames",
    ),
}


def meaning(control: str, model: Scores, scores: Scores) -> str:
    """Say what a control shows. Both scores must have the same resampled test sets."""
    gaps = model.resampled["bleu4"] - scores.resampled["bleu4"]
    chance = float((gaps <= 0).mean())
    uses, does_not, how = _MEANINGS[control]
    sentence = uses
    if chance >= MAX_CHANCE:
        sentence = f"{does_not}, as far as {model.num_sentences:,} clips show"
    # With 1,000 resampled test sets, 0 of them do not mean a chance of 0.
    least = 1 / len(gaps)
    probability = f"p = {chance:.3f}" if chance >= least else f"p < {least:g}"
    return (
        f"{sentence}: BLEU-4 is {scores.bleu4:.2f} {how}, and {model.bleu4:.2f} as it is "
        f"({probability})."
    )
