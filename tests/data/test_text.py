import pytest

from flallm_ds.data.index import load_index
from flallm_ds.data.text import Instruction, TextCodec
from flallm_ds.errors import UserError

TRAINING_TEXT = ["regen sonne wind morgen", "wolken wolken wind morgen"]


@pytest.fixture(scope="module")
def trimmed(tiny_corpus):
    return TextCodec.for_training_text(
        str(tiny_corpus / "llm"), Instruction(language="de_DE"), TRAINING_TEXT, trim=True
    )


@pytest.fixture(scope="module")
def whole(tiny_corpus):
    return TextCodec.for_training_text(
        str(tiny_corpus / "llm"), Instruction(language="de_DE"), TRAINING_TEXT, trim=False
    )


def test_the_training_text_survives_encoding_and_decoding(tiny_corpus):
    texts = list(load_index(tiny_corpus / "shards", "train").strings("text"))
    codec = TextCodec.for_training_text(
        str(tiny_corpus / "llm"), Instruction(language="de_DE"), texts, trim=True
    )
    assert [codec.decode(codec.encode(text)) for text in texts] == texts
    assert all(codec.tokenizer.unk_token_id not in codec.kept_ids[codec.encode(t)] for t in texts)


def test_trimmed_ids_are_the_full_ones_numbered_anew(trimmed, whole):
    assert trimmed.vocab_size < whole.vocab_size == len(whole.tokenizer)
    for text in TRAINING_TEXT:
        assert trimmed.kept_ids[trimmed.encode(text)].tolist() == whole.encode(text)
    assert [trimmed.trimmed_id(full) for full in trimmed.kept_ids] == list(range(trimmed.vocab_size))


def test_trimming_keeps_the_pieces_the_specials_and_the_language(trimmed):
    tokenizer = trimmed.tokenizer
    pieces = {i for text in TRAINING_TEXT for i in tokenizer(text, add_special_tokens=False)["input_ids"]}
    language = tokenizer.convert_tokens_to_ids("de_DE")
    assert set(trimmed.kept_ids.tolist()) == pieces | set(tokenizer.all_special_ids) | {language}


def test_the_specials_are_where_the_codec_says(trimmed):
    tokenizer = trimmed.tokenizer
    for trimmed_id, token in (
        (trimmed.pad_id, "<pad>"),
        (trimmed.eos_id, "</s>"),
        (trimmed.start_id, "de_DE"),
    ):
        assert tokenizer.convert_ids_to_tokens(int(trimmed.kept_ids[trimmed_id])) == token


def test_unseen_words_become_unknown(trimmed, whole):
    ids = trimmed.encode("schnee wind")
    unknown = trimmed.trimmed_id(trimmed.tokenizer.unk_token_id)
    assert unknown in ids and trimmed.decode(ids).endswith("wind")
    assert whole.trimmed_id(whole.tokenizer.unk_token_id) not in whole.encode("schnee wind")


def test_a_sentence_ends_with_its_end_and_has_no_start(whole):
    ids = whole.encode("regen")
    assert ids[-1] == whole.eos_id and ids.count(whole.eos_id) == 1 and whole.start_id not in ids
    assert whole.encode("") == [whole.eos_id]


def test_what_follows_the_end_is_not_decoded(trimmed):
    ids = trimmed.encode("regen sonne")
    assert trimmed.decode([trimmed.start_id, *ids, *ids, trimmed.pad_id]) == "regen sonne"
    assert trimmed.decode([trimmed.eos_id, *ids]) == "regen sonne"  # some models start with the end token
    assert trimmed.decode([]) == ""


def test_an_untrimmed_codec_decodes_what_it_encodes(whole):
    for text in [*TRAINING_TEXT, "schnee nebel"]:
        assert whole.decode(whole.encode(text)) == text


def test_a_saved_codec_is_the_same_when_loaded(trimmed, tmp_path):
    trimmed.save(tmp_path)
    loaded = TextCodec.load(tmp_path)
    assert loaded.kept_ids.tolist() == trimmed.kept_ids.tolist()
    assert (loaded.language, loaded.pad_id, loaded.eos_id, loaded.start_id) == (
        "de_DE", trimmed.pad_id, trimmed.eos_id, trimmed.start_id,
    )  # fmt: skip
    text = "regen schnee wolken"
    assert loaded.encode(text) == trimmed.encode(text)


def test_an_unknown_language_is_refused_with_near_ones(tiny_corpus):
    with pytest.raises(UserError, match=r"llm\.language 'de_De' is not .* did you mean .*de_DE"):
        TextCodec.for_training_text(
            str(tiny_corpus / "llm"), Instruction(language="de_De"), TRAINING_TEXT, trim=True
        )


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is nothing at"):
        TextCodec.for_training_text(
            str(tmp_path / "none"), Instruction(language="de_DE"), TRAINING_TEXT, trim=True
        )


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="must load, but did not"):
        TextCodec.for_training_text(str(tmp_path), Instruction(language="de_DE"), TRAINING_TEXT, trim=True)


def test_a_folder_without_a_vocabulary_is_refused(trimmed, tmp_path):
    trimmed.save(tmp_path)
    (tmp_path / "vocabulary.json").unlink()
    with pytest.raises(UserError, match=r"vocabulary\.json"):
        TextCodec.load(tmp_path)
