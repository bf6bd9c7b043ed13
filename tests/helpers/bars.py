"""A tiny corpus in PHOENIX14T's layout, written on the spot: what the tests' clips show
and say."""

from pathlib import Path

import cv2
import numpy as np

WORDS = {"regen": 0, "sonne": 1, "wind": 2, "schnee": 3, "nebel": 4, "wolken": 5}
COLOURS = np.array(
    [[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 0], [0, 200, 200], [255, 255, 255]],
    np.uint8,
)


def write_phoenix(release: Path, clips: dict[str, int], seed: int = 0) -> None:
    """A tiny corpus in PHOENIX14T's layout: each word of a sentence is a bar of its own
    height and colour."""
    rng = np.random.default_rng(seed)
    root = release / "PHOENIX-2014-T"
    (root / "annotations" / "manual").mkdir(parents=True)
    for split, count in clips.items():
        lines = ["name|video|start|end|speaker|orth|translation"]
        for number in range(count):
            name = f"{split}_{number:04d}"
            folder = root / "features" / "fullFrame-210x260px" / split / name
            folder.mkdir(parents=True)
            words = rng.choice(list(WORDS), 3)
            frames = [
                _bar(WORDS[word], rng) for word in words for _ in range(rng.integers(6, 12))
            ]
            for position, frame in enumerate(frames, 1):
                cv2.imwrite(str(folder / f"images{position:04d}.png"), frame)
            text = " ".join(words) + " morgen"
            lines.append(
                f"{name}|{name}/1/*.png|-1|-1|Signer0{number % 3}|{' '.join(words).upper()}|{text}"
            )
        table = root / "annotations" / "manual" / f"PHOENIX-2014-T.{split}.corpus.csv"
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _bar(word: int, rng: np.random.Generator) -> np.ndarray:
    """With a camera's noise: equal frames leave BatchNorm channels without variance, and
    chaos follows."""
    frame = np.full((26, 21, 3), 60, np.int64)
    frame[2 + 3 * word : 6 + 3 * word, 3:17] = COLOURS[word]
    noisy = (frame + rng.normal(0, 25, frame.shape)).clip(0, 255).astype(np.uint8)
    return np.asarray(cv2.resize(noisy, (210, 260), interpolation=cv2.INTER_CUBIC))
