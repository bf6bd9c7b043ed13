"""Beam search on two ranks under ZeRO-3, with unequal work, says what a single process says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flallm_ds import export
from flallm_ds.data.index import load_index
from flallm_ds.data.loader import Loader
from flallm_ds.data.plan import Plan
from flallm_ds.data.readers import VideoReader
from flallm_ds.data.text.prompt import DECODER_ONLY_PROMPT
from flallm_ds.dist import World
from flallm_ds.inference.translator import Translator
from flallm_ds.models.sign_translator import Beam
from flallm_ds.training.hypotheses import Evaluation
from tests.helpers.bars import WORDS, write_phoenix
from tests.helpers.launching import launch, tiny_options
from tests.helpers.llms import make_llm_with_own_code, make_tiny_llm
from tests.helpers.paths import RANKS

RUNS = ["encoder_decoder", "decoder_only_lora", "frozen"]
REFUSES_EMBEDDINGS = """
    def prepare_inputs_for_generation(self, ids, inputs_embeds=None, attention_mask=None, **more):
        if inputs_embeds is not None:
            raise ValueError("You passed `inputs_embeds` to `.generate()`.\\nSee the docs.")
        return super().prepare_inputs_for_generation(ids, attention_mask=attention_mask, **more)
"""
NUM_FRAMES = [2, 3, 5, 9, 20, 60, 110]  # of the dev clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """shards/ with 7 dev clips of very different length; run folders, trained on two ranks."""
    from flallm_ds.sharding.build import Options, build

    folder = tmp_path_factory.mktemp("generation")
    write_phoenix(folder / "phoenix", {"train": 12, "dev": 7, "test": 2}, seed=3)
    features = (
        folder / "phoenix" / "PHOENIX-2014-T" / "features" / "fullFrame-210x260px" / "dev"
    )
    for clip, count in zip(sorted(features.iterdir()), NUM_FRAMES, strict=True):
        frames = sorted(clip.iterdir())
        for extra in range(len(frames), count):
            shutil.copy(frames[extra % len(frames)], clip / f"images{extra + 1:04d}.png")
        for surplus in frames[count:]:
            surplus.unlink()
    build(
        "phoenix14t",
        folder / "phoenix",
        folder / "shards",
        Options(short_side=64, clips_per_shard=8),
    )
    texts = [f"{a} {b} {c} morgen" for a in WORDS for b in WORDS for c in WORDS]
    texts.append(
        DECODER_ONLY_PROMPT.format(
            sign_language="German Sign Language", language="German", video=""
        )
    )
    # Not the stand-in LLM, which hardly attends to the video before it was trained for
    # long.
    own = make_llm_with_own_code(folder / "own", texts, REFUSES_EMBEDDINGS)
    t5, qwen = (
        make_tiny_llm(family, folder / family, texts) for family in ("flan_t5", "qwen3")
    )
    common = {
        "data.shards": folder / "shards", "data.batch_clips": 2, "data.micro_batches": 2, "train.epochs": 1,
        "eval.every_epochs": 1, "optim.lr": 5e-2, "optim.llm_lr": 5e-3,
    }  # fmt: skip
    more: dict[str, dict[str, object]] = {
        "visual": {"optim.lr": 1e-3},
        "encoder_decoder": {"llm.name": t5},
        "decoder_only_lora": {"llm.name": qwen, "llm.tune": "lora", "llm.lora_rank": 4},
        "refused": {"llm.name": own, "llm.hub_code": True},
        "frozen": {"llm.name": qwen, "llm.tune": "frozen", "llm.trim_vocabulary": False},
    }
    scenarios = []
    for name, changed in more.items():
        stage = "visual" if name == "visual" else "llm"
        options = tiny_options(tiny_corpus, stage, folder / name, **{**common, **changed})
        scenarios.append({"stage": stage, "options": options})
    file = folder / "scenarios.json"
    file.write_text(json.dumps(scenarios), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        # where code of the hub is copied to
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        done = launch(RANKS / "generation.py", f"--scenarios={file}")
    assert done.returncode == 0, done.stdout[-8000:]
    return folder


def said_by(
    model: Path, shards: Path, clips_a_batch: int
) -> dict[str, list[tuple[str, float]]]:
    """Three hypotheses of each dev clip by an export in this process."""
    translator = Translator.from_pretrained(model, "cpu")
    translator = replace(
        translator, beam=Beam(num_beams=5, max_new_tokens=12, num_return=3)
    )
    index = load_index(shards, "dev")
    sampling = export.frame_sampling(translator.export.settings)
    kept = sampling.num_kept(index.num_frames, index.arrays["fps"])
    order = Plan(
        index.fingerprint, kept, index.arrays["shard"], 0, clips_a_batch, 1
    ).in_length_order()
    loader = Loader(
        VideoReader(index, sampling, seed=0, train=False), order, translator.export.codec
    )
    world = World(0, 1, 0, 1)
    evaluation = Evaluation(loader, translator.generate, translator.export.codec, world)
    return {h.key: list(h.nbest) for h in evaluation.hypotheses()}


def assert_same(found: dict[str, list], expected: dict[str, list]) -> None:
    assert found.keys() == expected.keys() and len(found) == 7
    for key, pairs in expected.items():
        assert [s for s, _ in found[key]] == [s for s, _ in pairs], key
        np.testing.assert_allclose(
            [score for _, score in found[key]], [s for _, s in pairs], atol=1e-4
        )


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_say_what_one_process_says_whatever_is_gathered(
    folder: Path, run: str
) -> None:
    ranks = [
        json.loads((folder / run / f"found.{rank}.json").read_text()) for rank in (0, 1)
    ]
    assert ranks[0] == ranks[1]
    assert_same(ranks[0]["auto"], ranks[0]["never"])
    alone = said_by(folder / run, folder / "shards", clips_a_batch=1)
    assert_same(ranks[0]["never"], alone)
    assert len({pairs[0][0] for pairs in alone.values()}) > 1, (
        "all clips sound the same: too easy a test"
    )


@pytest.mark.parametrize("run", RUNS)
def test_scores_fall_and_do_not_depend_on_the_batch(folder: Path, run: str) -> None:
    alone = said_by(folder / run, folder / "shards", clips_a_batch=1)
    assert_same(said_by(folder / run, folder / "shards", clips_a_batch=4), alone)
    for pairs in alone.values():
        scores = [score for _, score in pairs]
        assert len(pairs) == 3 and scores == sorted(scores, reverse=True) and scores[0] < 0


def test_an_llm_that_cannot_generate_is_refused_before_the_first_step_on_all_ranks(
    folder: Path,
) -> None:
    """Then both ranks continue with the next run; nothing of this one is left."""
    for rank in (0, 1):
        sentence = (folder / f"refused.{rank}.txt").read_text(encoding="utf-8")
        assert sentence == (
            f"Cannot generate from embeddings with the LLM {folder / 'own'} (a "
            "OwnForCausalLM): ValueError: You passed `inputs_embeds` to `.generate()`. Use "
            "another --llm.name."
        )
    assert not (folder / "refused").exists()
