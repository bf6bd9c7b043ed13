import csv
import json
import shutil

import pytest
from transformers import AutoConfig

from flallm_ds.batch import Hypothesis
from flallm_ds.data.index import load_index
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import DECODER_ONLY_PROMPT, Instruction
from flallm_ds.errors import UserError
from flallm_ds.metrics.scoring import ceiling_of, perfect, scores_of
from flallm_ds.models.llm.standin_tokenizer import train_tokenizer
from flallm_ds.training.build.language import check_unknown
from tests.helpers.llms import FAMILIES, make_tiny_llm

TRAINING_TEXT = ["regen sonne wind morgen", "wolken wolken wind morgen"]
GERMAN = [
    "Am Tag scheint überall die Sonne.",
    "Morgen regnet es im Süden, im Norden weht kräftiger Wind.",
]
ENGLISH = ["Today the sun shines everywhere.", "It's raining in the south tomorrow."]
CHINESE = ["今天到处阳光明媚。", "明天南方有雨。"]
SENTENCES = [*GERMAN, *ENGLISH, *CHINESE]


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
    assert all(
        codec.tokenizer.unk_token_id not in codec.kept_ids[codec.encode(t)] for t in texts
    )


def test_trimmed_ids_are_the_full_ones_with_new_numbers(trimmed, whole):
    assert trimmed.vocab_size < whole.vocab_size == len(whole.tokenizer)
    for text in TRAINING_TEXT:
        assert trimmed.kept_ids[trimmed.encode(text)].tolist() == whole.encode(text)
    assert [trimmed.trimmed_id(full) for full in trimmed.kept_ids] == list(
        range(trimmed.vocab_size)
    )


def test_trimming_keeps_the_tokens_the_specials_and_the_language(trimmed):
    tokenizer = trimmed.tokenizer
    tokens = {
        i
        for text in TRAINING_TEXT
        for i in tokenizer(text, add_special_tokens=False)["input_ids"]
    }
    language = tokenizer.convert_tokens_to_ids("de_DE")
    assert set(trimmed.kept_ids.tolist()) == tokens | set(tokenizer.all_special_ids) | {
        language
    }


def test_the_ids_of_the_specials_are_those_of_the_tokenizer(trimmed):
    tokenizer = trimmed.tokenizer
    for trimmed_id, token in (
        (trimmed.pad_id, "<pad>"),
        (trimmed.eos_id, "</s>"),
        (trimmed.wording().start[0], "de_DE"),
    ):
        assert tokenizer.convert_ids_to_tokens(int(trimmed.kept_ids[trimmed_id])) == token


def test_unseen_words_become_unknown(trimmed, whole):
    ids = trimmed.encode("schnee wind")
    unknown = trimmed.trimmed_id(trimmed.tokenizer.unk_token_id)
    assert unknown in ids and trimmed.decode(ids).endswith("wind")
    assert whole.trimmed_id(whole.tokenizer.unk_token_id) not in whole.encode("schnee wind")


def test_a_sentence_ends_with_its_end_and_has_no_start(whole):
    ids = whole.encode("regen")
    assert (
        ids[-1] == whole.eos_id
        and ids.count(whole.eos_id) == 1
        and whole.wording().start[0] not in ids
    )
    assert whole.encode("") == [whole.eos_id]


def test_what_follows_the_end_is_not_decoded(trimmed):
    ids = trimmed.encode("regen sonne")
    assert trimmed.decode([*ids, *ids, trimmed.pad_id]) == "regen sonne"
    assert trimmed.decode([trimmed.eos_id, *ids]) == ""
    assert trimmed.decode([]) == ""


def test_an_untrimmed_codec_decodes_what_it_encodes(whole):
    for text in [*TRAINING_TEXT, "schnee nebel"]:
        assert whole.decode(whole.encode(text)) == text


