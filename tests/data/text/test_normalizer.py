"""Text is normalised for a SentencePiece vocabulary as SentencePiece does."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import normalizers
from transformers import AutoTokenizer

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Instruction
from flallm_ds.data.text.tokenizer import load_tokenizer
from tests.helpers.llms import FAMILIES, make_tiny_llm

TEXTS = [
    "好,是吗?对!(啊):",
    "今天 ABC 12 fi ... kg",
    "Am Tag scheint überall die Sonne.",
    "バナナ 한국",
]
# Full width, ligatures, one character for several, several for one, spaces of all kinds,
# nothing at all.
ODD = {
    "今天，好吗？对！（啊）：": "今天,好吗?对!(啊):",
    "ＡＢＣ １２": "ABC 12",
    "ﬁ … ㎏": "fi ... kg",
    "u\u0308berall": "überall",
    "ﾊﾞﾅﾅ": "バナナ",
    "\u1112\u1161\u11ab\u1100\u116e\u11a8": "한국",
    "die\u00a0Sonne\u3000\tTag\u200bAm\n": "die Sonne Tag Am",
    "\u200b": "",
}
BYTE_LEVEL = ["qwen2", "qwen3", "llama3", "bloom", "cohere", "cohere2"]
BYTE_FALLBACK = ["llama", "mistral", "gemma2", "gemma3"]
NORMALISED = [f for f in FAMILIES if f not in (*BYTE_LEVEL, *BYTE_FALLBACK)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llms")
    return {family: make_tiny_llm(family, root / family, TEXTS) for family in FAMILIES}


def codec_of(folder: Path, texts: list[str] = TEXTS, trim: bool = False) -> TextCodec:
    return TextCodec.for_training_text(
        str(folder), Instruction(languages=("de",)), texts, trim
    )


def again(codec: TextCodec, folder: Path) -> TextCodec:
    """Save and load a codec twice, as for the run folder and its export."""
    for name in ("run", "export"):
        codec.save(folder / name)
        codec = TextCodec.load(folder / name)
    return codec


@pytest.mark.parametrize("family", NORMALISED)
@pytest.mark.parametrize("trim", [False, True])
def test_unusual_characters_are_normalised_to_those_of_the_vocabulary(
    folders, family, trim, tmp_path
):
    codec = codec_of(folders[family], [*TEXTS, *ODD], trim)
    loaded = again(codec, tmp_path)
    for text, written in ODD.items():
        ids = codec.encode(text)
        assert codec.decode(ids) == written
        assert ids == codec.encode(written) == loaded.encode(text)
    assert codec.unknown_tokens([*TEXTS, *ODD]).num_unknown == 0


@pytest.mark.parametrize("family", [*BYTE_LEVEL, *BYTE_FALLBACK])
def test_a_vocabulary_with_bytes_keeps_unusual_characters(folders, family, tmp_path):
    plain = AutoTokenizer.from_pretrained(folders[family])
    codec = again(codec_of(folders[family]), tmp_path)
    for text in [*TEXTS, *ODD]:
        ids = plain(text, add_special_tokens=False)["input_ids"]
        assert codec.kept_ids[codec.encode(text)[:-1]].tolist() == ids
    assert codec.decode(codec.encode("今天，好吗？ﬁ")) == "今天，好吗？ﬁ"


FILES = {
    "both": ("sentencepiece.bpe.model", "tokenizer.json"),
    "model": ("sentencepiece.bpe.model",),
    "json": ("tokenizer.json",),
    "json without a normaliser": ("tokenizer.json",),  # as transformers 5 saves an mBART
    "both, the json without": ("sentencepiece.bpe.model", "tokenizer.json"),
}


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("family", ["mbart", "xglm", "mbart50", "nllb", "t5"])
def test_the_normaliser_is_found_in_each_kind_of_file(folders, family, files, tmp_path):
    folder = tmp_path / "llm"
    shutil.copytree(folders[family], folder)
    if not (folder / "tokenizer.json").is_file():  # no such file on the hub
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    model = next(folder.glob("*.model"))
    if "sentencepiece.bpe.model" not in FILES[files]:
        model.unlink()
    if "tokenizer.json" not in FILES[files]:
        if family == "xglm":
            pytest.skip("transformers makes no XGLM tokenizer of a SentencePiece model")
        (folder / "tokenizer.json").unlink()
    elif "without" in files:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        (folder / "tokenizer.json").write_text(
            json.dumps(content | {"normalizer": None}), encoding="utf-8"
        )
    codec = codec_of(folder)
    assert {text: codec.decode(codec.encode(text)) for text in ODD} == ODD


def test_a_vocabulary_with_full_width_characters_is_not_changed(folders, tmp_path):
    """Its files do not say how it was made, but it was not made with NFKC."""
    folder = tmp_path / "llm"
    shutil.copytree(folders["mbart"], folder)
    (folder / "sentencepiece.bpe.model").unlink()
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = [
        ["，" if token == "," else token, score]
        for token, score in content["model"]["vocab"]
    ]
    content["model"]["vocab"] = vocabulary
    content["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    codec = codec_of(folder)
    assert codec.decode(codec.encode("今天，好")) == "今天，好"


def test_a_tokenizer_with_another_normaliser_keeps_it(folders, tmp_path):
    tokenizer = load_tokenizer(str(folders["t5"]))
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase()])
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
    assert (
        load_tokenizer(str(tmp_path)).backend_tokenizer.normalizer.normalize_str("Ａ")
        == "ａ"
    )


# --- the real tokenizer of facebook/mbart-large-cc25, trimmed to PHOENIX14T by others

FULL_WIDTH = {
    "am tag scheint die sonne．": "am tag scheint die sonne.",
    "temperaturen bis ＋２０ grad．": "temperaturen bis +20 grad.",
    "der wind weht im nord－westen…": "der wind weht im nord-westen...",
    "nebel\u00a0im\u3000su\u0308den .": "nebel im süden .",
}


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "mbart_phoenix14t"


@pytest.fixture(scope="module")
def reports(shared_data: Path) -> list[str]:
    table = shared_data / "phoenix14t" / "full-test-split.PHOENIX-2014-T.test.corpus.csv"
    with table.open(encoding="utf-8", newline="") as file:
        return [row["translation"] for row in csv.DictReader(file, delimiter="|")]


def by_sentencepiece(real: Path, text: str) -> list[int]:
    """Return ids in mBART's order: one special token more at the start, another unknown id."""
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(real / "sentencepiece.bpe.model")
    )
    return [i + 1 if i else 3 for i in model.encode(text)]


