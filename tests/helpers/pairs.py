"""Made-up pairs of hypotheses and references in four languages, the same on every machine.

They hold what real files hold and scripts treat differently: full-width punctuation, empty
lines, doubled spaces, repeated words, final periods, capitals, numbers, umlauts.
"""

import random

WORDS = {
    "de": "der Regen zieht am Abend von Westen nach Osten über das Land mäßig 12 Grad, örtlich "
    "Schnee und Frost - im Süden bleibt's schön .",
    "en": "the rain moves in from west to east, and it's 12.5 degrees; snow (light) falls on "
    "hills today's forecast isn't \"good\" running runs",
}
CHARACTERS = {
    "zh": "今天北部有大雨明天晴你好吗我们去学校他喜欢看书12",
    "ja": "今日は北部で大雨が降りますあした晴れアイスを食べる",
}
MARKS = {"zh": ["，", "。", "？", "！", "、"], "ja": ["、", "。", "！"]}


def pairs(language: str, count: int = 100, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return hypotheses and references. language: de, en, zh or ja."""
    draw = random.Random(f"{language} {seed}")
    hypotheses, references = [], []
    for number in range(count):
        reference = _sentence(language, draw)
        hypothesis = _changed(reference, language, draw)
        if number % 17 == 3:
            hypothesis = ""
        elif number % 17 == 5:
            hypothesis = hypothesis.replace(" ", "  ", 2)
        elif number % 17 == 7:
            reference = reference.replace(" ", "  ", 1)
        hypotheses.append(hypothesis)
        references.append(reference)
    return hypotheses, references


def _sentence(language: str, draw: random.Random) -> str:
    if language in WORDS:
        words = draw.choices(WORDS[language].split(), k=draw.randint(2, 18))
        return " ".join(words) + draw.choice(["", "", ".", " .", "?"])
    parts = []
    for _ in range(draw.randint(1, 4)):
        text = draw.choices(CHARACTERS[language], k=draw.randint(2, 9))
        parts.append("".join(text) + draw.choice(MARKS[language]))
    return "".join(parts)


def _changed(reference: str, language: str, draw: random.Random) -> str:
    """Replace, drop and repeat some words or characters."""
    spaced = language in WORDS
    tokens = reference.split() if spaced else list(reference)
    source = WORDS[language].split() if spaced else CHARACTERS[language]
    found = []
    for token in tokens:
        chance = draw.random()
        if chance < 0.15:
            found.append(draw.choice(source))
        elif chance < 0.3:
            continue
        elif chance < 0.36:
            found += [token, token]
        else:
            found.append(token)
    return (" " if spaced else "").join(found)