def test_a_saved_codec_is_the_same_when_loaded(trimmed, tmp_path):
    trimmed.save(tmp_path)
    loaded = TextCodec.load(tmp_path)
    assert loaded.kept_ids.tolist() == trimmed.kept_ids.tolist()
    assert (loaded.instruction, loaded.pad_id, loaded.eos_id) == (
        trimmed.instruction, trimmed.pad_id, trimmed.eos_id,
    )  # fmt: skip
    assert loaded.wording() == trimmed.wording()
    text = "regen schnee wolken"
    assert loaded.encode(text) == trimmed.encode(text)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is nothing at"):
        TextCodec.for_training_text(
            str(tmp_path / "none"), Instruction(language="de_DE"), TRAINING_TEXT, trim=True
        )


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="the folder is empty"):
        TextCodec.for_training_text(
            str(tmp_path), Instruction(language="de_DE"), TRAINING_TEXT, trim=True
        )


def test_a_folder_without_a_vocabulary_is_refused(trimmed, tmp_path):
    trimmed.save(tmp_path)
    (tmp_path / "vocabulary.json").unlink()
    with pytest.raises(UserError, match=r"vocabulary\.json"):
        TextCodec.load(tmp_path)


# --- every family, by a tiny one in the layout of its repository


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    texts = [*SENTENCES, *TRAINING_TEXT, DECODER_ONLY_PROMPT, "German English"]
    root = tmp_path_factory.mktemp("llms")
    return {family: make_tiny_llm(family, root / family, texts) for family in FAMILIES}


def codec_of(folder, texts=SENTENCES, trim=True, **instruction):
    config = AutoConfig.from_pretrained(folder)
    known = {
        "decoder_only": not config.is_encoder_decoder,
        "start_token": getattr(config, "decoder_start_token_id", None),
        "rows": config.vocab_size,
        "languages": ("de",),
    }
    return TextCodec.for_training_text(
        str(folder), Instruction(**known | instruction), texts, trim
    )


