"""Tests that an export loads to the same hypotheses and that damage is reported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flallm_ds import export
from flallm_ds.config import RunConfig
from flallm_ds.data.index import Index, load_index
from flallm_ds.data.storage.store import LocalStore
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Instruction
from flallm_ds.errors import UserError
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.models.light_translator import build_light_translator
from flallm_ds.models.llm.load import embedding_scale, load_llm
from flallm_ds.models.llm.trim import trim_llm
from flallm_ds.models.sign_translator import Beam, Candidate, SignTranslator
from flallm_ds.models.visual_encoder import VisualEncoder
from flallm_ds.models.weights import named_state

BEAM = Beam(
    num_beams=3, max_new_tokens=8, num_return=2
)  # n-best scores are compared as well


@pytest.fixture(scope="module")
def codec(tiny_corpus):
    texts = load_index(tiny_corpus / "shards", "train").strings("text")
    german = Instruction(language="de_DE")
    return TextCodec.for_training_text(str(tiny_corpus / "llm"), german, texts, trim=True)


def clips() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, 32, 32, generator=generator), torch.tensor([7, 5])


def targets(codec: TextCodec) -> torch.Tensor:
    return torch.tensor(
        [codec.encode("regen wind sonne"), codec.encode("nebel wolken schnee")]
    )


def settings_of(stage: str) -> dict:
    config = RunConfig(stage=stage, run="r", visual_run="v").with_overrides(
        {
            "visual.width": "4",
            "visual.temporal_kernel": "5",
            "data.frame_size": "40",
            "data.crop_size": "32",
        }
        | {"visual.chunk_frames": "7"}
    )
    arrays = {
        "height": np.array([79]),
        "width": np.array([64]),
        "num_frames": np.array([20]),
        "fps": np.array([12.5]),
    }
    index = Index(
        LocalStore("shards"), "toy", "train", "ab", (), arrays, options={"fps": 12.5}
    )
    return export.settings_of(config, index, scores={"dev": {"bleu4": 1.5}})


def used(model: SignTranslator) -> SignTranslator:
    """Change weights and statistics of a model, so that they differ from a new one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.01)
        for name, buffer in model.named_buffers():
            if "running_var" in name:
                buffer.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def stage_1(codec, tmp_path_factory):
    """Return (folder of an export of stage visual; hypotheses and loss before writing)."""
    torch.manual_seed(0)
    visual = FeatureExtractor(VisualEncoder(width=4, temporal_kernel=5))
    light_t = build_light_translator("tiny", codec, dropout=0.1)
    model = used(SignTranslator(visual, Adapter(32, 256), light_t, codec))
    folder = tmp_path_factory.mktemp("run") / "best"
    folder.mkdir()
    export.write(folder, settings_of("visual"), named_state(model), light_t, codec)
    with torch.no_grad():
        wordings = [codec.for_light_t().wording()] * len(clips()[1])
        said = model.generate(*clips(), wordings, BEAM)
        return folder, said, model(*clips(), wordings, targets(codec)).item()


def translate(loaded: export.Export) -> list[list[Candidate]]:
    pixels_NCHW, num_frames_B = clips()
    wordings = [loaded.codec.wording()] * len(num_frames_B)
    with torch.no_grad():
        features_ND = loaded.visual(pixels_NCHW, num_frames_B)
        return loaded.translator.generate(features_ND, num_frames_B, wordings, BEAM)


def test_an_export_of_stage_visual_has_the_outputs_of_the_model(stage_1):
    folder, ids, loss = stage_1
    loaded = export.read(folder)
    assert translate(loaded) == ids
    pixels_NCHW, num_frames_B = clips()
    with torch.no_grad():
        features_ND = loaded.visual(pixels_NCHW, num_frames_B)
        wordings = [loaded.codec.wording()] * len(num_frames_B)
        assert (
            loaded.translator(
                features_ND, num_frames_B, wordings, targets(loaded.codec)
            ).item()
            == loss
        )


def test_a_loaded_export_is_in_eval_mode_without_gradients(stage_1):
    loaded = export.read(stage_1[0])
    for module in (loaded.visual, loaded.translator):
        assert not any(m.training for m in module.modules())
        assert not any(p.requires_grad for p in module.parameters())


def test_the_settings_contain_frame_sampling_and_search(stage_1):
    settings = export.read(stage_1[0]).settings
    assert settings["stage"] == "visual" and settings["visual"] == {
        "width": 4,
        "temporal_kernel": 5,
    }
    assert settings["frames"] == {
        "short_side": 64, "fps": 12.5, "keep_every": 4, "target_fps": None, "max_frames": 512,
        "cap": "uniform", "frame_size": 40, "crop_size": 32, "feature_fps": None, "chunk_frames": 7,
        "longest_s": 1.6,
    }  # fmt: skip
    assert Beam(**settings["generation"]) == Beam(5, 1.0, 100) and settings["scores"] == {
        "dev": {"bleu4": 1.5}
    }


def test_stage_llm_loads_the_visual_encoder_unchanged(stage_1):
    visual = export.read_visual(stage_1[0])
    assert visual.chunk_frames == 7
    stored = load_file(stage_1[0] / "visual_encoder.safetensors")
    assert {n: t.sum().item() for n, t in visual.state_dict().items()} == {
        n: t.sum().item() for n, t in stored.items()
    }


