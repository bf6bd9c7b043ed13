"""Tests of the videos that controls see, and of a control that is left out."""

import json
from pathlib import Path

import pytest
import torch

from flallm_ds.batch import Batch, FeatureBatch, Hypothesis, VideoBatch
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Instruction
from flallm_ds.inference.analysis import Known
from flallm_ds.inference.controls import with_blank_frames, with_shuffled_frames
from flallm_ds.inference.results import Results
from tests.helpers.llms import make_tiny_llm

NUM_FRAMES = [30, 20]


def batch(kind: type[Batch], keys: tuple[str, str] = ("a", "b")) -> Batch:
    frames = torch.arange(sum(NUM_FRAMES))
    common = {
        "num_frames_B": torch.tensor(NUM_FRAMES), "draws_B9": torch.zeros(2, 9),
        "target_ids_BL": torch.zeros(2, 1, dtype=torch.int64), "keys": keys,
        "texts": ("", ""), "corpora": ("", ""), "languages": ("de", "de"), "real_B": (True, True),
    }  # fmt: skip
    if kind is FeatureBatch:
        return FeatureBatch(features_ND=frames[:, None].float().expand(-1, 3), **common)
    frames_NHWC = frames[:, None, None, None].expand(-1, 2, 2, 3).to(torch.uint8)
    return VideoBatch(frames_NHWC=frames_NHWC, size_B2=torch.full((2, 2), 2.0), **common)


@pytest.mark.parametrize("kind", [VideoBatch, FeatureBatch])
def test_frames_are_shuffled_within_their_clip(kind: type[Batch]) -> None:
    before = batch(kind)
    after = with_shuffled_frames(before)
    first, second = after.content.flatten(1)[:, 0].int().split(NUM_FRAMES)
    assert sorted(first.tolist()) == list(range(30)) != first.tolist()
    assert sorted(second.tolist()) == list(range(30, 50)) != second.tolist()
    assert type(after) is kind and after.keys == before.keys


def test_the_order_depends_on_the_clip_alone() -> None:
    """So it is the same on any number of ranks."""
    one, other = batch(VideoBatch), batch(VideoBatch, keys=("c", "b"))
    ours, theirs = with_shuffled_frames(one).content, with_shuffled_frames(other).content
    assert torch.equal(ours[30:], theirs[30:]) and not torch.equal(ours[:30], theirs[:30])


@pytest.mark.parametrize(("kind", "value"), [(VideoBatch, 128), (FeatureBatch, 0)])
def test_blank_frames_are_all_equal(kind: type[Batch], value: int) -> None:
    before = batch(kind)
    after = with_blank_frames(before).content
    assert after.shape == before.content.shape and after.dtype == before.content.dtype
    assert torch.all(after == value)


def test_an_evaluation_says_why_it_has_no_control_with_another_signer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["im norden regen am abend", "im süden sonne am abend"]
    llm = make_tiny_llm("qwen3", tmp_path / "llm", texts)
    codec = TextCodec.for_training_text(str(llm), Instruction(), texts, trim=False)
    clips = [Hypothesis(text, text, text, "c", "de") for text in texts]
    known = Known(dict.fromkeys(texts, "A"))
    Results(clips, codec, {}, {"split": "test"}).write(tmp_path / "evaluation", known)

    stored = json.loads((tmp_path / "evaluation/test.json").read_text(encoding="utf-8"))
    why = "There is no control with another signer: all clips are by the signer A."
    assert stored["controls"] == {} and stored["meanings"][1] == why
    printed = capsys.readouterr().out
    assert why in printed.splitlines() and "| another signer" not in printed