@pytest.mark.parametrize("trim", [False, True])
def test_the_real_mbart_encodes_as_its_sentencepiece_model_does(
    real, reports, trim, tmp_path
):
    texts = [*reports, *FULL_WIDTH, "regen，wind？ ﾊﾞﾝ schnee！"]
    codec = TextCodec.for_training_text(
        str(real), Instruction(language="de_DE"), texts, trim
    )
    assert (codec.vocab_size == len(codec.tokenizer) == 2454) is not trim
    loaded = again(codec, tmp_path)
    for text in texts:
        ids = codec.encode(text)
        assert codec.kept_ids[ids[:-1]].tolist() == by_sentencepiece(real, text)
        assert loaded.encode(text) == ids
    for text, written in FULL_WIDTH.items():
        assert (
            codec.decode(codec.encode(text))
            == codec.decode(codec.encode(written))
            == written
        )


def test_the_real_mbart_encodes_the_reports_and_counts_unknown_tokens(real, reports):
    """Its 2,427 tokens have no comma, so NFKC does not make the comma known."""
    codec = TextCodec.for_training_text(
        str(real), Instruction(language="de_DE"), reports, trim=False
    )
    unknown = codec.unknown_tokens(reports)
    assert (unknown.num_tokens, unknown.num_unknown) == (12777, 1)
    assert unknown.characters == (("x", 1),)
    dense = codec.unknown_tokens(["regen，wind！", "regen，schnee"] * 3)
    assert dense.characters == (("，", 6), ("！", 3)) and dense.num_unknown == 9
