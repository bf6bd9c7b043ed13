"""Folders, files and URLs that cannot be loaded as a backbone."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flallm_ds.errors import UserError
from flallm_ds.models.backbones.build import build_backbone, check_reachable
from tests.helpers.backbones import CROP, refused, saved

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab12\nsize 4870\n"


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def pointer(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(POINTER) and None


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "facebook/dinov2-small"}'
    )


def only(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        if name:
            (folder / name).write_bytes(b"GGUF")

    return spoil


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(folder / "touched")))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pointer": (
        pointer("model.safetensors"),
        r"model\.safetensors: it is a git-lfs pointer",
    ),
    "pointer_config": (pointer("config.json"), r"config\.json: it is a git-lfs pointer"),
    "adapter": (
        adapter,
        r"visual\.weights must be .*, got .*, which holds an adapter .* Name facebook/dinov2-small",
    ),
    "gguf": (only("vit.gguf"), r"Cannot train .*vit\.gguf: GGUF files"),
    "empty": (
        only(""),
        r"image encoder .*: the folder is empty\. Check --visual\.weights",
    ),
    "no_config": (
        without("config.json"),
        r"must hold the config\.json of an image encoder, got model\.saf",
    ),
    "cut_off": (
        cut_off,
        r"Cannot load the weights .*model\.safetensors: the file is truncated or damaged",
    ),
    "no_weights": (without("model.safetensors"), r"weights|checkpoints"),
    "pickled": (pickled, r"more than tensors, which could run code|[Ww]eights.only"),
}


@pytest.mark.parametrize("kind", ["vit", "timm/test_vit"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_error_for_a_folder_without_a_backbone_names_the_cause(
    kind: str, fault: str, tmp_path: Path
) -> None:
    spoil, sentence = FAULTS[fault]
    weights = saved(kind, tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=sentence) as raised:
        build_backbone(weights, crop_size=CROP)
    assert "\n" not in str(raised.value) and not (tmp_path / "touched").exists()


def test_files_and_urls_that_are_not_a_backbone_raise_an_error(tmp_path: Path) -> None:
    weights = saved("vit", tmp_path)
    refused(
        r"got the file .*model\.safetensors\. Name its folder: ",
        f"{weights}/model.safetensors",
    )
    refused("GGUF", f"{weights}/vit.gguf")
    (tmp_path / "resnet.pth").write_text(POINTER)
    for name in (f"{weights}/resnet.pth", f"timm/resnet10t@{weights}/resnet.pth"):
        refused("it is a git-lfs pointer", name)
    address = "https://huggingface.co/facebook/dinov2-small/tree/main"
    for read in (check_reachable, build_backbone):
        with pytest.raises(
            UserError, match=r"got the URL https.* Give facebook/dinov2-small\."
        ):
            read(address)