def tokens_of(codec, ids):
    return tuple(codec.tokenizer.convert_ids_to_tokens(codec.kept_ids[list(ids)].tolist()))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_back_the_text_that_it_was_trimmed_to(folders, family):
    whole, trimmed = (codec_of(folders[family], trim=trim) for trim in (False, True))
    assert trimmed.vocab_size < whole.vocab_size <= whole.instruction.rows
    for text in SENTENCES:
        ids = trimmed.encode(text)
        assert trimmed.decode(ids) == text and whole.decode(whole.encode(text)) == text
        assert trimmed.kept_ids[ids].tolist() == whole.kept_ids[whole.encode(text)].tolist()
    assert [trimmed.trimmed_id(full) for full in trimmed.kept_ids] == list(
        range(trimmed.vocab_size)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trim", [False, True])
def test_text_that_was_never_seen_is_spelled_or_unknown_and_ends_once(
    folders, family, trim, tmp_path
):
    codec = codec_of(folders[family], GERMAN, trim)
    text = "Schnee Ωß 😀 </s> <|endoftext|> <image_soft_token> Sonne."
    ids = codec.encode(text)
    assert min(ids) >= 0 and max(ids) < codec.vocab_size
    assert ids.count(codec.eos_id) == 1 and ids[-1] == codec.eos_id
    assert "Sonne" in codec.decode(ids)
    if codec.tokenizer.unk_token_id is None:
        spelled = codec.decode(codec.encode("Schnee Ωß 😀"))
        assert spelled == "Schnee Ωß 😀"
    codec.save(tmp_path)
    loaded = TextCodec.load(tmp_path)
    assert loaded.encode(text) == ids and loaded.wording("de") == codec.wording("de")


# Dense in punctuation, of full and of half width.
PUNCTUATED = {
    "de": [
        "„Morgen“, sagt sie, „regnet es – vielleicht!“",  # codespell:ignore sie
        "Am Tag (im Norden): 5…8 °C; nachts, Ende Mai, -2 °C?",  # codespell:ignore ende
        "Nein, nein, nein! Die Sonne? Die scheint – wie immer – im Süden.",
    ],
    "en": [
        "“It's raining,” she said – “isn't it?”",
        "Lows (north): 40…45 °F; highs, in the south, 60 °F!",
        "No, no, no! The sun? It shines – as ever – in the south.",
    ],
    "zh": [
        "“明天，”她说，“会下雨吗？”",
        "北方（今天）：５度；南方：１５度！明天呢？",
        "不，不，不！太阳呢？在南方，一如既往……",
    ],
}
# Made under NFKC, which has neither the full width nor the ellipsis; all others spell in
# bytes.
NORMALISING = [
    "mbart",
    "mbart50",
    "m2m100",
    "nllb",
    "t5",
    "flan_t5",
    "mt5",
    "madlad",
    "xglm",
]


@pytest.fixture(scope="module")
def punctuated(tmp_path_factory):
    texts = [text for part in PUNCTUATED.values() for text in part] + [DECODER_ONLY_PROMPT]
    root = tmp_path_factory.mktemp("punctuated")
    return {family: make_tiny_llm(family, root / family, texts) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perfect_model_scores_as_high_as_the_ceiling_of_its_tokenizer(punctuated, family):
    """A perfect model's best hypothesis of a clip is the clip's target, padded like
    others of a batch."""
    texts = [text for part in PUNCTUATED.values() for text in part]
    prompt = "{video}" if not FAMILIES[family].decoder_only else "{language}: {video}"
    for trim in (False, True):
        codec = codec_of(punctuated[family], texts, trim, prompt=prompt)
        found = {}
        for language, references in PUNCTUATED.items():
            targets = [codec.encode(text) for text in references]
            longest = max(map(len, targets))
            said = [
                Hypothesis(
                    str(n),
                    codec.decode([*ids, *[codec.pad_id] * (longest - len(ids))]),
                    text,
                    "",
                    language,
                )
                for n, (ids, text) in enumerate(zip(targets, references, strict=True))
            ]
            ceiling = ceiling_of(perfect(said, codec))
            assert scores_of(said).bleu4 == ceiling.bleu4
            found[language] = ceiling
        print(
            f"{family} {'trimmed' if trim else 'whole'}:",
            {k: f"{c.bleu4:.2f} {c}" for k, c in found.items()},
        )
        assert codec.unknown_tokens(texts).num_unknown == 0
        if family in NORMALISING:
            assert 0 < found["zh"].bleu4 < 80 and ("，", ",", 5) in found["zh"].changes
            assert {old for c in found.values() for old, _, _ in c.changes} <= set(
                "，？！：；（）５１…°"
            )
        else:
            assert all(c.bleu4 == pytest.approx(100) and not str(c) for c in found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_spaces_ahead_of_punctuation_come_back(folders, family, tmp_path):
    """Corpora are tokenized text, and ROUGE-L compares what stands between spaces."""
    folder = shutil.copytree(folders[family], tmp_path / "llm")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"clean_up_tokenization_spaces": True}
    settings |= {
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    codec = codec_of(folder, [*SENTENCES, "Morgen regnet es ."])
    assert codec.decode(codec.encode("Morgen regnet es .")) == "Morgen regnet es ."


STARTS = {
    "mbart": ("de_DE",),
    "mbart50": ("</s>", "de_DE"),
    "m2m100": ("</s>", "__de__"),
    "nllb": ("</s>", "deu_Latn"),
    "t5": ("<pad>",),
    "flan_t5": ("<pad>",),
    "mt5": ("<pad>",),
    "madlad": ("<unk>",),
}


@pytest.mark.parametrize(
    "family", [f for f, entry in FAMILIES.items() if not entry.decoder_only]
)
@pytest.mark.parametrize("trim", [False, True])
def test_an_encoder_decoder_reads_the_language_token_in_its_place(folders, family, trim):
    codec = codec_of(folders[family], trim=trim)
    wording = codec.wording("de")
    assert tokens_of(codec, wording.start) == STARTS[family]
    assert tokens_of(codec, wording.before) == (("<2de>",) if family == "madlad" else ())
    assert wording.after == ()


@pytest.mark.parametrize("family", ["mbart", "mbart50", "m2m100", "nllb", "madlad"])
def test_each_clip_has_its_own_target_language(folders, family):
    codec = codec_of(folders[family], languages=("de", "en", "zh"))
    found = [
        tokens_of(codec, (*w.before, *w.start))[-1 if family != "madlad" else 0]
        for w in map(codec.wording, ("de", "en", "zh"))
    ]
    tokens = {
        "mbart": ["de_DE", "en_XX", "zh_CN"],
        "mbart50": ["de_DE", "en_XX", "zh_CN"],
        "m2m100": ["__de__", "__en__", "__zh__"],
        "nllb": ["deu_Latn", "eng_Latn", "zho_Hans"],
        "madlad": ["<2de>", "<2en>", "<2zh>"],
    }
    assert found == tokens[family]


@pytest.mark.parametrize("family", ["madlad", "mt5", "qwen3"])
def test_a_clip_in_a_new_language_is_refused(folders, family):
    """MADLAD's token for it was not kept, and Light-T has no id for it."""
    codec = codec_of(folders[family], languages=("de", "en"), prompt="{language}: {video}")
    with pytest.raises(UserError, match=r"one of the training text \(de, en\), got 'zh'"):
        codec.for_light_t().wording("zh")


@pytest.mark.parametrize(
    "language", ["de", "German", "de_DE", "deu_Latn", "<2de>", "__de__", "de-AT"]
)
@pytest.mark.parametrize("family", ["mbart", "nllb", "m2m100", "madlad"])
def test_a_language_may_have_any_of_its_names(folders, family, language):
    codec = codec_of(folders[family], language=language)
    # llm.language is for all clips
    assert codec.wording("en") == codec_of(folders[family]).wording("de")


TOKENS_OF = {
    "mbart": {"Chinese": "zh_CN", "cmn": "zh_CN", "zh-Hans": "zh_CN", "ja": "ja_XX", "Burmese": "my_MM"},
    "mbart50": {"iw": "he_IL", "he": "he_IL", "tl": "tl_XX", "pt-BR": "pt_XX", "mk": "mk_MK"},
    "m2m100": {"bg": "__bg__", "is": "__is__", "iw": "__he__", "nb": "__no__", "cmn": "__zh__",
               "nso": "__ns__"},
    "nllb": {"bg": "bul_Cyrl", "nb": "nob_Latn", "nn": "nno_Latn", "zh-Hant": "zho_Hant", "zh-TW": "zho_Hant",
             "yue": "yue_Hant", "ajp_Arab": "ajp_Arab", "Persian": "pes_Arab", "ps": "pbt_Arab"},
    "madlad": {"bg": "<2bg>", "Icelandic": "<2is>", "iw": "<2he>", "zh-Hant": "<2zh_Hant>", "fr": "<2fr>",
               "<2fr_CA>": "<2fr_CA>", "Norwegian Bokmål": "<2no>"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "language"), [(f, name) for f, names in TOKENS_OF.items() for name in names]
)
def test_every_language_of_a_tokenizer_is_accepted(folders, family, language):
    of_all, of_each = (
        codec_of(folders[family], language=language),
        codec_of(folders[family], languages=(language,)),
    )
    assert TOKENS_OF[family][language] in tokens_of(
        of_all, (*of_all.wording().before, *of_all.wording().start)
    )
    if language != "<2fr_CA>":  # its tag is fr, without the region
        assert of_each.wording() == of_all.wording()


@pytest.mark.parametrize("family", ["mbart", "mbart50", "m2m100"])
@pytest.mark.parametrize("language", ["zh-Hant", "zh_TW", "Traditional Chinese"])
def test_a_script_without_a_token_is_refused_with_a_remedy(folders, family, language):
    for given in ({"language": language}, {"languages": (language,)}):
        with pytest.raises(
            UserError,
            match=r"\(Simplified\) only, in another script\. Give --llm\.language=zh ",
        ):
            codec_of(folders[family], **given)
    accepted = codec_of(folders[family], language="zh", languages=(language,))
    assert accepted.wording("zh-Hant") == codec_of(
        folders[family], languages=("zh",)
    ).wording("zh")


def test_a_prompt_names_the_script(folders):
    codec = codec_of(folders["qwen3"], trim=False, languages=("zh", "zh-Hant", "bg"))
    found = [
        codec.tokenizer.decode(codec.wording(tag).before) for tag in ("zh-Hant", "zh", "bg")
    ]
    assert found == [
        "Translate this Chinese Sign Language video into Traditional Chinese:",
        "Translate this Chinese Sign Language video into Chinese:",
        "Translate this Bulgarian Sign Language video into Bulgarian:",
    ]


@pytest.mark.parametrize("family", ["t5", "qwen3"])
def test_a_misspelled_language_is_refused_if_the_prompt_does_not_name_it(folders, family):
    with pytest.raises(
        UserError, match="must be a known language, got 'Germann': did you mean German"
    ):
        codec_of(folders[family], language="Germann", prompt="Translate: {video}")


@pytest.mark.parametrize("family", ["mbart", "madlad", "mt5"])
def test_a_vocabulary_of_an_earlier_version_with_other_names_of_languages_is_read(
    folders, family, tmp_path
):
    codec = codec_of(folders[family], languages=("de", "en"), prompt="{language}: {video}")
    codec.save(tmp_path)
    path = tmp_path / "vocabulary.json"
    content = json.loads(path.read_text()) | {"languages": ["de_DE", "English"]}
    path.write_text(json.dumps(content))
    loaded = TextCodec.load(tmp_path)
    assert loaded.instruction.languages == ("de", "en")
    for tag in ("de", "en"):
        assert loaded.wording(tag) == codec.wording(tag)
        assert loaded.for_light_t().wording(tag) == codec.for_light_t().wording(tag)


@pytest.mark.parametrize(
    "family", [f for f, entry in FAMILIES.items() if entry.decoder_only]
)
def test_the_prompt_of_a_decoder_only_llm_begins_as_its_tokenizer_does(folders, family):
    codec = codec_of(folders[family], trim=False)
    before, after = "Translate this German Sign Language video into German:", "\n"
    wording = codec.wording("de")
    assert wording.start == ()
    assert list(wording.before) == codec.tokenizer(before)["input_ids"]
    assert (
        list(wording.after) == codec.tokenizer(after, add_special_tokens=False)["input_ids"]
    )
    first = {
        "xglm": "</s>",
        "llama": "<s>",
        "mistral": "<s>",
        "llama3": "<|begin_of_text|>",
    }
    first |= {
        "gemma2": "<bos>",
        "gemma3": "<bos>",
        "cohere": "<BOS_TOKEN>",
        "cohere2": "<BOS_TOKEN>",
    }
    begun = tokens_of(codec, wording.before)[0]
    assert (
        begun == first[family]
        if family in first
        else begun not in codec.tokenizer.all_special_tokens
    )
    trimmed = codec_of(folders[family])
    assert tokens_of(trimmed, trimmed.wording("de").before) == tokens_of(
        codec, wording.before
    )


def test_a_prompt_names_language_and_sign_language_of_the_clip(folders):
    codec = codec_of(
        folders["qwen3"],
        trim=False,
        languages=("de", "en"),
        prompt="{sign_language} to {language}: {video} ",
        sign_languages={"bsl_news": "British Sign Language"},
    )
    asked = [("de", ""), ("en", ""), ("en", "bsl_news")]
    found = [codec.tokenizer.decode(codec.wording(*of).before) for of in asked]
    assert found == [
        "German Sign Language to German: ",
        "American Sign Language to English: ",
        "British Sign Language to English: ",
    ]


@pytest.mark.parametrize("family", ["t5", "mt5", "flan_t5"])
def test_t5_reads_a_prompt_if_one_is_given(folders, family):
    codec = codec_of(
        folders[family], trim=False, languages=("de", "en"), prompt="to {language}: {video}"
    )
    wordings = [codec.wording(language) for language in ("de", "en")]
    assert [codec.tokenizer.decode(w.before) for w in wordings] == [
        "to German:",
        "to English:",
    ]
    assert {tokens_of(codec, w.start) for w in wordings} == {("<pad>",)}


@pytest.mark.parametrize(
    ("family", "near"),
    [
        ("mbart", "de_DE"),
        ("mbart50", "de_DE"),
        ("nllb", "deu_Latn"),
        ("m2m100", "__de__"),
        ("madlad", "<2de>"),
    ],
)
def test_an_unknown_language_is_refused_with_near_ones(folders, family, near):
    wrong = near.replace("de", "dee")
    with pytest.raises(
        UserError,
        match=rf"^llm\.language must be .*'{wrong}'.*: did you mean .*{near}.*\?$",
    ):
        codec_of(folders[family], language=wrong)


def test_a_prompt_for_an_unknown_language_is_refused_with_near_ones(folders):
    with pytest.raises(
        UserError,
        match=r"a language with a language for .* 'Germann': did you mean German.*prompt",
    ):
        codec_of(folders["qwen3"], language="Germann")


def test_a_language_that_comes_from_the_shards_is_not_blamed_on_an_option(folders):
    codec = codec_of(folders["qwen3"], languages=("de",))
    with pytest.raises(
        UserError, match=r"^The language of each clip must be a language with a language"
    ):
        codec.wording("Germann")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_llm_folder_without_a_tokenizer_is_refused(folders, tmp_path, family):
    """Without files, transformers makes a tokenizer with special tokens only."""
    for path in folders[family].iterdir():
        if path.name.endswith(("config.json", ".safetensors")) and not path.name.startswith(
            "tokenizer"
        ):
            shutil.copy(path, tmp_path)
    with pytest.raises(
        UserError, match=r"Cannot load the tokenizer of .*: .*\. Give a folder"
    ) as caught:
        codec_of(tmp_path)
    assert "NoneType" not in str(caught.value)  # of a TypeError of transformers


def test_a_misspelled_language_is_refused_for_an_llm_without_a_language_token(folders):
    with pytest.raises(
        UserError, match="must be a known language, got 'Germann': did you mean German"
    ):
        codec_of(folders["mt5"], language="Germann")
    assert codec_of(folders["mt5"], language="German").language == "German"


@pytest.mark.parametrize("family", ["t5", "mt5", "flan_t5"])
def test_two_languages_are_refused_without_language_tokens_or_prompt(folders, family):
    with pytest.raises(
        UserError,
        match=r"target languages \(de, en\), got ''\. Give a --llm\.prompt with \{language\}",
    ):
        codec_of(folders[family], languages=("de", "en"))


def test_two_languages_are_refused_if_the_prompt_names_none(folders):
    with pytest.raises(UserError, match=r"llm\.prompt must contain \{language\}"):
        codec_of(folders["llama"], languages=("de", "en"), prompt="Translate: {video}")
    assert (
        codec_of(folders["llama"], languages=("de",), prompt="Translate: {video}")
        .wording()
        .before
    )


@pytest.mark.parametrize(
    "prompt", ["no video", "{video} {video}", "{video} {speaker}", "{video", "{video} {}"]
)
def test_a_prompt_with_wrong_fields_is_refused(folders, prompt):
    with pytest.raises(UserError, match=r"llm\.prompt must"):
        codec_of(folders["llama"], prompt=prompt)


def test_a_decoder_only_llm_uses_the_prompt_and_no_language_tokens(folders, tmp_path):
    texts = ["de_DE en_XX it_IT " * 9, *SENTENCES]
    folder = make_tiny_llm("bloom", tmp_path, texts)
    codec = codec_of(folder, languages=("ru",))
    assert "de_DE" in codec.tokenizer.get_vocab() and "en_XX" in str(
        codec.tokenizer.get_vocab()
    )
    assert codec.wording("ru").before


def test_mbart_is_trimmed_to_specials_languages_and_the_tokens_of_the_text(
    shared_data, tmp_path
):
    """Test the rule of FLa-LLM's section 4.1 with real weather reports."""
    table = shared_data / "phoenix14t" / "full-test-split.PHOENIX-2014-T.test.corpus.csv"
    with table.open(encoding="utf-8", newline="") as file:
        reports = [row["translation"] for row in csv.DictReader(file, delimiter="|")]
    general = (shared_data / "text_cc0" / "de.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer([*reports, *general[:4000]], 4000, "de_DE")
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.for_model("mbart").save_pretrained(tmp_path)
    codec = TextCodec.for_training_text(
        str(tmp_path), Instruction(language="de_DE"), reports, trim=True
    )
    used = {
        i
        for report in reports
        for i in tokenizer(report, add_special_tokens=False)["input_ids"]
    }
    languages = [
        i
        for token, i in tokenizer.get_vocab().items()
        if token[2:3] == "_" and len(token) == 5
    ]
    assert len(reports) == 642 and len(languages) == 25
    specials = {0, 1, 2, 3, tokenizer.mask_token_id}
    assert set(codec.kept_ids.tolist()) == specials | set(languages) | used
    assert 900 < codec.vocab_size < len(tokenizer) // 2
    assert [codec.decode(codec.encode(report)) for report in reports] == [
        " ".join(r.split()) for r in reports
    ]


# --- unknown tokens


@pytest.mark.parametrize("trim", [False, True])
def test_unknown_characters_are_counted_as_in_the_texts(folders, trim):
    texts = [*GERMAN, "Sonne ﹝heute﹞ ☀！", "Sonne ☀ ☀", "Sonne ☀ ☀"]
    codec = codec_of(folders["mbart"], texts, trim)
    unknown = codec.unknown_tokens(texts)
    ids = [i for text in texts for i in codec.encode(text)]
    assert (
        unknown.num_tokens == len(ids)
        and unknown.num_unknown == ids.count(codec._unknown_id) > 0
    )
    assert unknown.characters[0] == ("☀", 5)
    # without normalisation
    assert {"﹝", "﹞", "！"} <= dict(unknown.characters).keys()
    assert "'☀' (5)" in str(unknown) and str(unknown).startswith(
        f"{100 * unknown.num_unknown / len(ids):.2g} %"
    )


@pytest.mark.parametrize("family", ["mbart", "m2m100", "nllb", "t5", "madlad", "xglm"])
def test_unknown_tokens_are_found_in_every_family(folders, family):
    codec = codec_of(folders[family])
    assert codec.unknown_tokens(SENTENCES).num_unknown == 0
    unknown = codec.unknown_tokens([*SENTENCES, "Sonne Ω", "Sonne Ω </s>"])
    assert dict(unknown.characters)["Ω"] == 2 and unknown.num_unknown >= 2


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "bloom"])
def test_a_vocabulary_with_bytes_has_no_unknown_tokens(folders, family):
    texts = ["Sonne Ω ☀！", *SENTENCES]
    assert codec_of(folders[family], texts).unknown_tokens(texts).num_unknown == 0


def test_a_few_unknown_tokens_are_printed_and_many_are_refused(folders, capsys):
    codec = codec_of(folders["mbart"], GERMAN)
    check_unknown(codec, GERMAN, "an/llm")
    assert capsys.readouterr().out == ""
    length = len(codec.encode(GERMAN[0]))
    many = [GERMAN[0]] * (1000 // length + 1)
    check_unknown(codec, [*many, "Ω"], "an/llm")
    found = capsys.readouterr().out
    assert found.startswith("unknown to the tokenizer of an/llm: 0.0") and found.endswith(
        "because of 'Ω' (1).\n"
    )
    with pytest.raises(
        UserError, match=r"at most 0\.1 % .* got an/llm with .* because of 'Ω' \(9\)\. Use"
    ):
        check_unknown(codec, [*many, *["Ω"] * 9], "an/llm")
