"""A weather-report grammar: meanings, their signs in order, and their German wordings.

Text follows PHOENIX14T: lower case, umlauts, no punctuation. A wording is a list of phrases and a phrase a
tuple of equivalent forms whose first is the usual one. Signs put the time first, qualities after what they
qualify, and verbs last, so their order differs from the words'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "dev", "test")

# Share of phrases, and of sentences, whose wording leaves the usual form: what no system can predict.
FREE_PHRASE = 0.08
FREE_ORDER = 0.08

Phrase = tuple[str, ...]
Glosses = tuple[str, ...]
Wording = list[Phrase]

NO_PHRASE: Phrase = ("",)  # stands where a wording has a place for what is not said


@dataclass(frozen=True)
class Sentence:
    """One sentence of the language."""

    glosses: Glosses
    """Signs in the order in which they are made."""
    text: str
    usual: str
    """The most frequent wording of these signs: what an ideal translator would say."""


@dataclass(frozen=True)
class Noun:
    """A weather phenomenon with its German forms."""

    gloss: str
    word: str
    gender: str
    """m, f, or p for a plural."""
    qualities: tuple[tuple[str, str], ...]
    """Pairs of an intensity sign and a word; a trailing `-` takes the ending of case and gender."""
    vanish: tuple[str, str]
    """The two halves of the predicate for VERSCHWINDEN."""

    @property
    def article(self) -> str:
        return {"m": "der", "f": "die", "p": "die"}[self.gender]


_FADES = ("lässt", "nach")
_LIFTS = ("löst sich", "auf")
_LEAVE = ("ziehen", "ab")
NOUNS = (
    Noun("REGEN", "regen", "m", (("STARK", "kräftig-"), ("SCHWACH", "leicht-"), ("VIEL", "viel")), _FADES),
    Noun("SCHNEE", "schnee", "m", (("VIEL", "viel"), ("WENIG", "etwas"), ("STARK", "dicht-")), _FADES),
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
        (("VIEL", "zahlreich-"), ("WENIG", "einzeln-"), ("STARK", "kräftig-"), ("SCHWACH", "leicht-")),
        _LEAVE,
    ),
    Noun("NEBEL", "nebel", "m", (("VIEL", "viel"), ("WENIG", "wenig"), ("STARK", "dicht-")), _LIFTS),
    Noun("WIND", "wind", "m", (("STARK", "stark-"), ("SCHWACH", "schwach-"), ("WENIG", "wenig")), _FADES),
    Noun("STURM", "sturm", "m", (("STARK", "schwer-"), ("SCHWACH", "leicht-")), _FADES),
    Noun("SONNE", "sonne", "f", (("VIEL", "viel"), ("WENIG", "wenig")), ("geht", "unter")),
    Noun(
        "WOLKE",
        "wolken",
        "p",
        (("VIEL", "viel-"), ("WENIG", "ein paar"), ("STARK", "dicht-"), ("SCHWACH", "locker-")),
        ("lösen sich", "auf"),
    ),
    Noun("FROST", "frost", "m", (("STARK", "streng-"), ("SCHWACH", "leicht-")), _FADES),
)
_ENDINGS = {
    "nom": {"m": "er", "f": "e", "p": "e"},
    "acc": {"m": "en", "f": "e", "p": "e"},
}
DATIVE_PLURAL = {"gewitter": "gewittern", "schauer": "schauern", "wolken": "wolken"}

DAYS = tuple(
    (f"{day.upper()}", f"am {day}")
    for day in ("montag", "dienstag", "mittwoch", "donnerstag", "freitag", "samstag", "sonntag")
)
PARTS: tuple[tuple[str, Phrase], ...] = (
    ("NACHT", ("in der nacht",)),
    ("FRUEH", ("in der früh", "am frühen morgen")),
    ("MITTAG", ("am mittag", "mittags")),
    ("ABEND", ("am abend", "abends")),
)
NEAR = (("HEUTE", "heute"), ("MORGEN", "morgen"))
NEAR_PARTS = {"NACHT": "nacht", "FRUEH": "früh", "MITTAG": "mittag", "ABEND": "abend"}

CARDINALS = (("NORD", "nord"), ("SUED", "süd"), ("WEST", "west"), ("OST", "ost"))
PLACES: tuple[tuple[str, Phrase], ...] = (
    ("MITTE", ("in der mitte",)),
    ("KUESTE", ("an der küste", "an den küsten")),
    ("ALPEN", ("an den alpen", "am alpenrand")),
    ("BERG", ("in den bergen", "im bergland")),
    ("RHEIN", ("am rhein",)),
)
STATES = (
    ("KLAR", "klar", "klarer"),
    ("WARM", "warm", "wärmer"),
    ("KALT", "kalt", "kälter"),
    ("KUEHL", "kühl", "kühler"),
    ("HEISS", "heiß", "heißer"),
    ("TROCKEN", "trocken", "trockener"),
    ("FREUNDLICH", "freundlich", "freundlicher"),
)
NUMBERS = (
    ("FUENF", "fünf"),
    ("ACHT", "acht"),
    ("ZEHN", "zehn"),
    ("FUENFZEHN", "fünfzehn"),
    ("ZWANZIG", "zwanzig"),
    ("DREISSIG", "dreißig"),
)


class Draw:
    """Random choices of meaning; every method returns signs and their phrase."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def index(self, num: int) -> int:
        return int(self.rng.integers(num))

    def time(self) -> tuple[Glosses, Phrase]:
        """When: a day, a part of the day, or `heute abend`."""
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
        """Where: a direction, a half of the country, or a landscape."""
        kind = self.rng.random()
        gloss, word = CARDINALS[self.index(4)]
        if kind < 0.30:
            return (gloss,), (f"im {word}en",)
        if kind < 0.42:
            return (gloss, "HAELFTE"), (f"in der {word}hälfte",)
        if kind < 0.54:
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
        """When and where; most often only one of the two, and the other is empty."""
        time, place = self.time(), self.place()
        kind = self.rng.random()
        nothing: tuple[Glosses, Phrase] = ((), NO_PHRASE)
        return (time if kind < 0.55 else nothing), (place if kind >= 0.45 else nothing)

    def cardinal(self) -> tuple[str, str]:
        return CARDINALS[self.index(4)]

    def noun(self, but: str = "", quality: float = 0.5, case: str = "nom") -> tuple[Glosses, Phrase, Noun]:
        """A phenomenon other than `but`, with a quality in that share of cases."""
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
        return states[self.index(len(states))]

    def number(self) -> tuple[Glosses, str]:
        """A temperature in degrees; one in six lies below zero."""
        if self.chance(1 / 6):
            gloss, word = NUMBERS[self.index(4)]
            return ("MINUS", gloss), f"minus {word}"
        gloss, word = NUMBERS[self.index(len(NUMBERS))]
        return (gloss,), word

    def two_numbers(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Two temperatures, the lower first."""
        low, high = sorted(self.rng.choice(len(NUMBERS), 2, replace=False).tolist())
        return NUMBERS[low], NUMBERS[high]


Plan = Callable[[Draw], tuple[Glosses, list[Wording]]]


def _fixed(text: str) -> Phrase:
    return (text,)


_THERE_IS = _fixed("gibt es")  # takes the accusative


def outlook(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Time, place, phenomenon, state."""
    (time, when), (place, where) = draw.setting()
    noun, what, _ = draw.noun(quality=0.6, case="acc")
    state = draw.state()
    glosses = time + noun + place + (state[0],)
    then = _fixed(f"und es ist {state[1]}")
    return glosses, [[when, _THERE_IS, where, what, then], [where, _THERE_IS, when, what, then]]


def contrast(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Two places with different weather."""
    (place1, where1), (place2, where2) = draw.two_places()
    noun1, what1, first = draw.noun(quality=0.3)
    noun2, what2, _ = draw.noun(but=first.gloss, quality=0.4)
    but = ("aber", "dagegen", "hingegen")
    glosses = place1 + noun1 + place2 + noun2 + ("ABER",)
    return glosses, [[what1, where1, where2, but, what2], [where1, what1, where2, but, what2]]


def temperatures(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Two places with their temperatures."""
    (place1, where1), (place2, where2) = draw.two_places()
    number1, degrees1 = draw.number()
    number2, degrees2 = draw.number()
    glosses = place1 + number1 + place2 + number2 + ("GRAD",)
    return glosses, [
        [_fixed(f"{degrees1} grad"), where1, _fixed(f"und {degrees2}"), where2],
        [where1, _fixed(degrees1), where2, _fixed(f"{degrees2} grad")],
    ]


def span(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """A span of temperatures."""
    (time, when), (place, where) = draw.setting()
    (low, low_word), (high, high_word) = draw.two_numbers()
    glosses = time + place + (low, high, "BIS", "GRAD")
    verb, degrees = _fixed("liegen die werte"), _fixed(f"zwischen {low_word} und {high_word} grad")
    return glosses, [[when, verb, where, degrees], [where, verb, when, degrees]]


def trend(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Temperatures rise or sink to a value."""
    (time, when), (place, where) = draw.setting()
    number, degrees = draw.number()
    verb, word = (("STEIGEN", "steigt"), ("SINKEN", "sinkt"))[draw.index(2)]
    subject = ("die temperatur", "der wert")
    value = _fixed(f"auf {degrees} grad")
    glosses = time + place + ("GRAD",) + number + (verb,)
    return glosses, [[where, _fixed(word), subject, when, value], [when, _fixed(word), subject, where, value]]


def system(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """A high or a low comes and brings weather."""
    time, when = draw.time()
    kind, word = (("HOCH", "ein hoch"), ("TIEF", "ein tief"))[draw.index(2)]
    origin, direction = draw.cardinal()
    noun, what, _ = draw.noun(quality=0.5, case="acc")
    source = (f"aus {direction}en", f"von {direction}en her")
    glosses = (*time, kind, origin, *noun, "KOMMEN")
    return glosses, [
        [_fixed(word), source, _fixed("bringt"), when, what],
        [when, _fixed("bringt"), _fixed(word), source, what],
    ]


def vanishing(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Weather goes away."""
    (time, when), (place, where) = draw.setting()
    noun, _, entry = draw.noun(but="SONNE", quality=0)
    subject = _fixed(f"{entry.article} {entry.word}")
    finite, particle = (_fixed(half) for half in entry.vanish)
    glosses = noun + place + time + ("VERSCHWINDEN",)
    return glosses, [[when, finite, subject, where, particle], [where, finite, subject, when, particle]]


def changing(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Two kinds of weather in turn."""
    (time, when), (place, where) = draw.setting()
    noun1, what1, first = draw.noun(quality=0)
    noun2, what2, _ = draw.noun(but=first.gloss, quality=0)
    glosses = place + time + noun1 + noun2 + ("WECHSELN",)
    turns = _fixed(f"mal {what1[0]} und mal {what2[0]}")
    return glosses, [[when, _THERE_IS, where, turns], [where, _THERE_IS, when, turns]]


def staying(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """The weather stays as it is."""
    (time, when), (place, where) = draw.setting()
    state1 = draw.state()
    state2 = draw.state(but=state1[0])
    both = draw.chance(0.5)
    glosses = time + place + (state1[0],) + ((state2[0],) if both else ()) + ("BLEIBEN",)
    states = _fixed(f"{state1[1]} und {state2[1]}" if both else state1[1])
    return glosses, [[when, _fixed("bleibt es"), where, states], [where, _fixed("bleibt es"), when, states]]


def becoming(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """More of a state, with a phenomenon."""
    (time, when), (place, where) = draw.setting()
    state = draw.state()
    noun, what, _ = draw.noun(quality=0, case="dat")
    glosses = (*place, state[0], "MEHR", *noun, *time)
    change = _fixed(f"wird es {state[2]}")
    return glosses, [[where, change, when, _fixed("mit"), what], [when, change, where, _fixed("mit"), what]]


def possible(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Weather that may come."""
    (time, when), (place, where) = draw.setting()
    noun, what, entry = draw.noun(quality=0.6)
    finite = _fixed("sind" if entry.gender == "p" else "ist")
    glosses = noun + time + place + ("MOEGLICH",)
    maybe = ("möglich", "denkbar")
    return glosses, [[where, finite, when, what, maybe], [when, finite, where, what, maybe]]


def sequence(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """First one kind of weather, then another."""
    (time, when), (place, where) = draw.setting()
    noun1, what1, first = draw.noun(quality=0.3, case="acc")
    noun2, what2, _ = draw.noun(but=first.gloss, quality=0.4, case="acc")
    glosses = (*noun1, "DANN", *noun2, *place, *time)
    begin, then = ("erst", "zunächst"), ("und dann", "und später")
    turns = [begin, what1, then, what2]
    return glosses, [[when, _THERE_IS, where, *turns], [where, _THERE_IS, when, *turns]]


def alike(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """The next day resembles the first."""
    time1, when1 = draw.time()
    time2, when2 = draw.time()
    while set(time1) & set(time2):
        time2, when2 = draw.time()
    noun, what, _ = draw.noun(quality=0.5)
    place, where = draw.place()
    like = ("ähnlich", "ähnliches wetter")
    glosses = time1 + noun + place + time2 + ("AEHNLICH",)
    return glosses, [[what, when1, where, like, when2], [when1, where, what, when2, like]]


def blowing(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Wind with its origin and force."""
    (time, when), (place, where) = draw.setting()
    origin, direction = draw.cardinal()
    force, word = (("STARK", "stark"), ("SCHWACH", "schwach"))[draw.index(2)]
    source = _fixed(f"aus {direction}en")
    glosses = time + place + ("WIND", force, "KOMMEN", origin)
    verb = ("weht der wind", "kommt der wind")
    return glosses, [[where, verb, when, _fixed(word), source], [when, verb, where, _fixed(word), source]]


def headline(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """A phenomenon, where and when: the shortest full report."""
    time, when = draw.time()
    place, where = draw.place()
    noun, what, _ = draw.noun(quality=0.25, case="acc")
    return noun + place + time, [[when, _THERE_IS, where, what], [where, _THERE_IS, when, what]]


def brief(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """A phenomenon with its force, and either where or when."""
    about, about_words = draw.time() if draw.chance(0.5) else draw.place()
    noun, what, entry = draw.noun(quality=0.5)
    comes = _fixed("kommen" if entry.gender == "p" else "kommt")
    return noun + about, [[about_words, comes, what], [what, comes, about_words]]


def mood(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """How it is, and either where or when."""
    about, about_words = draw.time() if draw.chance(0.5) else draw.place()
    state = draw.state()
    return (state[0], *about), [
        [about_words, _fixed(f"ist das wetter {state[1]}")],
        [_fixed("das wetter ist"), about_words, _fixed(state[1])],
    ]


def reading(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """One temperature, and either where or when."""
    about, about_words = draw.time() if draw.chance(0.5) else draw.place()
    number, degrees = draw.number()
    value = _fixed(f"bei {degrees} grad")
    return ("GRAD", *number, *about), [
        [about_words, _fixed("liegen die werte"), value],
        [_fixed("die werte liegen"), about_words, value],
    ]


# plan -> share of sentences. Most are short: with two or three signs a clip, a small corpus shows sooner
# which word goes with which sign.
PLANS: tuple[tuple[Plan, float], ...] = (
    (headline, 0.07),
    (brief, 0.19),
    (mood, 0.13),
    (reading, 0.16),
    (outlook, 0.03),
    (contrast, 0.035),
    (temperatures, 0.015),
    (span, 0.03),
    (trend, 0.045),
    (system, 0.05),
    (vanishing, 0.045),
    (changing, 0.025),
    (staying, 0.03),
    (becoming, 0.03),
    (possible, 0.035),
    (sequence, 0.035),
    (alike, 0.03),
    (blowing, 0.015),
)
_SHARES = np.cumsum([share for _, share in PLANS])
assert abs(_SHARES[-1] - 1) < 1e-9, "the plans' shares must add up to 1"


def draw_any(rng: np.random.Generator) -> Sentence:
    """A sentence of any split."""
    plan = PLANS[min(int(np.searchsorted(_SHARES, rng.random(), side="right")), len(PLANS) - 1)][0]
    glosses, wordings = plan(Draw(rng))
    wordings = [w for w in wordings if w[0] != NO_PHRASE]  # the verb keeps its second place
    free_order = len(wordings) > 1 and rng.random() < FREE_ORDER
    wording = wordings[1 + int(rng.integers(len(wordings) - 1))] if free_order else wordings[0]
    words = []
    for phrase in wording:
        free = len(phrase) > 1 and rng.random() < FREE_PHRASE
        words.append(phrase[1 + int(rng.integers(len(phrase) - 1))] if free else phrase[0])
    return Sentence(glosses, _joined(words), _joined(phrase[0] for phrase in wordings[0]))


def _joined(words: Iterable[str]) -> str:
    return " ".join(word for word in words if word)


def _split_of(key: str) -> str:
    """Split that owns a sentence or a sign sequence: 60 % train, 20 % dev, 20 % test, by hash."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    return "train" if bucket < 6 else "dev" if bucket < 8 else "test"


def draw_sentence(rng: np.random.Generator, split: str) -> Sentence:
    """A sentence that only `split` may hold.

    Sentences and sign sequences belong to splits by their hash, so neither is shared between splits, in no
    corpus of any size or seed.
    """
    assert split in SPLITS, split
    while True:
        sentence = draw_any(rng)
        if _split_of(sentence.text) == split and _split_of(" ".join(sentence.glosses)) == split:
            return sentence
