"""Tests of `Translator` and `flallm translate`: languages, n-best lists, streaming."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flallm_ds import export
from flallm_ds.batch import Batch
from flallm_ds.cli.evaluate import evaluate
from flallm_ds.cli.models import push as push_verb
from flallm_ds.cli.translate import translate as translate_verb
from flallm_ds.errors import UserError
from flallm_ds.export.hub import folder_of, push
from flallm_ds.inference.translator import Translator
from tests.helpers.exports import DECODER_ONLY, ENCODER_DECODER, write_export

KINDS = [ENCODER_DECODER, DECODER_ONLY]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 frames of 80 x 64 pixels."""
    folder = tmp_path_factory.mktemp("video")
    rng = np.random.default_rng(0)
    for number in range(24):
        cv2.imwrite(
            str(folder / f"{number:03d}.png"), rng.integers(0, 256, (80, 64, 3), np.uint8)
        )
    return folder


@pytest.fixture(scope="module")
def exports(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export of each kind of LLM; the decoder-only one speaks German and English."""
    folder = tmp_path_factory.mktemp("exports")
    return {kind: write_export(kind, tiny_corpus, folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def translators(exports: dict[str, Path]) -> dict[str, Translator]:
    return {kind: Translator.from_pretrained(path, "cpu") for kind, path in exports.items()}


def read_clip(
    translator: Translator, video: Path, language: str
) -> tuple[Batch, float | None]:
    """Return (batch, frames per second) of a whole video."""
    (clip,) = translator.clips(video, windows=False)
    return translator._batch(clip, video.name, language), clip.rate


def language_of(kind: str) -> str:
    return "" if kind == ENCODER_DECODER else "de"


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_is_translated_without_deepspeed(
    exports: dict[str, Path], translators: dict[str, Translator], video: Path, kind: str
) -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from flallm_ds.inference import Translator\n"
        f"print(Translator.from_pretrained({str(exports[kind])!r}, 'cpu')"
        f".translate({str(video)!r}, {language_of(kind)!r}))\n"
        "try:\n    import deepspeed\nexcept ImportError:\n    print('no deepspeed')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = translators[kind].translate(video, language_of(kind))
    assert said and done.stdout.splitlines()[-2:] == [said, "no deepspeed"]


@pytest.mark.parametrize("kind", KINDS)
def test_nbest_returns_that_number_of_sentences_best_first(
    translators: dict[str, Translator], video: Path, kind: str
) -> None:
    found = translators[kind].searching(beams=4, nbest=3).nbest(video, language_of(kind))
    scores = [score for _, score in found]
    assert len(found) == 3 and scores == sorted(scores, reverse=True) and scores[0] < 0
    assert found[0][0] == translators[kind].searching(beams=4).translate(
        video, language_of(kind)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_the_length_penalty(
    translators: dict[str, Translator], video: Path, kind: str
) -> None:
    """The score is the log probability with penalty 0, and its mean over tokens with 1."""
    translator = translators[kind].searching(beams=2, nbest=2, length_penalty=0.0)
    plain = translator.generate(
        *read_clip(translator, video, translator.language(language_of(kind)))
    )[0]
    translator = translator.searching(length_penalty=1.0)
    again = translator.generate(
        *read_clip(translator, video, translator.language(language_of(kind)))
    )[0]
    both = {c.ids: c.score for c in plain}
    shared = [c for c in again if c.ids in both]
    assert shared
    for candidate in shared:
        assert candidate.score == pytest.approx(
            both[candidate.ids] / len(candidate.ids), rel=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_yields_the_greedy_sentence_word_by_word(
    translators: dict[str, Translator], video: Path, kind: str
) -> None:
    words = list(translators[kind].stream(video, language_of(kind)))
    greedy = translators[kind].searching(beams=1).translate(video, language_of(kind))
    assert "".join(words).strip() == greedy and len(words) > 1


def test_an_error_in_a_stream_is_raised_to_its_reader(
    translators: dict[str, Translator], video: Path
) -> None:
    broken = dataclasses.replace(translators[ENCODER_DECODER], preprocess=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        list(broken.stream(video))


@pytest.mark.parametrize(
    "language", ["de", "German", "DE", "de-AT", "deu_Latn", "<2de>", "en"]
)
def test_a_target_language_is_given_by_code_or_name(
    translators: dict[str, Translator], language: str
) -> None:
    assert translators[DECODER_ONLY].language(language) == (
        "en" if language == "en" else "de"
    )


def test_the_target_language_changes_the_prompt(
    translators: dict[str, Translator], video: Path
) -> None:
    translator = translators[DECODER_ONLY]
    wordings = {
        language: translator.export.codec.wording(language).before
        for language in ("de", "en")
    }
    assert wordings["de"] != wordings["en"]
    batch, _ = read_clip(translator, video, "en")
    assert translator.wordings(batch)[0].before == wordings["en"]


@pytest.mark.parametrize(
    ("kind", "language", "sentence"),
    [
        (
            DECODER_ONLY,
            "",
            r"--language must be a target language of the model \(de, en\), got ''",
        ),
        (
            DECODER_ONLY,
            "zh",
            r"--language must be a target language of the model \(de, en\), got 'zh'",
        ),
        (
            ENCODER_DECODER,
            "en",
            r"--language must be a target language of the model \(de_DE\), got 'en'",
        ),
    ],
)
def test_an_unknown_target_language_is_refused(
    translators: dict[str, Translator], video: Path, kind: str, language: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        translators[kind].translate(video, language)


def test_the_only_target_language_may_be_given(translators: dict[str, Translator]) -> None:
    assert (
        translators[ENCODER_DECODER].language("de")
        == translators[ENCODER_DECODER].language()
        == "de_DE"
    )


@pytest.mark.parametrize(("beams", "nbest"), [(2, 3), (2, 0), (0, 1)])
def test_more_sentences_than_beams_are_refused(
    translators: dict[str, Translator], beams: int, nbest: int
) -> None:
    with pytest.raises(UserError, match="--nbest must be at least 1 and at most --beams"):
        translators[ENCODER_DECODER].searching(beams, nbest)


def test_the_command_prints_sentences_scores_and_streams(
    exports: dict[str, Path],
    translators: dict[str, Translator],
    video: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def printed(**options: object) -> list[str]:
        translate_verb((video,), model=str(exports[DECODER_ONLY]), language="de", **options)  # type: ignore[arg-type]
        return capsys.readouterr().out.splitlines()

    translator = translators[DECODER_ONLY]
    assert printed() == [translator.translate(video, "de")]
    assert printed(stream=True)[0].strip() == translator.searching(beams=1).translate(
        video, "de"
    )
    lines = [line.split("\t") for line in printed(nbest=2, beams=3)]
    assert [said for _, said in lines] == [
        s for s, _ in translator.searching(3, 2).nbest(video, "de")
    ]
    assert all(float(score) < 0 for score, _ in lines)
    with pytest.raises(UserError, match="--stream must go with one beam"):
        printed(stream=True, nbest=2)


def test_a_split_is_evaluated_with_nbest_and_target_language(
    exports: dict[str, Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(exports[DECODER_ONLY].parent, run)
    shards = (str(tiny_corpus / "shards"),)
    evaluate(
        run=str(run),
        split="dev",
        beams=3,
        nbest=2,
        length_penalty=0.5,
        shards=shards,
        bits=16,
        controls=("blind", "shuffled_frames", "blank"),
    )
    lines = (
        (run / "evaluation" / "dev.hypotheses.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    assert len(lines) == 9
    for said in map(json.loads, lines):
        assert said["language"] == "de" and len(said["nbest"]) == 2
        assert (
            said["nbest"][0][0] == said["hypothesis"]
            and said["nbest"][0][1] > said["nbest"][1][1]
        )
    content = json.loads((run / "evaluation" / "dev.json").read_text(encoding="utf-8"))
    assert (
        content["beams"] == 3
        and content["length_penalty"] == 0.5
        and content["scores"]["num_sentences"] == 9
    )
    assert content["scores"]["intervals"].keys() >= {"bleu4", "rouge_l", "chrf", "wer"}
    assert content["scores"]["preset"] == "sacrebleu" and content["scores"]["rule"]
    # The search of a control sees other frames, so the scores of hypotheses differ.
    blank = (run / "evaluation" / "dev.blank.hypotheses.jsonl").read_text(encoding="utf-8")
    assert len(blank.splitlines()) == 9 and blank.splitlines() != lines
    assert content["controls"].keys() == {"another_signer", "shuffled_frames", "blank"}
    assert content["controls"]["another_signer"]["num_sentences"] == 9
    assert len(content["meanings"]) == 4 and content["words"]["de"]["with content"]
    with pytest.raises(UserError, match="--nbest must be at least 1 and at most --beams"):
        evaluate(run=str(run), split="dev", beams=1, nbest=2, shards=shards)


# --- precision


class CastsOf(TorchDispatchMode):
    """Count how often a parameter of an LLM is copied to another dtype or device."""

    def __init__(self, llm: Any) -> None:
        super().__init__()
        self.places = {parameter.data_ptr() for parameter in llm.parameters()}
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._overloadpacket is torch.ops.aten._to_copy:
            self.count += args[0].data_ptr() in self.places
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def bf16_exports(
    tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """Return exports of a bf16 engine: complete LLMs and LoRA adapters."""
    folder = tmp_path_factory.mktemp("bf16")
    return {
        (kind, tuning): write_export(
            kind, tiny_corpus, folder / f"{kind}_{tuning}", tuning, torch.bfloat16
        )
        for kind, tuning in (
            (ENCODER_DECODER, "full"),
            (DECODER_ONLY, "full"),
            (DECODER_ONLY, "lora"),
        )
    }


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TUNED = [(ENCODER_DECODER, "full"), (DECODER_ONLY, "full"), (DECODER_ONLY, "lora")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "tuning"), TUNED)
def test_an_export_of_a_bf16_run_is_loaded_in_bf16_and_never_cast(
    bf16_exports: dict[tuple[str, str], Path],
    video: Path,
    kind: str,
    tuning: str,
    device: str,
) -> None:
    translator = Translator.from_pretrained(bf16_exports[kind, tuning], device)
    model = translator.export.translator
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch, rate = read_clip(translator, video, language_of(kind) or translator.language())
    with CastsOf(model.language_model) as casts:
        said = translator.generate(batch, rate)
    assert casts.count == 0 and len(said[0][0].ids) > 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "tuning"), TUNED)
def test_a_bf16_export_generates_the_hypotheses_of_its_training(
    bf16_exports: dict[tuple[str, str], Path],
    video: Path,
    kind: str,
    tuning: str,
    device: str,
) -> None:
    """In training, the frozen encoder runs outside the engine and the LLM in its module."""
    folder = bf16_exports[kind, tuning]
    translator = Translator.from_pretrained(folder, device)
    batch, _ = read_clip(translator, video, language_of(kind) or translator.language())
    engine = export.read(folder)
    module = engine.translator.to(device, torch.bfloat16)
    pixels = translator.preprocess(batch, train=False, device=torch.device(device))
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        features = engine.visual.to(device)(pixels, batch.num_frames_B).float()
    wordings = translator.wordings(batch)
    assert translator.generate(batch) == module.generate(
        features, batch.num_frames_B, wordings, translator.beam
    )


@pytest.mark.parametrize(("bits", "dtype"), [(32, torch.float32), (16, torch.bfloat16)])
def test_other_bits_can_be_requested(
    exports: dict[str, Path],
    bf16_exports: dict[tuple[str, str], Path],
    bits: Any,
    dtype: torch.dtype,
    video: Path,
) -> None:
    for folder in (exports[DECODER_ONLY], bf16_exports[DECODER_ONLY, "full"]):
        translator = Translator.from_pretrained(folder, "cpu", bits)
        assert translator.export.translator.language_model.dtype == dtype
        assert translator.translate(video, "de")


def test_bits_of_a_model_without_an_llm_are_refused(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(exports[DECODER_ONLY], tmp_path / "best"))
    settings = json.loads((run / "flallm.json").read_text())
    (run / "flallm.json").write_text(json.dumps(settings | {"stage": "visual"}))
    with pytest.raises(UserError, match="--bits must go with a model that has an LLM"):
        Translator.from_pretrained(run, "cpu", bits=16)


def test_an_fp32_export_is_loaded_in_fp32(translators: dict[str, Translator]) -> None:
    for translator in translators.values():
        assert {p.dtype for p in translator.export.translator.parameters()} == {
            torch.float32
        }


# --- the hub


def test_a_model_that_is_neither_a_folder_nor_on_the_hub_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # read at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError,
        match="Cannot find an export nobody/nothing: it is not a folder, and the hub",
    ):
        folder_of("nobody/nothing")
    with pytest.raises(
        UserError, match=r"Cannot find an export in nothing: neither flallm\.json nor best"
    ):
        folder_of("./nothing")


def test_push_is_refused_without_a_token_or_a_network(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = exports[ENCODER_DECODER]
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("flallm_ds.export.hub.get_token", lambda: None)
    with pytest.raises(UserError, match="Cannot push to the hub: no token is set"):
        push_verb(model=model, repo="me/model")
    monkeypatch.setattr("flallm_ds.export.hub.get_token", lambda: "hf_none")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    # read at import
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match="to me/model: the hub is not available or refuses it"
    ):
        push(model, "me/model", private=True)
    with pytest.raises(UserError, match="--repo must be USER/NAME, got 'model'"):
        push(model, "model", private=False)
    with pytest.raises(UserError, match="Cannot find an export in"):
        push(tmp_path, "me/model", private=False)
    apart = Path(shutil.copytree(model, tmp_path / "apart"))
    settings = json.loads((apart / "flallm.json").read_text()) | {"base": "../llm_trimmed"}
    (apart / "flallm.json").write_text(json.dumps(settings))
    with pytest.raises(
        UserError, match=r"needs the base model \.\./llm_trimmed on this machine\. Make a"
    ):
        push(apart, "me/model", private=False)