def test_an_export_of_stage_llm_has_the_outputs_of_the_model(tiny_corpus, codec, tmp_path):
    torch.manual_seed(0)
    trim_llm(str(tiny_corpus / "llm"), codec, tmp_path / "trimmed")
    llm = load_llm(str(tmp_path / "trimmed"))
    visual = FeatureExtractor(VisualEncoder(width=4, temporal_kernel=5)).eval()
    model = used(SignTranslator(None, Adapter(32, 64, embedding_scale(llm)), llm, codec))
    pixels_NCHW, num_frames_B = clips()
    with torch.no_grad():
        wordings = [codec.wording()] * len(num_frames_B)
        before = model.generate(
            visual(pixels_NCHW, num_frames_B), num_frames_B, wordings, BEAM
        )
    state = [*named_state(model), *((f"visual.{n}", t) for n, t in named_state(visual))]
    (tmp_path / "best").mkdir()
    export.write(tmp_path / "best", settings_of("llm"), state, llm, codec)
    loaded = export.read(tmp_path / "best")
    assert translate(loaded) == before
    # This LLM multiplies its token embeddings by sqrt(64).
    assert loaded.translator.adapter.scale == 8.0


# --- finding


def test_an_export_is_found_by_export_folder_or_run_folder(stage_1):
    folder = stage_1[0]
    assert export.find(folder) == export.find(str(folder.parent)) == folder


def test_a_folder_without_an_export_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"Cannot find an export in .*: neither flallm\.json nor best"
    ):
        export.find(tmp_path)


# --- damage


@pytest.fixture
def copied(stage_1, tmp_path) -> Path:
    return Path(shutil.copytree(stage_1[0], tmp_path / "export"))


FILES = [
    "visual_encoder.safetensors",
    "adapter.safetensors",
    "language_model/model.safetensors",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "another file"])
def test_the_error_names_a_damaged_weights_file(copied, name, damage):
    path = copied / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=f"{path.name}: it is not a complete safetensors"):
        export.read(copied)


@pytest.mark.parametrize("name", FILES)
def test_the_error_names_a_weights_file_without_a_tensor(copied, name):
    """Else a part of the model would silently keep random weights."""
    state = load_file(copied / name)
    state.pop(
        {FILES[0]: "temporal.conv.weight", FILES[1]: "2.bias", FILES[2]: "lm_head.weight"}[
            name
        ]
    )
    save_file(state, copied / name, metadata={"format": "pt"})
    with pytest.raises(UserError, match=Path(name).name):
        export.read(copied)


def test_the_error_names_a_weights_file_of_another_width(copied):
    settings = json.loads((copied / "flallm.json").read_text())
    settings["visual"]["width"] = 8
    (copied / "flallm.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"visual_encoder\.safetensors"):
        export.read(copied)


@pytest.mark.parametrize(
    "name", ["config.json", "vocabulary.json", "tokenizer_config.json"]
)
def test_a_missing_file_of_the_language_model_is_an_error(copied, name):
    (copied / "language_model" / name).unlink()
    if name == "tokenizer_config.json":
        (copied / "language_model" / "tokenizer.json").unlink()
    with pytest.raises(UserError):
        export.read(copied)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "it is not JSON"),
        ("[1]", "got None"),
        ('{"format": "flallm_ds export 1"}', "or train again"),
    ],
)
def test_settings_of_another_format_are_refused(copied, content, reason):
    (copied / "flallm.json").write_text(content)
    with pytest.raises(UserError, match=reason):
        export.read(copied)


@pytest.mark.parametrize(
    ("section", "name", "value", "said"),
    [
        (None, "frames", [], r"frames in .*flallm\.json must be an object, got \[\]\."),
        (None, "stage", 1, r"stage in .*flallm\.json must be text, got 1\."),
        (
            "frames",
            "crop_size",
            "32",
            r"frames\.crop_size in .* must be a whole number, got '32'\.",
        ),
        (
            "frames",
            "crop_size",
            True,
            r"frames\.crop_size in .* must be a whole number, got True\.",
        ),
        ("frames", "keep_every", 0, r"frames\.keep_every in .* must be above 0, got 0\."),
        ("frames", "max_frames", 2**40, r"frames\.max_frames in .* must be above 0"),
        (
            "generation",
            "num_beams",
            None,
            r"generation\.num_beams in .* must be a whole number, got None\.",
        ),
        (
            "visual",
            "temporal_kernel",
            None,
            "Cannot build a visual encoder from the stored settings",
        ),
    ],
)
def test_settings_of_other_types_are_refused(copied, section, name, value, said):
    settings = json.loads((copied / "flallm.json").read_text())
    (settings if section is None else settings[section])[name] = value
    (copied / "flallm.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=said):
        export.read(copied)


@pytest.mark.parametrize(
    "content", ["[]", "[" * 10**5, '{"kept_ids": "a"}', '{"kept_ids": [-1]}', "{}"]
)
def test_an_invalid_vocabulary_file_is_refused(copied, content):
    (copied / "language_model" / "vocabulary.json").write_text(content)
    with pytest.raises(UserError, match=r"Cannot read the vocabulary .*vocabulary\.json"):
        export.read(copied)
