"""Tests that `flallm export` keeps the outputs of the model, and of the model card."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flallm_ds import export
from flallm_ds.cli import models
from flallm_ds.config import FREE_TO_CHANGE, RunConfig
from flallm_ds.errors import UserError
from flallm_ds.export.model_card import command, model_card
from flallm_ds.export.publish import publish
from flallm_ds.inference.translator import Translator
from flallm_ds.models.sign_translator import Beam, Candidate
from flallm_ds.recipes import RECIPES, config_of
from tests.helpers.exports import DECODER_ONLY, ENCODER_DECODER, write_export

BEAM = Beam(num_beams=3, max_new_tokens=8, num_return=2)


@pytest.fixture(scope="module")
def runs(
    tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Return a function of the kind of LLM and the tuning that returns a run folder."""
    folder = tmp_path_factory.mktemp("runs")

    def run(kind: str, tuning: str) -> Path:
        path = folder / kind / tuning
        if not path.exists():
            write_export(kind, tiny_corpus, path, tuning)
        return path

    return run


def said(folder: Path) -> list[Candidate]:
    """Return the hypotheses of an export for random features."""
    loaded = export.read(export.find(folder))
    torch.manual_seed(5)
    features_ND, num_frames_B = torch.randn(9, 32), torch.tensor([4, 5])
    wordings = [loaded.codec.wording("de", "toy")] * 2
    candidates = loaded.translator.generate(features_ND, num_frames_B, wordings, BEAM)
    return [candidate for clip in candidates for candidate in clip]


def assert_same(folder: Path, run: Path) -> None:
    """Assert that both exports generate the same tokens with the same scores."""
    for one, other in zip(said(run), said(folder), strict=True):
        assert other.ids == one.ids
        assert other.score == pytest.approx(one.score, rel=1e-4)


@pytest.mark.parametrize("kind", [ENCODER_DECODER, DECODER_ONLY])
def test_an_export_of_full_tuning_is_unchanged(
    runs: Callable[[str, str], Path], tmp_path: Path, kind: str
) -> None:
    run = runs(kind, "full")
    assert publish(run, tmp_path / "out") == tmp_path / "out"
    assert_same(tmp_path / "out", run)
    assert export.read_settings(tmp_path / "out")["base"] is None


@pytest.mark.parametrize("tuning", ["lora", "dora"])
@pytest.mark.parametrize("kind", [ENCODER_DECODER, DECODER_ONLY])
def test_lora_adapters_can_be_merged_or_stored_apart(
    runs: Callable[[str, str], Path], tmp_path: Path, kind: str, tuning: str
) -> None:
    run = runs(kind, tuning)
    lm = run / "best" / "language_model"
    assert (
        not (lm / "model.safetensors").exists()
        and (lm / "adapter_model.safetensors").exists()
    )
    publish(run, tmp_path / "merged")
    publish(run, tmp_path / "apart", lora="apart")
    moved = shutil.move(tmp_path / "apart", tmp_path / "elsewhere")
    assert_same(tmp_path / "merged", run)
    assert_same(Path(moved), run)
    assert not list((tmp_path / "merged").glob("**/adapter_*"))


def test_peft_loads_adapters_that_are_stored_apart(
    runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    run = runs(DECODER_ONLY, "lora")
    folder = publish(run, tmp_path / "apart", lora="apart")
    base = AutoModelForCausalLM.from_pretrained(folder / "base_model")
    theirs = PeftModel.from_pretrained(base, folder / "language_model").eval()
    ours = export.read(folder).translator.language_model
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder / "base_model")(ids).logits
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)
        assert not torch.allclose(plain, ours(ids).logits, atol=1e-3)


@pytest.mark.parametrize("lora", ["merged", "apart"])
def test_no_export_contains_search_settings_of_a_base_model(
    runs: Callable[[str, str], Path], tmp_path: Path, lora: Literal["merged", "apart"]
) -> None:
    """Older exports and base models contain them, and they would change the search."""
    run = Path(shutil.copytree(runs(DECODER_ONLY, "lora"), tmp_path / "run"))
    for folder in (run / "best" / "language_model", run / "llm_trimmed"):
        path = folder / "generation_config.json"
        stored = json.loads(path.read_text()) | {
            "no_repeat_ngram_size": 1,
            "repetition_penalty": 9.0,
        }
        path.write_text(
            json.dumps(stored | {"suppress_tokens": [3, 4, 5], "temperature": 0.6})
        )
    out = publish(run, tmp_path / "out", lora=lora)
    for path in out.glob("**/generation_config.json"):
        kept = json.loads(path.read_text())
        assert {name for name in kept if not name.endswith("_token_id")} <= {
            "transformers_version"
        }
    assert_same(out, runs(DECODER_ONLY, "lora"))


