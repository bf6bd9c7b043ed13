"""Tests of languages from a corpus to the scores, with the names that each corpus uses."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from flallm_ds.batch import Hypothesis
from flallm_ds.data.index import iter_rows, load_index, write_table
from flallm_ds.data.mixture import open_indexes
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Instruction
from flallm_ds.errors import UserError
from flallm_ds.metrics.scoring import scores_by, scores_of
from flallm_ds.sharding.build import Options, build
from tests.helpers.llms import make_tiny_llm
from tests.helpers.trees import write_frames

TEXTS = {
    "de": ["am tag regnet es im norden .", "morgen scheint die sonne im süden ."],
    "zh": ["明天北部地区有雨", "今天晚上南方有雪"],
    "ja": ["明日は雨が降ります", "今日は北で雪です"],
}
NAMES = {
    "de": ["de", "de-AT", "German", "DE", "deu_Latn", "de_DE"],
    "zh": ["zh", "Chinese", "__zh__", "<2zh>", "zh_CN", "cmn"],
    "ja": ["Japanese", "ja_XX", "jpn_Jpan", "ja-JP"],
}


def build_shards(root: Path, languages: list[str], texts: list[str]) -> Path:
    rows = []
    for n, language in enumerate(languages):
        write_frames(root / f"frames{n}", 4)
        row = {
            "video": f"frames{n}",
            "text": texts[n % 2],
            "id": str(n),
            "language": language,
        }
        rows.append(row | {"split": "train"})
    (root / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build("manifest", root / "m.jsonl", root / "shards", Options(short_side=16, workers=1))
    return root / "shards"


def write_as_before(shards: Path, languages: list[str]) -> None:
    """Write the languages into a table as earlier versions did, without language tags."""
    rows = list(iter_rows(load_index(shards, "train")))
    for row, language in zip(rows, languages, strict=True):
        row["language"] = language
    manifest = json.loads((shards / "index.json").read_text())
    manifest["splits"]["train"] |= write_table(shards / "train.safetensors", rows)
    (shards / "index.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    root = tmp_path_factory.mktemp("llms")
    texts = [*itertools.chain.from_iterable(TEXTS.values())] * 4
    texts.append("German Chinese Japanese: ")
    families = ("mbart", "mbart50", "m2m100", "nllb", "madlad", "mt5")
    return {family: make_tiny_llm(family, root / family, texts) for family in families}


def codec_of(folder: Path, languages: set[str], texts: list[str]) -> TextCodec:
    config = AutoConfig.from_pretrained(folder)
    start = getattr(config, "decoder_start_token_id", None)
    instruction = Instruction(
        start_token=start, rows=config.vocab_size, languages=tuple(sorted(languages))
    )
    return TextCodec.for_training_text(str(folder), instruction, texts, trim=True)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(("tag", "rule"), [("de", "13a"), ("zh", "zh"), ("ja", "char")])
def test_all_names_of_a_language_have_one_tag_from_the_corpus_to_the_score(
    tmp_path, llms, tag, rule, older
):
    names = NAMES[tag]
    shards = build_shards(tmp_path, [tag] * len(names) if older else names, TEXTS[tag])
    if older:
        write_as_before(shards, names)
    assert json.loads((shards / "index.json").read_text())["language"] == tag
    index = open_indexes(shards, "train")
    assert set(index.strings("language")) == {tag}
    texts = list(index.strings("text"))
    for folder in llms.values():
        codec = codec_of(folder, set(index.strings("language")), texts)
        perfect = []
        for text, language in zip(texts, index.strings("language"), strict=True):
            decoded = codec.decode(codec.encode(text))
            perfect.append(Hypothesis("k", decoded, text, "c", language))
        scores = scores_of(perfect)
        signature = scores.signatures["bleu_signature"]
        assert scores.bleu4 == pytest.approx(100) and f"|tok:{rule}|" in signature
        assert not signature.startswith("mean over languages")
        assert list(scores_by(perfect, "language")) == [tag]


def test_joined_folders_have_one_tag_for_all_names_of_a_language(tmp_path):
    folders = [build_shards(tmp_path / name, ["de", "de"], TEXTS["de"]) for name in "ab"]
    write_as_before(folders[1], ["German", ""])
    joined = open_indexes(folders, "train")
    assert list(joined.strings("language")) == ["de", "de", "de", ""]
    assert list(joined.strings("text")) == TEXTS["de"] * 2


def test_tags_change_neither_the_order_nor_other_columns(tmp_path):
    shards = build_shards(tmp_path, ["de", "zh-Hant", "en"], TEXTS["de"])
    plain, opened = load_index(shards, "train"), open_indexes(shards, "train")
    assert opened.arrays.keys() == plain.arrays.keys()
    assert opened.fingerprint == plain.fingerprint
    assert sorted(opened.strings("language")) == ["de", "en", "zh-Hant"]
    write_as_before(shards, ["deu", "English", "zh_TW"])
    plain, opened = load_index(shards, "train"), open_indexes(shards, "train")
    # verify.py compares these with the tars.
    assert list(plain.strings("language")) == ["deu", "English", "zh_TW"]
    assert list(opened.strings("language")) == ["de", "en", "zh-Hant"]
    assert opened.fingerprint == plain.fingerprint
    assert opened.arrays.keys() == plain.arrays.keys()
    for name in set(plain.arrays) - {"language", "language_ends"}:
        np.testing.assert_array_equal(opened.arrays[name], plain.arrays[name])


def test_older_shards_with_an_unknown_language_are_refused_with_suggestions(tmp_path):
    shards = build_shards(tmp_path, ["de"], TEXTS["de"])
    write_as_before(shards, ["Germann"])
    with pytest.raises(
        UserError,
        match=rf"^the language of each train clip in {shards} must be .*'Germann': did you mean Ge",
    ):
        open_indexes(shards, "train")
