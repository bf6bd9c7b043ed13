"""The differences between a hypothesis and its reference, for reports and pictures."""

from difflib import SequenceMatcher

# Parts of a sentence: equal to the other sentence, different, equal, different, ...
Parts = list[str]


def differences(hypothesis: str, reference: str, characters: bool) -> tuple[Parts, Parts]:
    """Return the parts of both sentences.

    characters: compare characters, for a language without spaces; else words.
    """
    words, other = _words(hypothesis, characters), _words(reference, characters)
    matcher = SequenceMatcher(None, words, other, autojunk=False)
    separator = "" if characters else " "
    first, second = [""], [""]
    for kind, begin, end, other_begin, other_end in matcher.get_opcodes():
        is_equal = kind == "equal"
        _append(first, separator.join(words[begin:end]), is_equal, separator)
        _append(second, separator.join(other[other_begin:other_end]), is_equal, separator)
    return first, second


def _words(text: str, characters: bool) -> list[str]:
    return list("".join(text.split())) if characters else text.split()


def _append(parts: Parts, text: str, is_equal: bool, separator: str) -> None:
    """Append text to parts, in which equal and different ones alternate."""
    if not text:
        return
    # Parts at even positions are equal. Spaces are in these, and are not marked.
    was_equal = len(parts) % 2 == 1
    between = separator if any(parts) else ""
    if was_equal == is_equal:
        parts[-1] += between + text
    elif is_equal:
        parts.append(between + text)
    else:
        parts[-1] += between
        parts.append(text)
