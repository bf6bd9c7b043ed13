import pytest

from flallm_ds.data.index import load_index
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Instruction


@pytest.fixture(scope="session")
def codec(tiny_corpus):
    """The tokenizer of the tiny LLM, trimmed to the training text of the tiny corpus."""
    texts = load_index(tiny_corpus / "shards", "train").strings("text")
    german = Instruction(language="de_DE")
    return TextCodec.for_training_text(str(tiny_corpus / "llm"), german, texts, trim=True)
