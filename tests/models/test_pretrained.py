"""Wrong values of --llm.name: each raises an error that names the cause, without delay."""

import json
import os
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetModel

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Instruction
from flallm_ds.data.text.tokenizer import load_tokenizer
from flallm_ds.errors import UserError
from flallm_ds.models.llm.load import load_llm
from flallm_ds.models.llm.source import check_llm, llm_config
from tests.helpers.llms import make_tiny_llm

TEXTS = ["regen am abend", "morgen sonne und wind"]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab12\nsize 4870\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llm("t5", tmp_path_factory.mktemp("original") / "llm", TEXTS)


@pytest.fixture
def llm(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "llm"))


def only(llm: Path, *names: str) -> None:
    for path in llm.iterdir():
        if path.name not in names:
            path.unlink()


def adapter(llm: Path) -> None:
    only(llm, "tokenizer.json", "tokenizer_config.json")
    content = {"base_model_name_or_path": "google/mt5-base", "peft_type": "LORA"}
    (llm / "adapter_config.json").write_text(json.dumps(content))
    (llm / "adapter_model.safetensors").write_bytes(b"weights")


def adapter_next_to_a_config(llm: Path) -> None:
    (llm / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "google/mt5-base"})
    )


def gguf(llm: Path) -> None:
    only(llm)
    (llm / "mt5.Q4_K_M.gguf").write_bytes(b"GGUF")


def pointer(name: str) -> Callable[[Path], None]:
    return lambda llm: (llm / name).write_text(POINTER) and None


def hub_cache(llm: Path) -> None:
    content = {path.name: path.read_bytes() for path in llm.iterdir()}
    only(llm)
    snapshot = llm / "models--google--mt5-base" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (llm / "models--google--mt5-base" / "refs").mkdir()
    for name, held in content.items():
        (snapshot / name).write_bytes(held)


def in_a_folder_below(llm: Path) -> None:
    (llm / "checkpoint-100").mkdir()
    for path in llm.iterdir():
        if path.is_file():
            path.rename(llm / "checkpoint-100" / path.name)


def without_weights(llm: Path) -> None:
    (llm / "model.safetensors").unlink()


def of_tensorflow(llm: Path) -> None:
    without_weights(llm)
    (llm / "tf_model.h5").write_bytes(b"weights")


def cut_off(llm: Path) -> None:
    path = llm / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def not_safetensors(llm: Path) -> None:
    (llm / "model.safetensors").write_text("<!DOCTYPE html>")


