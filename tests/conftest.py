"""Fixtures that every room's tests share. All corpora are written by the real writers;
all LLMs are tiny."""

import os

from tests.helpers.paths import SHARED

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tests run next to other processes: spinning threads starve them

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.bars import WORDS, write_phoenix
from tests.helpers.browser import chromium


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards/ (40 train, 9 dev and 9 test clips of 18 to 33 frames, 64x79
    px) and llm/."""
    from flallm_ds.models.llm.standin import standin_llm
    from flallm_ds.sharding.build import Options, build

    folder = tmp_path_factory.mktemp("tiny")
    write_phoenix(folder / "phoenix", {"train": 40, "dev": 9, "test": 9})
    build(
        "phoenix14t",
        folder / "phoenix",
        folder / "shards",
        Options(short_side=64, clips_per_shard=8),
    )
    shutil.rmtree(folder / "phoenix")
    sentences = [f"{a} {b} {c} morgen" for a in WORDS for b in WORDS for c in WORDS]
    (folder / "text.txt").write_text("\n".join(sentences), encoding="utf-8")
    standin_llm(
        str(folder / "text.txt"),
        folder / "llm",
        vocab_size=120,
        d_model=64,
        layers=1,
        steps=5,
    )
    return folder


@pytest.fixture(scope="session")
def second_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of another corpus: 10 train, 3 dev and 2 test clips, 48x59 px."""
    from flallm_ds.sharding.build import Options, build

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
    """Real samples next to the checkout; the test is skipped where they are absent."""
    data = SHARED / "data"
    if not data.is_dir():
        pytest.skip(f"real samples are not at {data} (set FLALLM_SHARED)")
    return data


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where it is not installed."""
    with chromium() as driver:
        yield driver


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those of `-m gpu`: the others start several ranks,
    which NCCL refuses on one GPU, and compare with results of a CPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(
                    pytest.mark.skip(reason="no CUDA device, or not run with -m gpu")
                )
