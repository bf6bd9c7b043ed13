"""`flallm average`: the mean of checkpoints of a real run, and of made ones."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flallm_ds import dist, export
from flallm_ds.cli.average import average
from flallm_ds.cli.checkpoints import export as export_checkpoint
from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError
from flallm_ds.recipes import resolve
from flallm_ds.training import averaging, checkpoint
from flallm_ds.training.averaging import MeanReader
from flallm_ds.training.fragment_files import FragmentReader, write_fragments
from flallm_ds.training.fragments import BUFFER, MASTER, Key
from flallm_ds.training.stages import run_stage
from flallm_ds.training.stop import StopRequest
from tests.helpers.launching import tiny_options

# Of a checkpoint, in two fragments that end within a chunk.
SIZES = ((0, 3), (3, 10))


def reader_of(folder: Path, values: torch.Tensor, count: int) -> FragmentReader:
    """Return the reader of a checkpoint with 10 weights and a counter."""
    folder.mkdir()
    fragments = []
    for begin, end in SIZES:
        fragments.append((Key(MASTER, "weight", begin, end), values[begin:end]))
    fragments.append((Key(BUFFER, "counter", 0, 1), torch.tensor([count])))
    return FragmentReader(folder, write_fragments(folder, 0, fragments))


def test_the_mean_is_read_in_chunks_across_fragments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averaging, "CHUNK_ELEMENTS", 4)
    values = [torch.randn(10) for _ in range(3)]
    readers = []
    for number, one in enumerate(values):
        readers.append(reader_of(tmp_path / str(number), one, 5 * number))
    reader = MeanReader(readers)
    out, count = torch.zeros(7), torch.zeros(1, dtype=torch.int64)
    reader.read(Key(MASTER, "weight", 2, 9), out)
    reader.read(Key(BUFFER, "counter", 0, 1), count)
    assert torch.equal(out, torch.stack(values).double().mean(0).float()[2:9])
    assert count.item() == 10  # of the newest


def test_the_mean_of_equal_values_has_the_same_bits(tmp_path: Path) -> None:
    """Also of three, whose sum has no exact third in fp32, and of zeros with a sign."""
    values = torch.randn(10)
    values[3:5] = torch.tensor([0.0, -0.0])
    readers = [reader_of(tmp_path / str(number), values, 1) for number in range(3)]
    out = torch.zeros(10)
    MeanReader(readers).read(Key(MASTER, "weight", 0, 10), out)
    assert torch.equal(out.view(torch.int32), values.view(torch.int32))


@pytest.fixture(scope="module")
def run(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 5 and 10, and of step 11 a copy of step 10."""
    run = tmp_path_factory.mktemp("averaging") / "run"
    more = {"light_t.size": "tiny", "eval.every_epochs": 1, "train.keep_checkpoints": 3}
    options = tiny_options(tiny_corpus, "visual", run, **more)
    with dist.session() as world:
        assert run_stage(resolve("visual", None, options), world, StopRequest())
    newest = run / "checkpoints" / "step-00000010"
    copy = Path(shutil.copytree(newest, newest.with_name("step-00000011")))
    manifest = checkpoint.read_manifest(newest)
    checkpoint._write_manifest(copy, copy.name, manifest.files, manifest.state)
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.relative_to(folder)} {name}"] = tensor
    return found


def test_the_average_of_a_checkpoint_and_its_copy_is_the_export_of_the_checkpoint(
    run: Path, tmp_path: Path
) -> None:
    average(run, out=tmp_path / "average", last=2)
    export_checkpoint(run, out=tmp_path / "single", step=10)
    files = sorted((tmp_path / "single").rglob("*.safetensors"))
    assert files
    for file in files:
        copy = tmp_path / "average" / file.relative_to(tmp_path / "single")
        assert copy.read_bytes() == file.read_bytes()


def test_the_average_of_two_checkpoints_is_the_mean_of_their_exports_and_is_scored(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "average"
    average(run, out=out, best=2, split="dev")
    for step in (5, 10):
        export_checkpoint(run, out=tmp_path / str(step), step=step)
    found, first, second = map(weights, (out, tmp_path / "5", tmp_path / "10"))
    assert found.keys() == first.keys() and any("running_var" in name for name in found)
    for name, tensor in found.items():
        if tensor.is_floating_point():
            mean = (first[name].double() + second[name].double()) / 2
            assert torch.equal(tensor, mean.to(tensor.dtype)), name
        else:
            assert torch.equal(tensor, second[name]), name
    assert any(not torch.equal(first[name], second[name]) for name in first)
    settings = export.read_settings(out)
    assert settings["training"]["averaged_steps"] == [5, 10] and settings["scores"] == {}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "2 epochs. The weights are the mean of those after steps 5 and 10.\n" in card
    assert (out / "evaluation" / "dev.json").is_file()
    assert "averaging the checkpoints of steps 5, 10\n" in capsys.readouterr().out


def test_without_a_split_the_command_of_the_scoring_is_printed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "average"
    average(run, out=out, steps=(10, 5))
    (shards,) = RunConfig.load(run / "config.json").data.shards
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"next: flallm evaluate --run={out} --split=dev --shards={shards}"


def test_a_damaged_checkpoint_is_named(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    file = copy / "checkpoints" / "step-00000005" / "rank-00000.000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step-00000005: .* was changed\. Give another "):
        average(copy, out=tmp_path / "out", steps=(5, 10))
    assert not (tmp_path / "out").exists()