def without_a_part(llm: Path) -> None:
    tensors = load_file(llm / "model.safetensors")
    (llm / "model.safetensors").unlink()
    first = dict(list(tensors.items())[:3])
    save_file(first, llm / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    places = dict.fromkeys(tensors, "model-00002-of-00002.safetensors")
    places |= dict.fromkeys(first, "model-00001-of-00002.safetensors")
    (llm / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )


def broken_index(llm: Path) -> None:
    without_weights(llm)
    (llm / "model.safetensors.index.json").write_text("{}")


def nothing(llm: Path) -> None:
    only(llm)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "adapter": (
        adapter,
        r"holds an adapter .* of google/mt5-base\. Name google/mt5-base, or merge",
    ),
    "adapter_and_config": (
        adapter_next_to_a_config,
        r"holds an adapter .* of google/mt5-base\.",
    ),
    "gguf": (
        gguf,
        r"Cannot train .*mt5\.Q4_K_M\.gguf: GGUF files .* Name the model that it was made from",
    ),
    "pointer_weights": (
        pointer("model.safetensors"),
        r"model\.safetensors: it is a git-lfs pointer",
    ),
    "pointer_tokenizer": (
        pointer("tokenizer.json"),
        r"tokenizer\.json: it is a git-lfs pointer",
    ),
    "pointer_vocabulary": (
        pointer("spiece.model"),
        r"spiece\.model: it is a git-lfs pointer .*git lfs pull",
    ),
    "pointer_config": (pointer("config.json"), r"config\.json: it is a git-lfs pointer"),
    "below": (
        in_a_folder_below,
        r"must hold the config\.json .* Did you mean .*/llm/checkpoint-100\?",
    ),
    "no_weights": (
        without_weights,
        r"must hold weights \(model\.safetensors or .*\), got none\.",
    ),
    "tensorflow": (
        of_tensorflow,
        r"must hold weights .*, got only tf_model\.h5, which is of another format",
    ),
    "cut_off": (
        cut_off,
        r"Cannot load the weights .*model\.safetensors: the file is truncated or damaged",
    ),
    "a_page": (
        not_safetensors,
        r"Cannot load the weights .*model\.safetensors: the file is truncated or damaged",
    ),
    "a_part": (
        without_a_part,
        r"Cannot read .*model-00002-of-00002\.safetensors: there is no such file",
    ),
    "index": (broken_index, r"index\.json: it is not an index of weights"),
    "empty": (nothing, r"Cannot load the LLM .*: the folder is empty\. Check --llm\.name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_error_for_a_folder_without_an_llm_names_the_cause(
    llm: Path, fault: str
) -> None:
    spoil, sentence = FAULTS[fault]
    spoil(llm)
    for read in (check_llm, load_llm):
        with pytest.raises(UserError, match=sentence) as raised:
            read(str(llm))
        assert "\n" not in str(raised.value)


def test_the_error_for_a_folder_of_the_hubs_cache_names_the_hub_id(
    llm: Path,
) -> None:
    hub_cache(llm)
    with pytest.raises(
        UserError, match=r"hub's cache: give google/mt5-base, or the folder .*/0123abcd\."
    ):
        check_llm(str(llm / "models--google--mt5-base"))
    with pytest.raises(UserError, match=r"Did you mean .*/0123abcd\?"):
        check_llm(str(llm))
    check_llm(str(llm / "models--google--mt5-base" / "snapshots" / "0123abcd"))


def test_a_folder_with_a_tokenizer_alone_raises_an_error(llm: Path) -> None:
    only(llm, "tokenizer.json", "tokenizer_config.json")
    with pytest.raises(
        UserError, match=r"must hold the config\.json of an LLM, got tokenizer\.json, tok"
    ):
        check_llm(str(llm))


def test_weights_may_be_missing_if_they_are_not_used(llm: Path) -> None:
    without_weights(llm)
    check_llm(str(llm), pretrained=False)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "model.safetensors",
            r"got the file .*model\.safetensors\. Name its folder: .*llm\.",
        ),
        ("mt5.gguf", r"Cannot train .*mt5\.gguf: GGUF files"),
    ],
)
def test_a_file_instead_of_a_folder_raises_an_error(
    llm: Path, name: str, sentence: str
) -> None:
    (llm / "mt5.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=sentence):
        check_llm(str(llm / name))


@pytest.mark.parametrize("name", ["/no/such/folder", "./llm", "a/b/c", "~/llm"])
def test_a_path_that_does_not_exist_raises_an_error(name: str) -> None:
    with pytest.raises(UserError, match=r"there is nothing at"):
        check_llm(name)


def test_the_error_for_a_url_names_the_hub_id() -> None:
    with pytest.raises(UserError, match=r"Give google/mt5-base\."):
        check_llm("https://huggingface.co/google/mt5-base/tree/main")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub address without a server, and an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.file_download.ENDPOINT", "http://127.0.0.1:9", raising=False
    )
    monkeypatch.setattr(
        "huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9", raising=False
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("name", ["t5-small", "gpt2", "google/mt5-base"])
def test_a_hub_id_without_a_network_raises_an_error_without_delay(
    no_network: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """transformers retries for 23 seconds, for the config and again for the tokenizer."""

    def repeat(seconds: float) -> None:
        raise AssertionError("a request is repeated")

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", repeat)
    for read in (
        llm_config,
        load_tokenizer,
        lambda name: TextCodec.for_training_text(name, Instruction(), TEXTS, True),
    ):
        with pytest.raises(
            UserError, match=rf"got {name}: .* and the hub cannot be reached .*standin_llm"
        ):
            read(name)


def test_the_error_in_offline_mode_names_the_variable(
    no_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"got t5-small: .* HF_HUB_OFFLINE is set\. Name a folder"
    ):
        check_llm("t5-small")


CACHED = """
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Instruction
from flallm_ds.models.backbones.build import build_backbone, check_reachable
from flallm_ds.models.llm.load import load_llm
from flallm_ds.models.llm.source import check_llm
check_llm("org/llm")
TextCodec.for_training_text("org/llm", Instruction(), ["regen am abend"], True)
load_llm("org/llm")
check_reachable("org/encoder")
build_backbone("org/encoder", 64, True, 32)
"""


def test_cached_models_are_read_without_a_hub_and_without_retries(
    llm: Path, tmp_path: Path
) -> None:
    """On a compute node without a network the libraries would retry for each file."""
    encoder = tmp_path / "encoder"
    ResNetModel(
        ResNetConfig(embedding_size=64, hidden_sizes=[8, 16], depths=[1, 1])
    ).save_pretrained(encoder)
    for name, folder in (("llm", llm), ("encoder", encoder)):
        cached = tmp_path / "home" / "hub" / f"models--org--{name}"
        shutil.copytree(folder, cached / "snapshots" / "0123abcd")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0123abcd")
    asked: list[str] = []

    class HangsUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.request.recv(10_000).decode().split(" HTTP")[0])

    with socketserver.TCPServer(("127.0.0.1", 0), HangsUp) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        environment = dict(os.environ)
        environment.pop("HF_HUB_OFFLINE", None)
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}"}
        environment |= {"HF_HOME": str(tmp_path / "home")}
        subprocess.run(
            [sys.executable, "-c", CACHED], env=environment, check=True, timeout=300
        )
        server.shutdown()
    assert [one for one in asked if "/org/" in one] == [
        "HEAD /org/llm/resolve/main/config.json"
    ]