def test_a_frozen_llm_is_copied_from_its_base_model(
    runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    run = runs(DECODER_ONLY, "frozen")
    assert not list((run / "best" / "language_model").glob("*.safetensors"))
    assert_same(publish(run, tmp_path / "out"), run)


def names_of(kind: str) -> list[str]:
    return ["input_ids", "decoder_input_ids"] if kind == ENCODER_DECODER else ["input_ids"]


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", [ENCODER_DECODER, DECODER_ONLY])
def test_an_untrimmed_export_keeps_the_logits_of_kept_tokens(
    runs: Callable[[str, str], Path], tmp_path: Path, kind: str, tuning: str
) -> None:
    """The logits of the other tokens do not matter here."""
    run = runs(kind, tuning)
    folder = publish(run, tmp_path / "out", untrimmed=True)
    loaded = export.read(folder)
    trimmed = export.read(run / "best")
    kept = torch.from_numpy(trimmed.codec.kept_ids)
    assert loaded.codec.vocab_size > trimmed.codec.vocab_size == len(kept)
    assert "is trimmed" not in (folder / "README.md").read_text(encoding="utf-8")
    ids = torch.arange(3, 12)[None]
    before, after = (
        model.translator.language_model(**dict.fromkeys(names_of(kind), known)).logits
        for model, known in ((trimmed, ids), (loaded, kept[ids]))
    )
    torch.testing.assert_close(after[..., kept], before)
    assert said(folder)


# --- the card


def test_the_card_contains_the_recorded_facts(
    runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    run = runs(ENCODER_DECODER, "full")
    evaluation = run / "evaluation"
    evaluation.mkdir(exist_ok=True)
    scores = {
        "bleu1": 40.0,
        "bleu2": 30.0,
        "bleu3": 25.0,
        "bleu4": 21.25,
        "rouge_l": 44.0,
        "chrf": 50.0,
    }
    scores |= {"bleu_signature": "nrefs:1|case:mixed"}
    own = list(RunConfig.load(run / "config.json").data.shards)
    for split, shards in (("test", own), ("elsewhere", ["another corpus"])):
        of_export = export.digest(run / "best")
        content = {"split": split, "export": of_export, "shards": shards, "scores": scores}
        (evaluation / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    # An evaluation of the export folder itself writes to this folder.
    shutil.copytree(evaluation, run / "best" / "evaluation")
    out = publish(run, tmp_path / "out")
    assert not (out / "evaluation").exists(), "it contains texts of the corpus"
    card = (out / "README.md").read_text(encoding="utf-8")
    shutil.rmtree(evaluation)
    shutil.rmtree(run / "best" / "evaluation")
    front = card.split("---")[1]
    assert (
        'language: ["de"]' in front
        and 'datasets: ["toy"]' in front
        and "# license: add yours" in front
    )
    assert "base_model" not in front, "a folder is not a model of the hub"
    assert (
        "| test | 40.00 | 30.00 | 25.00 | 21.25 | 44.00 | 50.00 |" in card
        and "| dev |" in card
    )
    assert "test, BLEU: `nrefs:1|case:mixed`" in card and "elsewhere" not in card
    assert "1 clips of toy" in card and "--recipe=" in card and "--visual.width=4" in card
    assert (
        "Translator.from_pretrained(" in card
        and str(tmp_path) not in card
        and str(run) not in card
    )
    assert "is trimmed to the" in card


def test_the_command_of_the_card_contains_the_shards() -> None:
    config = config_of("quickstart_llm")
    assert "data.shards" not in command(config), "the recipe contains them"
    mine = config.with_overrides(
        {"data.shards": "data/mine,/home/me/other", "data.weights": "1,2"}
    )
    assert "--data.shards=data/mine,/path/to/other --data.weights=1.0,2.0" in command(mine)


@pytest.mark.parametrize(
    "prompt", ["it's {video}", "two\nlines' \\n {video}", "\x1b[31m ü\u2028{video}"]
)
def test_bash_parses_the_command_of_the_card_correctly(prompt: str) -> None:
    line = command(config_of("quickstart_llm").with_overrides({"llm.prompt": prompt}))
    assert line.isprintable()
    said = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True
    ).stdout
    assert f"--llm.prompt={prompt}" in said.decode().split("\0")


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_of_the_card_repeats_the_run(name: str) -> None:
    words = command(config_of(name))
    recipe = next(
        w.removeprefix("--recipe=") for w in words.split() if w.startswith("--recipe=")
    )
    given = dict(
        w.removeprefix("--").split("=", 1) for w in words.split()[2:] if "recipe" not in w
    )
    mine, cards = (
        config_of(name).options(),
        config_of(recipe).with_overrides(given).options(),
    )
    assert {
        o: v for o, v in cards.items() if o not in FREE_TO_CHANGE or o == "visual_run"
    } == {o: v for o, v in mine.items() if o not in FREE_TO_CHANGE or o == "visual_run"}


def test_a_folder_that_cannot_be_written_is_refused(
    runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write to --out "):
        publish(runs(ENCODER_DECODER, "full"), tmp_path / "file" / "model")


def test_the_card_omits_scores_of_an_older_export(
    runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    run = runs(ENCODER_DECODER, "full")
    (run / "evaluation").mkdir(exist_ok=True)
    path = run / "evaluation" / "test.json"
    own = list(RunConfig.load(run / "config.json").data.shards)
    content = {
        "split": "test",
        "export": "of an older one",
        "shards": own,
        "scores": {"bleu4": 9.0},
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    card = (publish(run, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    shutil.rmtree(run / "evaluation")
    assert "| test |" not in card


def test_a_run_that_was_copied_without_timestamps_keeps_its_scores(
    runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs(ENCODER_DECODER, "full"), tmp_path / "run"))
    (run / "evaluation").mkdir()
    own = list(RunConfig.load(run / "config.json").data.shards)
    content = {
        "split": "test",
        "export": export.digest(run / "best"),
        "shards": own,
        "scores": {},
    }
    (run / "evaluation" / "test.json").write_text(json.dumps(content), encoding="utf-8")
    os.utime(run / "evaluation" / "test.json", (0, 0))
    copy = Path(shutil.copytree(run, tmp_path / "copy", copy_function=shutil.copyfile))
    assert (
        list(export.evaluated(run / "best"))
        == list(export.evaluated(copy / "best"))
        == ["test"]
    )
    state = load_file(copy / "best" / "adapter.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in state.items()},
        copy / "best" / "adapter.safetensors",
    )
    assert not export.evaluated(copy / "best"), "another export was scored"


def test_exported_files_are_readable_by_the_group(
    runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        folders = [
            publish(runs(ENCODER_DECODER, "full"), tmp_path / "whole", untrimmed=True),
            publish(runs(DECODER_ONLY, "lora"), tmp_path / "apart", lora="apart"),
        ]
    finally:
        os.umask(before)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_the_card_lists_pretrained_weights(
    runs: Callable[[str, str], Path],
) -> None:
    run = runs(ENCODER_DECODER, "full")
    settings, codec = export.read_settings(run / "best"), export.read(run / "best").codec
    assert "Pretrained weights" not in model_card(settings, codec), (
        "an older export has no record"
    )
    files = [
        {"file": name, "bytes": 9, "sha256": "ab" * 32}
        for name in ("config.json", "model.safetensors")
    ]
    weights = {
        "visual.weights": {
            "name": "microsoft/resnet-18",
            "revision": "0123abcd",
            "files": files,
        },
        "llm.name": {"name": "llm", "revision": None, "files": files[:1]},
    }
    card = model_card(settings | {"weights": weights}, codec)
    line = "- visual.weights: microsoft/resnet-18 at commit 0123abcd (`model.safetensors` sha256 "
    assert line + "ab" * 8 + ")\n" in card and "- llm.name: llm (no weights)\n" in card


HOSTILE = "x](http://a.b) <script>alert(1)</script> `c` | pipe\n# heading\x1b[31m"


def test_markup_in_names_is_escaped_in_the_card(runs: Callable[[str, str], Path]) -> None:
    run = runs(ENCODER_DECODER, "full")
    settings, codec = export.read_settings(run / "best"), export.read(run / "best").codec
    config = RunConfig.load(run / "config.json").with_overrides(
        {"llm.prompt": f"```\n{HOSTILE} {{video}}"}
    )
    training = settings["training"] | {
        "corpora": [HOSTILE],
        "llm": HOSTILE,
        "command": command(config),
    }
    # The name of a split comes from index.json, which anybody may have written.
    dev = next(iter(settings["scores"].values())) | {"ceiling_bleu4": 70.0}
    scores = settings["scores"] | {HOSTILE: dev}
    card = model_card(settings | {"training": training, "scores": scores}, codec)
    assert "A perfect model would score BLEU-4 70.0" in card
    # The text of the card without code blocks.
    outside = re.sub(r"(?ms)^(`{3,})\n.*?^\1$", "", card)
    text = outside.split("---", 2)[2]
    assert "\x1b" not in card
    unescaped = re.sub(r"\\.", "", text)
    for markup in ("](http", "<script", " `c`", "| pipe", "# heading"):
        assert markup in HOSTILE and markup not in unescaped
    assert json.dumps([HOSTILE], ensure_ascii=False) in card.split("---")[1]


# --- what is refused


@pytest.mark.parametrize(
    ("kind", "tuning", "arguments", "sentence"),
    [
        (
            ENCODER_DECODER,
            "full",
            {"lora": "apart"},
            "--lora must be merged if an export has no LoRA adapters",
        ),
        (
            DECODER_ONLY,
            "frozen",
            {"lora": "apart"},
            "--lora must be merged if an export has no LoRA adapters",
        ),
        (
            DECODER_ONLY,
            "lora",
            {"lora": "apart", "untrimmed": True},
            "--lora must be merged with --untrimmed, got apart",
        ),
    ],
)
def test_an_option_that_does_not_fit_the_run_is_refused(
    runs: Callable[[str, str], Path],
    tmp_path: Path,
    kind: str,
    tuning: str,
    arguments: dict[str, object],
    sentence: str,
) -> None:
    with pytest.raises(UserError, match=sentence):
        models.export(run=runs(kind, tuning), out=tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_untrimmed_export_cannot_be_untrimmed(
    runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    whole = publish(runs(ENCODER_DECODER, "full"), tmp_path / "whole", untrimmed=True)
    with pytest.raises(
        UserError, match=r"Cannot restore the vocabulary .*: it is not trimmed"
    ):
        publish(whole, tmp_path / "out", untrimmed=True)


def test_an_export_without_its_run_needs_the_name_of_the_llm(
    runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match="--llm_name must be the LLM that was trimmed, got none"
    ):
        publish(runs(ENCODER_DECODER, "full") / "best", tmp_path / "out", untrimmed=True)


def test_a_folder_with_files_is_refused_and_not_changed(
    runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="--out must be a new or empty folder, got"):
        publish(runs(ENCODER_DECODER, "full"), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("base", "Cannot read export .*: its base model .*llm_trimmed does not exist"),
        ("adapter_config.json", "Cannot read export .*adapter_config.json does not exist"),
        (
            "adapter_model.safetensors",
            "adapter_model.safetensors: it is not a complete safetensors file",
        ),
        ("another LLM", "adapter in .* was trained with another LLM"),
    ],
)
def test_the_error_names_damaged_or_missing_adapter_weights(
    runs: Callable[[str, str], Path], tmp_path: Path, damage: str, sentence: str
) -> None:
    run = Path(shutil.copytree(runs(DECODER_ONLY, "lora"), tmp_path / "run"))
    lm = run / "best" / "language_model"
    if damage == "base":
        shutil.rmtree(run / "llm_trimmed")
    elif damage == "another LLM":
        state = load_file(lm / "adapter_model.safetensors")
        renamed = {
            name.replace("layers.0", "layers.7"): tensor for name, tensor in state.items()
        }
        save_file(renamed, lm / "adapter_model.safetensors")
    else:
        (lm / damage).unlink()
    with pytest.raises(UserError, match=sentence):
        Translator.from_pretrained(run, "cpu")
