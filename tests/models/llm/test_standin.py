"""The stand-in LLM: its tokenizer, its pretraining and the folder that it is written to."""

import hashlib
import random
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MBartForConditionalGeneration
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

from flallm_ds.errors import UserError
from flallm_ds.models.llm import standin as module
from flallm_ds.models.llm.standin import standin_llm

TINY = {"vocab_size": 200, "d_model": 64, "layers": 1}


def weather(count, seed=0):
    draw = random.Random(seed)
    days = ["heute", "morgen", "übermorgen"]
    skies = ["regnet es", "schneit es", "scheint die sonne", "fällt weißer schnee"]
    places = ["im süden", "im norden", "an der küste", "in höheren lagen"]
    return [" ".join(map(draw.choice, (days, skies, places))) for _ in range(count)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: at this size more threads are no faster, and ten times slower under
    load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(weather(150)), encoding="utf-8")
    (tmp_path / "b.txt").write_text(
        "\n".join(weather(150, seed=1)) + "\n\n", encoding="utf-8"
    )
    return f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one run that is long enough to learn the toy language."""
    folder = tmp_path_factory.mktemp("standin")
    (folder / "texts.txt").write_text("\n".join(weather(400)), encoding="utf-8")
    standin_llm(str(folder / "texts.txt"), folder / "llm", steps=200, **TINY)
    return folder / "llm"


def digest(folder):
    digests = {}
    for path in sorted(folder.iterdir()):
        digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def test_the_folder_loads_as_the_real_model_does(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForSeq2SeqLM.from_pretrained(trained)
    assert isinstance(model, MBartForConditionalGeneration)
    assert type(tokenizer).__name__ == "MBartTokenizer"
    assert (
        model.config.vocab_size
        == len(tokenizer)
        == model.get_input_embeddings().num_embeddings
    )
    assert model.config.scale_embedding and model.config.max_position_embeddings == 1024
    assert model.get_input_embeddings().weight is model.lm_head.weight
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
    } <= set(digest(trained))


def test_ids_are_in_mbarts_order(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [
        0,
        1,
        2,
        3,
    ]
    last = len(tokenizer) - 1
    assert tokenizer.convert_tokens_to_ids("<mask>") == tokenizer.mask_token_id == last
    ids = tokenizer.convert_tokens_to_ids(FAIRSEQ_LANGUAGE_CODES)
    assert ids == list(range(last - 25, last))


def test_sentences_end_with_eos_and_the_language_code(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained, src_lang="de_DE", tgt_lang="de_DE")
    code = tokenizer.convert_tokens_to_ids("de_DE")
    for encoded in (
        tokenizer("morgen regnet es"),
        tokenizer(text_target="morgen regnet es"),
    ):
        assert encoded["input_ids"][-2:] == [tokenizer.eos_token_id, code]


def test_the_tokenizer_encodes_and_decodes_umlauts(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained, src_lang="de_DE")
    for sentence in ("übermorgen fällt weißer schnee an der küste", "in höheren lagen"):
        ids = tokenizer(sentence)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == sentence


def test_the_model_restores_a_masked_word(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained, src_lang="de_DE")
    model = AutoModelForSeq2SeqLM.from_pretrained(trained).eval()
    batch = tokenizer("morgen scheint die <mask> im süden", return_tensors="pt")
    assert tokenizer.mask_token_id in batch["input_ids"]
    start = tokenizer.convert_tokens_to_ids("de_DE")
    ids = model.generate(
        **batch, decoder_start_token_id=start, num_beams=1, max_new_tokens=30
    )
    assert (
        tokenizer.decode(ids[0], skip_special_tokens=True)
        == "morgen scheint die sonne im süden"
    )


def test_the_loss_falls():
    torch.manual_seed(0)
    sentences, printed = weather(200), []
    tokenizer = module.train_tokenizer(sentences, 200, "de_DE")
    model = module.new_model(len(tokenizer), 64, 1)
    losses = module.pretrain(
        model, tokenizer, sentences, "de_DE", 30, np.random.default_rng(0), printed.append
    )
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    assert "step 30 of 30: loss" in printed[-1] and "0 s left" in printed[-1]


def test_the_files_depend_on_the_seed_alone(texts, tmp_path, capsys):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        torch.rand(1)  # the state of the caller's generator must have no effect
        standin_llm(texts, tmp_path / name, steps=3, seed=seed, **TINY)
    one, three = digest(tmp_path / "one"), digest(tmp_path / "three")
    assert one == digest(tmp_path / "two")
    assert one["model.safetensors"] != three["model.safetensors"]
    # Some sentences are held out for the evaluation.
    assert "300 sentences" not in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


def test_the_generator_of_the_caller_does_not_change(texts, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    standin_llm(texts, tmp_path / "llm", steps=1, **TINY)
    assert torch.equal(torch.rand(1), expected)


def test_infilling_masks_about_a_third_and_keeps_the_order():
    rng = np.random.default_rng(0)
    words = [[i] for i in range(8)]
    kept, masks = Counter(), 0
    for _ in range(2000):
        noised = module.infill(words, 99, rng)
        left = [w for w in noised if w != [99]]
        assert left == sorted(left)
        kept[len(left)] += 1
        masks += len(noised) - len(left)
    assert set(kept) == {5, 6}
    assert sum(k * n for k, n in kept.items()) / 2000 == pytest.approx(8 * 0.65, abs=0.05)
    assert 1 <= masks / 2000 < 1.5


def test_each_pass_contains_every_sentence_once():
    lengths = [i % 7 for i in range(100)]
    drawn = []
    for chosen in module.batches(lengths, np.random.default_rng(0)):
        drawn += chosen
        if len(drawn) >= 100:
            break
    assert sorted(drawn) == list(range(100))


def test_collate_builds_the_inputs_and_labels_of_mbart():
    batch = module.collate([[7, 99], [7]], [[7, 8, 9], [7]], code=50)
    assert batch["input_ids"].tolist() == [[7, 99, 2, 50], [7, 2, 50, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["decoder_input_ids"].tolist() == [[50, 7, 8, 9], [50, 7, 1, 1]]
    assert batch["labels"].tolist() == [[7, 8, 9, 2], [7, 2, -100, -100]]


def test_chinese_tokens_count_as_words_and_rare_characters_are_unknown():
    draw = random.Random(0)
    sentences = []
    for _ in range(50):
        sentences.append("".join(draw.choices("今明天北南方有大小雨雪云", k=9)))
    sentences.append("龘靐")
    tokenizer = module.train_tokenizer(sentences, 54, "zh_CN")
    assert len(tokenizer) <= 54
    for words in module.encode(tokenizer, sentences, "zh_CN"):
        assert set(map(len, words)) == {1}
    assert len(module.encode(tokenizer, sentences[:1], "zh_CN")[0]) > 2
    assert tokenizer.unk_token_id in tokenizer("龘靐")["input_ids"]
    assert (
        tokenizer.get_vocab() == module.train_tokenizer(sentences, 54, "zh_CN").get_vocab()
    )


def test_a_folder_with_files_raises_an_error_and_is_not_changed(texts, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine").touch()
    with pytest.raises(UserError, match="must be a new or an empty folder"):
        standin_llm(texts, used, steps=1, **TINY)
    assert [f.name for f in used.iterdir()] == ["mine"]


def test_an_empty_folder_is_accepted(texts, tmp_path):
    (tmp_path / "empty").mkdir()
    standin_llm(texts, tmp_path / "empty", steps=1, language="German", **TINY)
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_a_failed_write_leaves_no_files(texts, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MBartForConditionalGeneration, "save_pretrained", fail)
    with pytest.raises(UserError, match="No space left"):
        standin_llm(texts, tmp_path / "llm", steps=1, **TINY)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_the_error_for_a_text_file_names_the_file(texts, tmp_path):
    with pytest.raises(UserError, match=r"Cannot read nowhere\.txt: No such file"):
        standin_llm(f"{texts},nowhere.txt", tmp_path / "llm")
    (tmp_path / "latin.txt").write_bytes("süden\n".encode("latin-1") * 20)
    with pytest.raises(UserError, match="is not UTF-8"):
        standin_llm(str(tmp_path / "latin.txt"), tmp_path / "llm")
    (tmp_path / "short.txt").write_text("nur ein satz\n")
    with pytest.raises(UserError, match="at least 10 sentences"):
        standin_llm(str(tmp_path / "short.txt"), tmp_path / "llm")


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("language", "Germann", "did you mean"),
        ("d_model", 100, "multiple of 64"),
        ("vocab_size", 20, "at least 100"),
        ("steps", 0, "at least 1"),
    ],
)
def test_the_error_for_a_wrong_option_names_it(texts, tmp_path, option, value, sentence):
    with pytest.raises(UserError, match=f"{option} .*{sentence}"):
        standin_llm(texts, tmp_path / "llm", **{option: value})
