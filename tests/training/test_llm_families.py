"""Each family of LLMs on two ranks under ZeRO-3 with offload: trains, generates, exports,
loads again.

The LLMs are tiny and random; the way to them is a user's: `--llm.name=FOLDER`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flallm_ds.data.text.prompt import DECODER_ONLY_PROMPT
from tests.helpers.bars import WORDS
from tests.helpers.launching import environment, launch, losses, tiny_options
from tests.helpers.llms import FAMILIES, make_tiny_llm
from tests.helpers.paths import RANKS, ROOT

pytestmark = pytest.mark.timeout(2000)  # the fixture trains them all
SCRIPT = RANKS / "families.py"
# With all tokens of their tokenizers: a head of its own, rows to spare, a row too few.
WHOLE = ("flan_t5", "qwen3", "gemma3")
EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "word_embeddings.weight")
RUNS = [*FAMILIES, *(f"{family}_whole" for family in WHOLE)]


@pytest.fixture(scope="module")
def runs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of each family, trained on two ranks; its export loaded again by one
    plain process."""
    folder = tmp_path_factory.mktemp("families")
    texts = [f"{a} {b} {c} morgen" for a in WORDS for b in WORDS for c in WORDS]
    texts.append(
        DECODER_ONLY_PROMPT.format(
            sign_language="German Sign Language", language="German", video=""
        )
    )
    visual = tiny_options(
        tiny_corpus,
        "visual",
        folder / "visual",
        **{"train.epochs": 1, "eval.every_epochs": 1},
    )
    scenarios: list[dict[str, object]] = [{"stage": "visual", "options": visual}]
    for family in FAMILIES:
        make_tiny_llm(family, folder / "llms" / family, texts)
    for run in RUNS:
        more = {
            "llm.name": folder / "llms" / run.removesuffix("_whole"),
            "llm.trim_vocabulary": not run.endswith("_whole"),
            "llm.dropout": 0.1, "train.label_smoothing": 0.0, "optim.lr": 5e-3, "optim.llm_lr": 5e-3,
            "data.batch_clips": 4, "data.micro_batches": 2, "train.epochs": 3, "eval.every_epochs": 3,
            "eval.num_beams": 5, "eval.max_new_tokens": 12,
        }  # fmt: skip
        scenarios.append(
            {
                "stage": "llm",
                "options": tiny_options(tiny_corpus, "llm", folder / run, **more),
            }
        )
    file = folder / "scenarios.json"
    file.write_text(json.dumps(scenarios), encoding="utf-8")
    done = launch(SCRIPT, f"--scenarios={file}", timeout_s=1500)
    assert done.returncode == 0, done.stdout[-8000:]
    file.write_text(json.dumps([str(folder / run) for run in RUNS]), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), f"--exports={file}"]
    loaded = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert loaded.returncode == 0, (loaded.stdout + loaded.stderr)[-8000:]
    return folder


def read(path: Path) -> dict[str, list[int]]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", RUNS)
def test_family(runs: Path, family: str) -> None:
    """The loss falls; both ranks generate; a fresh process gives the same hypotheses from
    the export."""
    found = losses(runs / family)
    assert len(found) == 30
    assert sum(found[-5:]) < 0.75 * sum(found[:5]), found
    ranks = [read(runs / family / f"trained.{rank}.json") for rank in (0, 1)]
    assert all(ranks) and len(ranks[0].keys() | ranks[1].keys()) == 9
    assert any(ids for rank in ranks for ids in rank.values())
    loaded = read(runs / family / "loaded.json")
    assert {**ranks[0], **ranks[1]} == loaded


@pytest.mark.parametrize("family", RUNS)
def test_training_began_with_the_weights_of_the_folder(runs: Path, family: str) -> None:
    """Embedding and, where it is another, head: the rows of the kept tokens, not far from
    where they were."""
    before = weights(runs / "llms" / family.removesuffix("_whole"))
    exported = runs / family / "best" / "language_model"
    kept = json.loads((exported / "vocabulary.json").read_text(encoding="utf-8"))[
        "kept_ids"
    ]
    after = weights(exported)
    tables = [name for name in before if name.endswith(("lm_head.weight", *EMBEDDINGS))]
    assert tables
    for name in tables:
        pair = torch.stack(
            [before[name][kept].flatten(), after[name][: len(kept)].flatten()]
        )
        assert torch.corrcoef(pair)[0, 1] > 0.6, name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: t
        for file in folder.glob("*.safetensors")
        for name, t in load_file(file).items()
    }


def test_the_documentation_has_a_row_for_each_family_and_no_other() -> None:
    page = (ROOT / "docs" / "llms.md").read_text(encoding="utf-8")
    rows = {}
    for line in page.splitlines():
        if "`test_family[" in line:
            rows[line.split("`")[-2]] = line
    assert rows.keys() == {f"test_family[{family}]" for family in FAMILIES}
    for family, entry in FAMILIES.items():
        row = rows[f"test_family[{family}]"]
        assert f"`{entry.example}`" in row and ("decoder-only" in row) == entry.decoder_only
