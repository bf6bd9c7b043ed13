"""Report the tokens of texts that a vocabulary does not have."""

from dataclasses import dataclass


@dataclass(frozen=True)
class UnknownTokens:
    """Counts of the tokens in sentences, and of the unknown ones among them.

    characters: (unknown character, number of occurrences), the most frequent first. A word
    stands for its characters if none of them is unknown by itself.
    """

    num_tokens: int
    num_unknown: int
    characters: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        share = 100 * self.num_unknown / max(1, self.num_tokens)
        text = f"{share:.2g} % of {self.num_tokens:,} tokens"
        if not self.characters:
            return text
        # The first ten are enough to recognise the cause.
        shown = self.characters[:10]
        listed = ", ".join(f"{character!r} ({times:,})" for character, times in shown)
        text += f", because of {listed}"
        more = len(self.characters) - len(shown)
        return f"{text} and {more} more" if more else text
