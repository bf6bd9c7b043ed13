"""Started by test_generation.py: trains runs in turn and searches dev, weights gathered
once or by the token.

Each writes RUN/found.RANK.json: {"auto" | "never": {key: [[sentence, score], ...]}}; of a
run that is refused, its sentence into RUN.RANK.txt.
"""

import json
from pathlib import Path

from flallm_ds import dist
from flallm_ds.batch import Batch
from flallm_ds.command import main
from flallm_ds.errors import UserError
from flallm_ds.models.sign_translator import Beam, Candidate
from flallm_ds.recipes import resolve
from flallm_ds.training.build import build_task
from flallm_ds.training.hypotheses import Evaluation
from flallm_ds.training.run_folder import run_folder
from flallm_ds.training.stop import StopRequest
from flallm_ds.training.task import Task
from flallm_ds.training.trainer import Trainer


def runs(*, scenarios: Path) -> None:
    """scenarios: a list of {"stage": ..., "options": {...}}."""
    world = dist.start()
    for scenario in json.loads(scenarios.read_text(encoding="utf-8")):
        config = resolve(scenario["stage"], None, scenario["options"])
        try:
            with run_folder(config, world) as folder:
                task = build_task(config, folder, world)
        except UserError as error:
            Path(f"{config.run}.{world.rank}.txt").write_text(str(error), encoding="utf-8")
            continue
        Trainer(task, folder, StopRequest()).run(saved=None)
        if scenario["stage"] != "visual":
            found = {how: search(task, how) for how in ("auto", "never", "auto")}
            (folder / f"found.{world.rank}.json").write_text(
                json.dumps(found), encoding="utf-8"
            )
    dist.stop()


def search(task: Task, how: str) -> dict[str, list[list[object]]]:
    """Three hypotheses of each dev clip with their scores; every rank has those of all."""
    beam = Beam(num_beams=5, max_new_tokens=12, num_return=3)
    engine = task.engine
    engine.module.eval()

    def generate(batch: Batch) -> list[list[Candidate]]:
        assert len(batch.keys) == 1
        inputs = task.inputs(batch, train=False)
        wordings = task.wordings(batch)
        return engine.module.generate(
            inputs, batch.num_frames_B, wordings, beam, engine.searches_in_step
        )

    with engine.gathered(how):
        assert engine.searches_in_step == (how == "never")
        hypotheses = Evaluation(
            task.dev_loader(), generate, task.codec, task.world
        ).hypotheses()
    assert engine.searches_in_step
    assert all(p.numel() == 0 for p in engine.module.parameters()), (
        "all is partitioned again"
    )
    return {h.key: [list(pair) for pair in h.nbest] for h in hypotheses}


main(runs)
