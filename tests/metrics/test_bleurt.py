"""Tests of BLEURT with checkpoints as they are on the hub, with random weights."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertTokenizer

from flallm_ds.cli.score import score
from flallm_ds.errors import UserError
from flallm_ds.metrics import bleurt as bleurt_module
from flallm_ds.metrics import score as score_texts
from flallm_ds.metrics import score_by_language
from flallm_ds.metrics.bleurt import load_bleurt
from tests.helpers.bleurts import (
    BERT,
    BLEURT20,
    KINDS,
    POSITIONS,
    plain_scores,
    write_bleurt,
)

MEANT = [
    "Im Norden regnet es am Abend.", "Morgen scheint im Süden die Sonne", "Regen", "Schnee am Abend",
    "Im Norden und im Süden regnet es morgen am Abend und am Morgen scheint die Sonne im Norden",
]  # fmt: skip
SAID = [
    "Am Abend regnet es im Norden!", "Morgen Regen", "", "Schnee am Abend",
    "Im Norden und im Süden scheint die Sonne, es regnet und regnet am Abend im Süden",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: write_bleurt(kind, root / kind, MEANT + SAID) for kind in KINDS}


def token_ids(folder: Path, text: str) -> list[int]:
    """Return the ids of a text by the tokenizer library of the checkpoint."""
    for name in ("spm.model", "sentencepiece.model"):
        if (folder / name).is_file():
            processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
            tokens = processor.encode(text, out_type=str)
            return [processor.piece_to_id(token) for token in tokens]
    tokens = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    # The rule of an uncased BERT: lower case, no accents, the longest tokens first.
    plain = text.lower().replace("ü", "u")
    ids = []
    for word in "".join(c if c.isalnum() else f" {c} " for c in plain).split():
        begin, found = 0, []
        while begin < len(word):
            for end in range(len(word), begin, -1):
                token = ("##" if begin else "") + word[begin:end]
                if token in tokens:
                    break
            else:
                found = [tokens.index("[UNK]")]
                break
            found.append(tokens.index(token))
            begin = end
        ids += found
    return ids


def expected(folder: Path, said: list[str], meant: list[str]) -> list[float]:
    pairs = []
    for hypothesis, reference in zip(said, meant, strict=True):
        first, second = token_ids(folder, reference), token_ids(folder, hypothesis)
        while len(first) + len(second) > POSITIONS - 3:
            longer = first if len(first) > len(second) else second
            del longer[-1]
        pairs.append((first, second))
    return plain_scores(folder, pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_a_plain_computation(folders: dict[str, Path], kind: str) -> None:
    found = load_bleurt(folders[kind]).scores(SAID, MEANT)
    wanted = expected(folders[kind], SAID, MEANT)
    assert np.ptp(wanted) > 0.1  # the sentences have different scores
    assert found == pytest.approx(wanted, abs=1e-5)
    # The order of the two texts counts: reference first.
    swapped = load_bleurt(folders[kind]).scores(MEANT, SAID)
    assert swapped != pytest.approx(wanted, abs=1e-3)


def test_a_bert_is_read_as_transformers_reads_a_pair(folders: dict[str, Path]) -> None:
    """As the model card of Elron/bleurt-base computes it."""
    model = AutoModelForSequenceClassification.from_pretrained(folders[BERT])
    tokenizer = BertTokenizer.from_pretrained(folders[BERT])
    pairs = tokenizer(MEANT[:4], SAID[:4], padding="longest", return_tensors="pt")
    with torch.no_grad():
        wanted = model.eval()(**pairs).logits.flatten().tolist()
    found = load_bleurt(folders[BERT]).scores(SAID[:4], MEANT[:4])
    assert found == pytest.approx(wanted, abs=1e-5)


def test_sentencepiece_normalises_as_its_file_says(folders: dict[str, Path]) -> None:
    """transformers would not map these letters."""
    found = load_bleurt(folders[BLEURT20]).scores(
        ["Ｒｅｇｅｎ", "Regen"], ["Regen", "Regen"]
    )
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_batches_do_not_change_a_score(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_bleurt(folders[BLEURT20])
    together = model.scores(SAID, MEANT)
    for size in (1, 2):
        monkeypatch.setattr(bleurt_module, "PAIRS_A_BATCH", size)
        assert model.scores(SAID, MEANT) == pytest.approx(together, abs=1e-5)


def test_the_corpus_has_the_mean_and_the_checkpoint_in_its_signature(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders[BLEURT20]
    paths = {}
    for name, texts in (("hypotheses", SAID), ("references", MEANT)):
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text("\n".join(texts) + "\n", encoding="utf-8")
    out = tmp_path / "scores.json"
    # The preset changes the text of the other metrics alone.
    score(**paths, language="de", preset="spamo", bleurt=folder, resamples=50, out=out)
    stored = json.loads(out.read_text(encoding="utf-8"))
    mean = 100 * np.mean(expected(folder, SAID, MEANT))
    assert stored["bleurt"] == pytest.approx(mean, abs=1e-3)
    low, high = stored["intervals"]["bleurt"]
    assert low < stored["bleurt"] < high

    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    signature = f"checkpoint:bleurt20|sha256:{digest}|mean:sentences"
    assert stored["bleurt_signature"] == signature
    printed = capsys.readouterr().out
    assert f"BLEURT signature: {signature}" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| BLEURT"))
    assert f"{stored['bleurt']:.2f}" in row


def test_languages_have_the_same_weight(folders: dict[str, Path]) -> None:
    counts = load_bleurt(folders[BLEURT20]).counts
    found = score_by_language(SAID, MEANT, ["de", "de", "de", "de", "en"], trained=counts)
    alone = expected(folders[BLEURT20], SAID, MEANT)
    assert found.values["bleurt"] == pytest.approx(
        100 * (np.mean(alone[:4]) + alone[4]) / 2, abs=1e-3
    )
    assert "bleurt" not in score_texts(SAID, MEANT, "de").values


def test_pickled_tensors_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """The conversions of 2023 are .bin files."""
    folder = write_bleurt(BLEURT20, tmp_path / "bin", MEANT + SAID, pickled=True)
    found = load_bleurt(folder).scores(SAID, MEANT)
    assert found == pytest.approx(load_bleurt(folders[BLEURT20]).scores(SAID, MEANT))


# --- refused folders


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code runs",))


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _nested_config(folder: Path) -> None:
    """More brackets than the parser of Python reads."""
    (folder / "config.json").write_text("[" * 100_000, encoding="utf-8")


def _tensorflow(folder: Path) -> None:
    (folder / "config.json").rename(folder / "bert_config.json")
    (folder / "saved_model.pb").write_bytes(b"")


def _config(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8")) | fields
        path.write_text(json.dumps(content), encoding="utf-8")

    return change


def _no_classifier(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def _code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"classifier.weight": Code()}, file, protocol=2)


def _no_cls(folder: Path) -> None:
    content = (folder / "spm.model").read_bytes()
    (folder / "spm.model").write_bytes(content.replace(b"[CLS]", b"[cls]"))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (_no_config, "with no config.json. Fetch a conversion"),
    "nested config": (_nested_config, r"Cannot read .*config\.json"),
    "tensorflow": (_tensorflow, "with a checkpoint of TensorFlow"),
    "type": (_config(model_type="roberta"), "a config.json of the type roberta"),
    "labels": (_config(id2label={"0": "a", "1": "b"}), "with 2 labels"),
    "width": (_config(hidden_size="wide"), "Cannot load the weights"),
    "layers": (_config(num_hidden_layers=3), r"do not fit the config \(.*layer.2"),
    "no projection": (_config(embedding_size=None), "weights that do not fit the config"),
    "vocabulary": (_config(vocab_size=9), r"tokens for 9 rows|do not fit the config"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "must hold weights"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(b"12"), "truncated"),
    "no classifier": (_no_classifier, r"do not fit the config \(classifier.weight\)"),
    "code": (_code, "hold more than tensors, which could run code"),
    "no tokenizer": (lambda f: (f / "spm.model").unlink(), "with no tokenizer"),
    "no cls": (_no_cls, r"spm.model without the tokens \[CLS\] and \[SEP\]"),
    "damaged": (lambda f: (f / "spm.model").write_bytes(b"x"), "Cannot load the tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_folders_are_refused_in_one_sentence(
    tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change, message = REFUSED[case]
    folder = write_bleurt(BLEURT20, tmp_path / "bleurt", MEANT)
    change(folder)
    with pytest.raises(UserError, match=message):
        load_bleurt(folder)
    assert "code runs" not in capfd.readouterr().out
