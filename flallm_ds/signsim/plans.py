"""Define the kinds of sentences (plans): the order of signs, and the German wordings.

Texts follow PHOENIX14T: lower case, umlauts, no punctuation. In signing order, the time is
often first, a quality follows its noun, and the verb is last, so that signs and words
differ in their order. A plan returns (signs, two wordings with the usual one first).
"""

from __future__ import annotations

from collections.abc import Callable

from flallm_ds.signsim.words import Draw, Glosses, Phrase

Wording = list[Phrase]
Plan = Callable[[Draw], tuple[Glosses, list[Wording]]]


# A wording is a list of phrases. A phrase may have several forms: grammar.py draws one.
# _fixed makes a phrase with a single form.
def _fixed(text: str) -> Phrase:
    return (text,)


_THERE_IS = _fixed("gibt es")  # takes the accusative


def outlook(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about time, place, phenomenon and state."""
    (time, when), (place, where) = draw.setting()
    noun, what, _ = draw.noun(quality=0.6, case="acc")
    state = draw.state()
    glosses = time + noun + place + (state[0],)
    then = _fixed(f"und es ist {state[1]}")
    return glosses, [
        [when, _THERE_IS, where, what, then],
        [where, _THERE_IS, when, what, then],
    ]


def contrast(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about two places with different weather."""
    (place1, where1), (place2, where2) = draw.two_places()
    noun1, what1, first = draw.noun(quality=0.3)
    noun2, what2, _ = draw.noun(but=first.gloss, quality=0.4)
    but = ("aber", "dagegen", "hingegen")
    glosses = place1 + noun1 + place2 + noun2 + ("ABER",)
    return glosses, [
        [what1, where1, where2, but, what2],
        [where1, what1, where2, but, what2],
    ]


def temperatures(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about the temperatures of two places."""
    (place1, where1), (place2, where2) = draw.two_places()
    number1, degrees1 = draw.number()
    number2, degrees2 = draw.number()
    glosses = place1 + number1 + place2 + number2 + ("GRAD",)
    return glosses, [
        [_fixed(f"{degrees1} grad"), where1, _fixed(f"und {degrees2}"), where2],
        [where1, _fixed(degrees1), where2, _fixed(f"{degrees2} grad")],
    ]


def span(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about a range of temperatures."""
    (time, when), (place, where) = draw.setting()
    (low, low_word), (high, high_word) = draw.two_numbers()
    glosses = time + place + (low, high, "BIS", "GRAD")
    verb, degrees = (
        _fixed("liegen die werte"),
        _fixed(f"zwischen {low_word} und {high_word} grad"),
    )
    return glosses, [[when, verb, where, degrees], [where, verb, when, degrees]]


def trend(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about a temperature that rises or falls to a value."""
    (time, when), (place, where) = draw.setting()
    number, degrees = draw.number()
    verb, word = (("STEIGEN", "steigt"), ("SINKEN", "sinkt"))[draw.index(2)]
    subject = ("die temperatur", "der wert")
    value = _fixed(f"auf {degrees} grad")
    glosses = time + place + ("GRAD",) + number + (verb,)
    rises = _fixed(word)
    return glosses, [
        [where, rises, subject, when, value],
        [when, rises, subject, where, value],
    ]


def system(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about a high or a low that brings weather."""
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
    """Return a sentence about weather that ends."""
    (time, when), (place, where) = draw.setting()
    noun, _, entry = draw.noun(but="SONNE", quality=0)
    subject = _fixed(f"{entry.article} {entry.word}")
    # The verb is in second place, its particle at the end: "der regen lässt ... nach".
    finite, particle = _fixed(entry.vanish[0]), _fixed(entry.vanish[1])
    glosses = noun + place + time + ("VERSCHWINDEN",)
    return glosses, [
        [when, finite, subject, where, particle],
        [where, finite, subject, when, particle],
    ]


def changing(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about two kinds of weather in turn."""
    (time, when), (place, where) = draw.setting()
    noun1, what1, first = draw.noun(quality=0)
    noun2, what2, _ = draw.noun(but=first.gloss, quality=0)
    glosses = place + time + noun1 + noun2 + ("WECHSELN",)
    turns = _fixed(f"mal {what1[0]} und mal {what2[0]}")
    return glosses, [[when, _THERE_IS, where, turns], [where, _THERE_IS, when, turns]]


def staying(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about weather that does not change."""
    (time, when), (place, where) = draw.setting()
    # The second state is drawn even if it is not used: the number of draws is fixed.
    state1 = draw.state()
    state2 = draw.state(but=state1[0])
    both = draw.chance(0.5)
    glosses = time + place + (state1[0],) + ((state2[0],) if both else ()) + ("BLEIBEN",)
    states = _fixed(f"{state1[1]} und {state2[1]}" if both else state1[1])
    stays = _fixed("bleibt es")
    return glosses, [[when, stays, where, states], [where, stays, when, states]]


def becoming(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about a state that increases, with a phenomenon."""
    (time, when), (place, where) = draw.setting()
    state = draw.state()
    noun, what, _ = draw.noun(quality=0, case="dat")
    glosses = (*place, state[0], "MEHR", *noun, *time)
    change = _fixed(f"wird es {state[2]}")
    company = _fixed("mit")
    return glosses, [
        [where, change, when, company, what],
        [when, change, where, company, what],
    ]


def possible(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about weather that is possible."""
    (time, when), (place, where) = draw.setting()
    noun, what, entry = draw.noun(quality=0.6)
    finite = _fixed("sind" if entry.gender == "p" else "ist")
    glosses = noun + time + place + ("MOEGLICH",)
    maybe = ("möglich", "denkbar")
    return glosses, [[where, finite, when, what, maybe], [when, finite, where, what, maybe]]


def sequence(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about one kind of weather after another."""
    (time, when), (place, where) = draw.setting()
    noun1, what1, first = draw.noun(quality=0.3, case="acc")
    noun2, what2, _ = draw.noun(but=first.gloss, quality=0.4, case="acc")
    glosses = (*noun1, "DANN", *noun2, *place, *time)
    begin, then = ("erst", "zunächst"), ("und dann", "und später")
    turns = [begin, what1, then, what2]
    return glosses, [[when, _THERE_IS, where, *turns], [where, _THERE_IS, when, *turns]]


def alike(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about similar weather at two times."""
    time1, when1 = draw.time()
    time2, when2 = draw.time()
    # Two times that share a sign cannot be compared.
    while set(time1) & set(time2):
        time2, when2 = draw.time()
    noun, what, _ = draw.noun(quality=0.5)
    place, where = draw.place()
    like = ("ähnlich", "ähnliches wetter")
    glosses = time1 + noun + place + time2 + ("AEHNLICH",)
    return glosses, [[what, when1, where, like, when2], [when1, where, what, when2, like]]


def blowing(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about wind, its origin and its force."""
    (time, when), (place, where) = draw.setting()
    origin, direction = draw.cardinal()
    force, word = (("STARK", "stark"), ("SCHWACH", "schwach"))[draw.index(2)]
    source = _fixed(f"aus {direction}en")
    glosses = time + place + ("WIND", force, "KOMMEN", origin)
    verb = ("weht der wind", "kommt der wind")
    strength = _fixed(word)
    return glosses, [
        [where, verb, when, strength, source],
        [when, verb, where, strength, source],
    ]


def headline(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about a phenomenon, its place and its time."""
    time, when = draw.time()
    place, where = draw.place()
    noun, what, _ = draw.noun(quality=0.25, case="acc")
    return noun + place + time, [
        [when, _THERE_IS, where, what],
        [where, _THERE_IS, when, what],
    ]


def brief(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about a phenomenon and either its place or its time."""
    about, about_words = draw.time() if draw.chance(0.5) else draw.place()
    noun, what, entry = draw.noun(quality=0.5)
    comes = _fixed("kommen" if entry.gender == "p" else "kommt")
    return noun + about, [[about_words, comes, what], [what, comes, about_words]]


def mood(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about a state and either its place or its time."""
    about, about_words = draw.time() if draw.chance(0.5) else draw.place()
    state = draw.state()
    return (state[0], *about), [
        [about_words, _fixed(f"ist das wetter {state[1]}")],
        [_fixed("das wetter ist"), about_words, _fixed(state[1])],
    ]


def reading(draw: Draw) -> tuple[Glosses, list[Wording]]:
    """Return a sentence about a temperature and either its place or its time."""
    about, about_words = draw.time() if draw.chance(0.5) else draw.place()
    number, degrees = draw.number()
    value = _fixed(f"bei {degrees} grad")
    return ("GRAD", *number, *about), [
        [about_words, _fixed("liegen die werte"), value],
        [_fixed("die werte liegen"), about_words, value],
    ]


# Plans with their shares of all sentences. Most sentences are short: with two or three
# signs per clip, a model learns the meaning of each sign from a smaller corpus.
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
