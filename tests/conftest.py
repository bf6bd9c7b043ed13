"""Fixtures that every room's tests share. All corpora are written by the real writers; all LLMs are tiny."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tests run beside other processes: spinning threads starve them

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

WORDS = {"regen": 0, "sonne": 1, "wind": 2, "schnee": 3, "nebel": 4, "wolken": 5}
COLOURS = np.array(
    [[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 0], [0, 200, 200], [255, 255, 255]], np.uint8
)
SHARED = Path(os.environ.get("FLALLM_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def write_phoenix(release: Path, clips: dict[str, int], seed: int = 0) -> None:
    """A tiny corpus in PHOENIX14T's layout: each word of a sentence is a bar of its own height and colour."""
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
            frames = [_bar(WORDS[word], rng) for word in words for _ in range(rng.integers(6, 12))]
            for position, frame in enumerate(frames, 1):
                cv2.imwrite(str(folder / f"images{position:04d}.png"), frame)
            text = " ".join(words) + " morgen"
            lines.append(f"{name}|{name}/1/*.png|-1|-1|Signer0{number % 3}|{' '.join(words).upper()}|{text}")
        table = root / "annotations" / "manual" / f"PHOENIX-2014-T.{split}.corpus.csv"
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _bar(word: int, rng: np.random.Generator) -> np.ndarray:
    """With a camera's noise: equal frames leave BatchNorm channels without variance, and chaos follows."""
    frame = np.full((26, 21, 3), 60, np.int64)
    frame[2 + 3 * word : 6 + 3 * word, 3:17] = COLOURS[word]
    noisy = (frame + rng.normal(0, 25, frame.shape)).clip(0, 255).astype(np.uint8)
    return np.asarray(cv2.resize(noisy, (210, 260), interpolation=cv2.INTER_CUBIC))


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards/ (40 train, 9 dev and 9 test clips of 18 to 33 frames, 64x79 px) and llm/."""
    from flallm_ds.standin_llm import standin_llm
    from shards.build import Options, build

    folder = tmp_path_factory.mktemp("tiny")
    write_phoenix(folder / "phoenix", {"train": 40, "dev": 9, "test": 9})
    build("phoenix14t", folder / "phoenix", folder / "shards", Options(short_side=64, clips_per_shard=8))
    shutil.rmtree(folder / "phoenix")
    sentences = [f"{a} {b} {c} morgen" for a in WORDS for b in WORDS for c in WORDS]
    (folder / "text.txt").write_text("\n".join(sentences), encoding="utf-8")
    standin_llm(str(folder / "text.txt"), folder / "llm", vocab_size=120, d_model=64, layers=1, steps=5)
    return folder


@pytest.fixture(scope="session")
def second_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of another corpus: 10 train, 3 dev and 2 test clips, 48x59 px."""
    from shards.build import Options, build

    folder = tmp_path_factory.mktemp("second")
    write_phoenix(folder / "phoenix", {"train": 10, "dev": 3, "test": 2}, seed=5)
    options = Options(short_side=48, clips_per_shard=4, workers=1)
    build("phoenix14t", folder / "phoenix", folder / "shards", options)
    return folder / "shards"


@pytest.fixture
def tiny_shards(tiny_corpus: Path, tmp_path: Path) -> Path:
    """A copy of the tiny shards that a test may damage."""
    return Path(shutil.copytree(tiny_corpus / "shards", tmp_path / "shards"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real samples beside the checkout; the test is skipped where they are absent."""
    data = SHARED / "data"
    if not data.is_dir():
        pytest.skip(f"real samples are not at {data} (set FLALLM_SHARED)")
    return data


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
