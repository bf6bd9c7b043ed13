"""Define the German words of the signs, and draw random meanings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Phrase = tuple[str, ...]
"""Equivalent forms, the usual one first."""
Glosses = tuple[str, ...]
"""Signs in signing order."""

NO_PHRASE: Phrase = ("",)  # for an optional part that a sentence does not have


@dataclass(frozen=True)
class Noun:
    """Hold a weather phenomenon with its German forms."""

    gloss: str
    word: str
    gender: str
    """m, f, or p for a plural."""
    qualities: tuple[tuple[str, str], ...]
    """Pairs of an intensity sign and a word; `-` is replaced by the ending."""
    vanish: tuple[str, str]
    """Finite verb and particle for VERSCHWINDEN."""

    @property
    def article(self) -> str:
        return {"m": "der", "f": "die", "p": "die"}[self.gender]


# Predicates for VERSCHWINDEN: finite verb and particle.
_FADES = ("lässt", "nach")
_LIFTS = ("löst sich", "auf")
_LEAVE = ("ziehen", "ab")
NOUNS = (
    Noun(
        "REGEN",
        "regen",
        "m",
        (("STARK", "kräftig-"), ("SCHWACH", "leicht-"), ("VIEL", "viel")),
        _FADES,
    ),
    Noun(
        "SCHNEE",
        "schnee",
        "m",
        (("VIEL", "viel"), ("WENIG", "etwas"), ("STARK", "dicht-")),
        _FADES,
    ),
    Noun(
        "GEWITTER",
        "gewitter",
        "p",
        (("STARK", "heftig-"), ("WENIG", "einzeln-"), ("SCHWACH", "schwach-")),
        _LEAVE,
    ),
    Noun(
        "SCHAUER",
        "schauer",
        "p",
        (
            ("VIEL", "zahlreich-"),
            ("WENIG", "einzeln-"),
            ("STARK", "kräftig-"),
            ("SCHWACH", "leicht-"),
        ),
        _LEAVE,
    ),
    Noun(
        "NEBEL",
        "nebel",
        "m",
        (("VIEL", "viel"), ("WENIG", "wenig"), ("STARK", "dicht-")),
        _LIFTS,
    ),
    Noun(
        "WIND",
        "wind",
        "m",
        (("STARK", "stark-"), ("SCHWACH", "schwach-"), ("WENIG", "wenig")),
        _FADES,
    ),
    Noun(
        "STURM",
        "sturm",
        "m",
        (("STARK", "schwer-"), ("SCHWACH", "leicht-")),
        _FADES,
    ),
    Noun(
        "SONNE",
        "sonne",
        "f",
        (("VIEL", "viel"), ("WENIG", "wenig")),
        ("geht", "unter"),
    ),
    Noun(
        "WOLKE",
        "wolken",
        "p",
        (
            ("VIEL", "viel-"),
            ("WENIG", "ein paar"),
            ("STARK", "dicht-"),
            ("SCHWACH", "locker-"),
        ),
        ("lösen sich", "auf"),
    ),
    Noun(
        "FROST",
        "frost",
        "m",
        (("STARK", "streng-"), ("SCHWACH", "leicht-")),
        _FADES,
    ),
)
# Endings of adjectives without an article, by case and gender.
_ENDINGS = {
    "nom": {"m": "er", "f": "e", "p": "e"},
    "acc": {"m": "en", "f": "e", "p": "e"},
}
DATIVE_PLURAL = {"gewitter": "gewittern", "schauer": "schauern", "wolken": "wolken"}

# Times: signs and phrases.
DAYS = (
    ("MONTAG", "am montag"),
    ("DIENSTAG", "am dienstag"),
    ("MITTWOCH", "am mittwoch"),
    ("DONNERSTAG", "am donnerstag"),
    ("FREITAG", "am freitag"),
    ("SAMSTAG", "am samstag"),
    ("SONNTAG", "am sonntag"),
)
PARTS: tuple[tuple[str, Phrase], ...] = (
    ("NACHT", ("in der nacht",)),
    ("FRUEH", ("in der früh", "am frühen morgen")),
    ("MITTAG", ("am mittag", "mittags")),
    ("ABEND", ("am abend", "abends")),
)
NEAR = (("HEUTE", "heute"), ("MORGEN", "morgen"))
NEAR_PARTS = {"NACHT": "nacht", "FRUEH": "früh", "MITTAG": "mittag", "ABEND": "abend"}

# Places: signs, and stems or phrases.
CARDINALS = (("NORD", "nord"), ("SUED", "süd"), ("WEST", "west"), ("OST", "ost"))
PLACES: tuple[tuple[str, Phrase], ...] = (
    ("MITTE", ("in der mitte",)),
    ("KUESTE", ("an der küste", "an den küsten")),
    ("ALPEN", ("an den alpen", "am alpenrand")),
    ("BERG", ("in den bergen", "im bergland")),
    ("RHEIN", ("am rhein",)),
)
# Sign, adjective, comparative.
STATES = (
    ("KLAR", "klar", "klarer"),
    ("WARM", "warm", "wärmer"),
    ("KALT", "kalt", "kälter"),
    ("KUEHL", "kühl", "kühler"),
    ("HEISS", "heiß", "heißer"),
    ("TROCKEN", "trocken", "trockener"),
    ("FREUNDLICH", "freundlich", "freundlicher"),
)
# Temperatures, in ascending order for two_numbers.
NUMBERS = (
    ("FUENF", "fünf"),
    ("ACHT", "acht"),
    ("ZEHN", "zehn"),
    ("FUENFZEHN", "fünfzehn"),
    ("ZWANZIG", "zwanzig"),
    ("DREISSIG", "dreißig"),
)


class Draw:
    """Draw random meanings. Most methods return (signs, phrase)."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def index(self, num: int) -> int:
        return int(self.rng.integers(num))

    def time(self) -> tuple[Glosses, Phrase]:
        """Draw a time: a day, a part of the day, or both as in `heute abend`."""
        # 42 % days of the week, 26 % parts of the day, 8 % weekend, 24 % today or tomorrow
        # (half of them with a part of the day).
        kind = self.rng.random()
        if kind < 0.42:
            gloss, text = DAYS[self.index(len(DAYS))]
            return (gloss,), (text,)
        if kind < 0.68:
            gloss, phrase = PARTS[self.index(len(PARTS))]
            return (gloss,), phrase
        if kind < 0.76:
            return ("WOCHENENDE",), ("am wochenende",)
        gloss, text = NEAR[self.index(len(NEAR))]
        if self.chance(0.5):
            return (gloss,), (text,)
        part, word = list(NEAR_PARTS.items())[self.index(len(NEAR_PARTS))]
        return (gloss, part), (f"{text} {word}",)

    def place(self) -> tuple[Glosses, Phrase]:
        """Draw a place: a direction, a half of the country, or a landscape."""
        # 30 % directions, 12 % halves, 12 % directions between two, 6 % the whole country,
        # 40 % landscapes.
        kind = self.rng.random()
        gloss, word = CARDINALS[self.index(4)]
        if kind < 0.30:
            return (gloss,), (f"im {word}en",)
        if kind < 0.42:
            return (gloss, "HAELFTE"), (f"in der {word}hälfte",)
        if kind < 0.54:
            # North or south, then west or east.
            first, second = self.index(2), 2 + self.index(2)
            glosses = (CARDINALS[first][0], CARDINALS[second][0])
            return glosses, (f"im {CARDINALS[first][1]}{CARDINALS[second][1]}en",)
        if kind < 0.60:
            return ("DEUTSCHLAND",), ("in deutschland", "bei uns")
        gloss, phrase = PLACES[self.index(len(PLACES))]
        return (gloss,), phrase

    def two_places(self) -> tuple[tuple[Glosses, Phrase], tuple[Glosses, Phrase]]:
        first, second = self.place(), self.place()
        while set(second[0]) & set(first[0]):
            second = self.place()
        return first, second

    def setting(self) -> tuple[tuple[Glosses, Phrase], tuple[Glosses, Phrase]]:
        """Draw a time and a place. In 90 % of the cases, one of the two is empty."""
        # Both are drawn; 45 % keep only the time, 45 % only the place, 10 % both.
        time, place = self.time(), self.place()
        kind = self.rng.random()
        nothing: tuple[Glosses, Phrase] = ((), NO_PHRASE)
        return (time if kind < 0.55 else nothing), (place if kind >= 0.45 else nothing)

    def cardinal(self) -> tuple[str, str]:
        return CARDINALS[self.index(4)]

    def noun(
        self,
        but: str = "",
        quality: float = 0.5,
        case: str = "nom",
    ) -> tuple[Glosses, Phrase, Noun]:
        """Draw a phenomenon other than `but`.

        quality: the probability of an adjective. case: nom, acc, or dat (no adjective).
        """
        noun = NOUNS[self.index(len(NOUNS))]
        while noun.gloss == but:
            noun = NOUNS[self.index(len(NOUNS))]
        word = DATIVE_PLURAL.get(noun.word, noun.word) if case == "dat" else noun.word
        if not self.chance(quality):
            return (noun.gloss,), (word,), noun
        assert case != "dat", "the adjectives' dative is not in the grammar"
        sign, stem = noun.qualities[self.index(len(noun.qualities))]
        quality_word = stem.replace("-", _ENDINGS[case][noun.gender])
        return (noun.gloss, sign), (f"{quality_word} {word}",), noun

    def state(self, but: str = "") -> tuple[str, str, str]:
        states = [state for state in STATES if state[0] != but]
        # Always one draw, so that the number of draws does not depend on `but`.
        return states[self.index(len(states))]

    def number(self) -> tuple[Glosses, str]:
        """Draw a temperature in degrees; one in six is below zero."""
        if self.chance(1 / 6):
            # At most -15 degrees: the first four numbers.
            gloss, word = NUMBERS[self.index(4)]
            return ("MINUS", gloss), f"minus {word}"
        gloss, word = NUMBERS[self.index(len(NUMBERS))]
        return (gloss,), word

    def two_numbers(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Draw two temperatures, the lower first."""
        low, high = sorted(self.rng.choice(len(NUMBERS), 2, replace=False).tolist())
        return NUMBERS[low], NUMBERS[high]
