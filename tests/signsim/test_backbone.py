"""Tests of the small pretrained backbone, which is loaded in the same way as hub models."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flallm_ds.errors import UserError
from flallm_ds.models.backbones.build import build_backbone
from flallm_ds.signsim.backbone import backbone
from flallm_ds.signsim.pretraining_data import (
    FRAMES_A_TASK,
    NUM_TARGETS,
    random_poses,
    render,
    targets,
)


def test_the_folder_is_loaded_like_a_hub_model(tmp_path: Path) -> None:
    backbone(out=tmp_path / "backbone", width=8, frames=250, epochs=1)
    weights = str(tmp_path / "backbone")
    loaded = build_backbone(weights, width=8, pretrained=True, crop_size=60).state_dict()
    random = build_backbone(weights, width=8, pretrained=False, crop_size=60).state_dict()
    differing = [name for name in loaded if not torch.equal(random[name], loaded[name])]
    assert differing
    with pytest.raises(UserError, match=r"visual\.width"):
        build_backbone(weights, width=16)


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="--out must be a new or empty folder, got"):
        backbone(out=tmp_path)


@pytest.mark.parametrize("options", [{"frames": 10}, {"epochs": 0}, {"width": 0}])
def test_an_option_below_its_minimum_is_refused(
    tmp_path: Path, options: dict[str, int]
) -> None:
    (option,) = options
    with pytest.raises(UserError, match=f"--{option} must be at least"):
        backbone(out=tmp_path / "backbone", **options)


def test_frames_and_targets_are_reproducible_and_have_the_right_shapes() -> None:
    frames, wanted = render(1, seed=0)
    assert frames.shape == (FRAMES_A_TASK, 64, 64, 3)
    assert wanted.shape == (FRAMES_A_TASK, NUM_TARGETS)
    again, wanted_again = render(1, seed=0)
    assert np.array_equal(frames, again) and np.array_equal(wanted, wanted_again)


def test_targets_are_ordered_by_side_of_the_frame_not_by_dominant_hand() -> None:
    poses = random_poses(5, np.random.default_rng(0))
    right, left = targets(poses, left_handed=False), targets(poses, left_handed=True)
    half = NUM_TARGETS // 2
    assert np.allclose(
        right[:, 1:half], left[:, half + 1 :]
    )  # the same hand, in the other half of the frame
    assert np.allclose(right[:, 0], -left[:, half])
