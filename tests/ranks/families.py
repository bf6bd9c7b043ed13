"""Started by test_llm_families.py: trains each LLM of a JSON file in turn, or loads what
was exported of it.

Both write RUN/{trained.RANK,loaded}.json: of each dev clip the token ids of the best
hypothesis.
"""

import json
from collections.abc import Callable
from pathlib import Path

from flallm_ds import dist, export
from flallm_ds.batch import Batch
from flallm_ds.command import main
from flallm_ds.config import RunConfig
from flallm_ds.data.loader import Loader
from flallm_ds.data.plan import Plan
from flallm_ds.data.readers import VideoReader
from flallm_ds.inference.translator import Translator
from flallm_ds.models.sign_translator import Candidate
from flallm_ds.recipes import resolve
from flallm_ds.training.build import build_task
from flallm_ds.training.build.data import open_index
from flallm_ds.training.run_folder import open_run_folder
from flallm_ds.training.stop import StopRequest
from flallm_ds.training.trainer import Trainer

Found = dict[str, list[int]]


def runs(*, scenarios: Path | None = None, exports: Path | None = None) -> None:
    """scenarios: a list of {"stage": ..., "options": {...}}. exports: a list of run folders."""
    world = dist.start()
    for scenario in json.loads(scenarios.read_text(encoding="utf-8")) if scenarios else ():
        config = resolve(scenario["stage"], None, scenario["options"])
        folder = dist.main_first(lambda config=config: open_run_folder(config), world)
        task = build_task(config, folder, world)
        Trainer(task, folder, StopRequest()).run(saved=None)
        task.engine.module.eval()
        found = _search(task.dev_loader(), task.generate)
        (folder / f"trained.{world.rank}.json").write_text(
            json.dumps(found), encoding="utf-8"
        )
    for run in json.loads(exports.read_text(encoding="utf-8")) if exports else ():
        config = RunConfig.load(Path(run) / "config.json")
        translator = Translator.from_pretrained(run, "cpu")
        index = open_index(config.data, "dev", world)
        sampling = export.frame_sampling(translator.export.settings)
        kept = sampling.num_kept(index.num_frames, index.arrays["fps"])
        one_at_a_time = Plan(
            index.fingerprint, kept, index.arrays["shard"], 0, 1, 1
        ).in_length_order()
        reader = VideoReader(index, sampling, seed=0, train=False)
        loader = Loader(reader, one_at_a_time, translator.export.codec)
        found = _search(loader, translator.generate)
        (Path(run) / "loaded.json").write_text(json.dumps(found), encoding="utf-8")
    dist.stop()


def _search(loader: Loader, generate: Callable[[Batch], list[list[Candidate]]]) -> Found:
    """This rank's part; without a gather, so that ranks are in step by generation alone."""
    return {
        key: list(candidates[0].ids)
        for batches in loader.steps()
        for batch in batches
        for key, candidates in zip(batch.keys, generate(batch), strict=True)
    }


if __name__ == "__main__":
    main(runs)
