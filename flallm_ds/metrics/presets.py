"""Rules by which published scores were computed, by name.

Results of the same hypotheses differ by several BLEU-4 between projects. A preset computes
the scores as one project does. docs/scores.md describes the projects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from flallm_ds.data.text.languages import WordRule, find_language, word_rule
from flallm_ds.errors import UserError
from flallm_ds.metrics.bleu import Smoothing
from flallm_ds.metrics.rouge import RougeRule

# Encodes sentences with a tokenizer and decodes them.
RoundTrip = Callable[[Sequence[str]], list[str]]

DEFAULT = "sacrebleu"
# Presets with Google's rouge_score keep only the letters a to z and digits.
_LATIN = "rouge_score keeps only Latin letters and digits, so ROUGE-L would be 0.00"
_SPLIT = "this preset separates words at spaces, and most references have none"


@dataclass(frozen=True)
class Preset:
    """The rule of one project.

    rule: a line for people. tokenize: a tokenizer of sacreBLEU, or `language` for that of
    the language. unspaced: what happens to languages without spaces between words: their
    own tokenizer (language), characters (split), as Uni-Sign does for Chinese (uni-sign),
    texts must contain spaces (given), or only Latin scripts are scored (latin).
    """

    name: str
    rule: str
    tokenize: Literal["language", "13a", "none"]
    rouge: RougeRule
    unspaced: Literal["language", "split", "uni-sign", "given", "latin"]
    smooth: Smoothing = "exp"
    smooth_value: float | None = None
    effective_order: bool = False
    decodes_references: bool = False
    lower_with_period: bool = False

    def bleu_tokenizer(self, rule: WordRule) -> str:
        """Return the tokenizer of sacreBLEU. rule: `word_rule` of the language."""
        return rule if self.tokenize == "language" else self.tokenize


PRESETS = (
    Preset(
        "sacrebleu",
        "sacreBLEU's defaults, by characters where words have no spaces; ROUGE-L with "
        "beta 1.2; text as it is",
        tokenize="language",
        rouge="words",
        unspaced="language",
    ),
    Preset(
        "signjoey",
        "signjoey: BLEU without tokenizer, floor smoothing 0; COCO's ROUGE-L with beta 1.2; "
        "text as it is",
        tokenize="none",
        rouge="coco",
        unspaced="given",
        smooth="floor",
        smooth_value=0.0,
        effective_order=True,
    ),
    Preset(
        "gfslt",
        "GFSLT-VLP: COCO's BLEU over words and ROUGE-L with beta 1.2; no final period is "
        "added",
        tokenize="none",
        rouge="coco",
        unspaced="given",
        smooth="coco",
        decodes_references=True,
    ),
    Preset(
        "slrt",
        "MMTLB, TwoStream: BLEU without tokenizer, floor smoothing 0; ROUGE-L of "
        "tf-seq2seq; characters where words have no spaces",
        tokenize="none",
        rouge="seq2seq",
        unspaced="split",
        smooth="floor",
        smooth_value=0.0,
        effective_order=True,
    ),
    Preset(
        "unisign",
        "Uni-Sign: BLEU with 13a; ROUGE-L of the package rouge; Chinese by characters, with "
        "， and ？ of references replaced",
        tokenize="13a",
        rouge="rouge",
        unspaced="uni-sign",
    ),
    Preset(
        "ssvp",
        "SSVP-SLT: BLEU with 13a; ROUGE-L of Google's rouge_score; text as it is",
        tokenize="13a",
        rouge="rouge_score",
        unspaced="latin",
    ),
    Preset(
        "spamo",
        "SpaMo: BLEU with 13a; ROUGE-L of Google's rouge_score with stemmer; lower case, a "
        "final period is added",
        tokenize="13a",
        rouge="rouge_score_stemmed",
        unspaced="latin",
        lower_with_period=True,
    ),
)
PRESET_NAMES = tuple(preset.name for preset in PRESETS)


def find_preset(name: str) -> Preset:
    """Return a preset. Raises UserError for an unknown name."""
    for preset in PRESETS:
        if preset.name == name:
            return preset
    raise UserError(f"--preset must be one of {', '.join(PRESET_NAMES)}, got {name!r}.")


def rule_of(preset: Preset, round_trip: bool) -> str:
    """Return the rule of scores for people. round_trip: whether a tokenizer was given."""
    if not preset.decodes_references:
        return preset.rule
    how = "decoded by the tokenizer" if round_trip else "as given, not by a tokenizer"
    return f"{preset.rule}; references {how}"


def prepared(
    preset: Preset,
    hypotheses: Sequence[str],
    references: Sequence[str],
    language: str,
    round_trip: RoundTrip | None = None,
) -> tuple[list[str], list[str]]:
    """Return hypotheses and references as the preset scores them.

    round_trip: encodes and decodes the references of a preset that does this. Raises
    UserError if the preset does not fit the language.
    """
    said, meant = list(hypotheses), list(references)
    if preset.decodes_references and round_trip is not None:
        meant = round_trip(meant)
    rule = word_rule(language)
    _check_language(preset, meant, language, rule)
    if preset.lower_with_period:
        said, meant = list(map(_with_period, said)), list(map(_with_period, meant))
    if rule != "13a" and preset.unspaced == "split":
        said, meant = list(map(" ".join, said)), list(map(" ".join, meant))
    elif rule == "zh" and preset.unspaced == "uni-sign":
        said = [_without_spaces(text) for text in said]
        for row, text in enumerate(meant):
            meant[row] = _without_spaces(text.replace("，", ",").replace("？", "?"))
    return said, meant


def _with_period(text: str) -> str:
    lower = text.strip().lower()
    return lower if lower.endswith(".") else f"{lower}."


def _without_spaces(text: str) -> str:
    """Return the characters of a text separated by one space, without its own spaces."""
    return " ".join(text.replace(" ", "").replace("\n", ""))


def _check_language(
    preset: Preset, references: Sequence[str], language: str, rule: WordRule
) -> None:
    """Raise UserError if the preset would give meaningless scores for the language."""
    found = find_language(language)
    name = found.name if found and found.name else language
    reason = ""
    if preset.unspaced == "latin" and found and found.script not in ("", "Latn"):
        reason = _LATIN
    # Uni-Sign has a rule for Chinese, and none for other languages without spaces.
    needs_spaces = preset.unspaced == "given" or (
        preset.unspaced == "uni-sign" and rule == "char"
    )
    if needs_spaces and rule != "13a":
        num_unsplit = sum(len(text.split()) < 2 for text in references)
        if 2 * num_unsplit > len(references):
            reason = _SPLIT
    if reason:
        raise UserError(
            f"The preset must fit the language, got {preset.name} for {name}: {reason}. Use "
            "the preset sacrebleu."
        )
