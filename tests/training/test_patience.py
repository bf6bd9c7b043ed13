"""train.patience: a run whose dev score does not improve ends early, and counts as
finished."""

from pathlib import Path

import pytest

from flallm_ds import dist
from flallm_ds.recipes import resolve
from flallm_ds.training import checkpoint
from flallm_ds.training.stages import run_stage
from flallm_ds.training.stop import StopRequest
from tests.helpers.launching import CONSTANT, losses, tiny_options


def test_a_run_whose_scores_are_no_better_ends_early_also_after_a_stop(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first scoring is the best; the counter of the others survives the stop."""
    run = tmp_path / "run"
    options = tiny_options(tiny_corpus, "llm", run, **CONSTANT)
    early = "ended early, after epoch 3 of 4; scorings without a better score: 2 (train.patience)"
    with dist.session() as world:

        def train(patience: int, max_steps: int | None = None) -> bool:
            limits = {"train.patience": str(patience), "train.max_steps": str(max_steps)}
            config = resolve("llm", None, options | limits)
            return run_stage(config, world, StopRequest())

        # Step 12 of 20 is within epoch 3.
        assert not train(patience=2, max_steps=12)
        assert train(patience=2)
        assert len(losses(run)) == 15
        said = capsys.readouterr().out
        assert said.count(early) == 1 and f"stage llm is finished: {run}\n" in said
        newest = checkpoint.committed(run / "checkpoints")[-1]
        assert checkpoint.read_state(newest)["position"]["scorings_since_best"] == 2

        # The same command, or one with less patience, has nothing left to train.
        for patience in (2, 1):
            assert train(patience)
            said = capsys.readouterr().out
            assert said.startswith(f"stage llm is finished: {run}\n") and early in said
        assert len(losses(run)) == 15

        # Without it, the run resumes to its last epoch.
        assert train(patience=0)
        assert len(losses(run)) == 20
        assert "ended early" not in capsys.readouterr().out
