"""Score a run on a split with all ranks: `deepspeed launch/evaluate.py --run DIR --split test`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if __name__ == "__main__":  # the imports below take seconds
    from flallm_ds.command import answer_signals

    answer_signals(importing=True)

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.config import DataConfig
from flallm_ds.errors import UserError
from flallm_ds.training.stop import StopRequest

if TYPE_CHECKING:
    from flallm_ds.contracts import Hypothesis
    from flallm_ds.data.index import Index
    from flallm_ds.data.text import TextCodec
    from flallm_ds.inference.translator import Translator

CLIPS_A_BATCH = 8
PRINT_EVERY_S = 5.0


def evaluate(
    stop: StopRequest | None = None,
    data: DataConfig | None = None,
    /,
    *,
    run: str,
    split: str = "test",
    beams: int = 5,
    nbest: int = 1,
    length_penalty: float | None = None,
    shards: tuple[str, ...] = (),
    threads: int = 0,
    bits: Literal[32, 16, 8, 4] | None = None,
    hub_code: bool = False,
) -> None:
    """BLEU-1..4, ROUGE-L, chrF, the blind control and a file of hypotheses for the best export of a run.

    run: a run's folder or an export. nbest: as many hypotheses of each clip, with scores, into the file;
    the best one counts. length_penalty: default the run's; above 0 for longer sentences. shards: default
    those the run was trained on. bits: of the LLM's weights; default those of its training. hub_code: run
    code that comes with the LLM. The results go to RUN/evaluation/SPLIT.json and SPLIT.hypotheses.jsonl.
    """
    # For callers in Python: raises Preempted after a request to `stop`; `data` in place of the run's options.
    if beams < 1:
        raise UserError(f"--beams must be at least 1, but is {beams}.")
    from flallm_ds import export
    from flallm_ds.config import RunConfig
    from flallm_ds.inference.translator import Translator
    from flallm_ds.lock import locked_by_main
    from flallm_ds.training.build import decode_threads, open_index
    from flallm_ds.training.evaluate import Evaluation
    from flallm_ds.training.progress import ScoringProgress

    folder = export.find(run)
    config_path = Path(run) / "config.json"
    if not shards and not config_path.is_file():
        raise UserError(f"--shards must be given where {run} is no run folder (it has no config.json).")
    if data is None:
        data = RunConfig.load(config_path).data if config_path.is_file() else DataConfig()
    threads = threads or data.threads
    with dist.session() as world:
        index = open_index(replace(data, shards=shards or data.shards, weights=()), split, world)
        results = Path(run) / export.EVALUATION
        lock = results / f".{split}.lock"
        with locked_by_main(lock, f"{results / split}.json", "evaluate another --split", world):
            of_export = dist.main_first(lambda: export.digest(folder), world)
            translator = Translator.from_pretrained(run, world.device, bits, hub_code)
            translator = translator.searching(beams, nbest, length_penalty)
            loader = split_loader(translator, index, run, world, threads or decode_threads(world))
            codec = translator.export.codec
            evaluation = Evaluation(loader, translator.generate, codec, world)
            hypotheses = evaluation.hypotheses(ScoringProgress(split, PRINT_EVERY_S, world.is_main), stop)
            search = {
                "split": split,
                "export": of_export,
                "shards": list(shards or data.shards),
                "beams": translator.beam.num_beams,
                "length_penalty": translator.beam.length_penalty,
            }
            dist.main_first(lambda: write_results(results, search, hypotheses, codec), world)


def split_loader(translator: "Translator", index: "Index", run: str, world: dist.World, threads: int) -> Any:
    """A loader over the split in length order. Raises UserError for features of another encoder."""
    from flallm_ds import export
    from flallm_ds.data.feature_facts import OPTIONS
    from flallm_ds.data.loader import ClipReader, Loader, num_places
    from flallm_ds.data.plan import Plan
    from flallm_ds.training.cached_features import check_evaluation, check_features

    frames = translator.export.settings["frames"]
    if index.features:
        options = {name: frames[name] for name in OPTIONS if name != "augment"}
        check_features(index, options, translator.export.visual.fingerprint(), f"--run={run}")
        check_evaluation(index)
    elif frames["feature_fps"] is not None:
        raise UserError(
            f"--shards must be features where a model was trained on them at {frames['feature_fps']:g} a "
            f"second, but {index.root} is video. Make them with launch/features.py."
        )
    sampling = export.frame_sampling(translator.export.settings)
    return Loader(
        ClipReader(index, sampling, seed=0, train=False, feature_fps=frames["feature_fps"]),
        Plan(
            index.fingerprint,
            num_places(index, sampling, frames["feature_fps"]),
            index.arrays["shard"],
            seed=0,
            batch_clips=CLIPS_A_BATCH * world.size,
            slices=world.size,
        ).in_length_order(),
        translator.export.codec,
        rank=world.rank,
        world_size=world.size,
        threads=threads,
    )


def write_results(
    folder: Path, search: dict[str, Any], hypotheses: Sequence["Hypothesis"], codec: "TextCodec"
) -> None:
    """SPLIT.json, SPLIT.hypotheses.jsonl, and the table on the screen."""
    from flallm_ds.inference import report
    from flallm_ds.training.checkpoint import replace_file
    from flallm_ds.training.evaluate import ceiling_of, perfect, scores_of

    written = perfect(hypotheses, codec)
    ceiling = ceiling_of(written)
    rows = {"scores": scores_of(hypotheses).as_dict(), "blind": report.blind_scores(hypotheses).as_dict()}
    for row in rows.values():
        row["ceiling_bleu4"] = ceiling.bleu4
    for part in ("corpus", "language"):
        found, highest = report.scores_by(hypotheses, part), report.scores_by(written, part)
        for name, scores in found.items() if len(found) > 1 else ():
            rows[f"{name} alone"] = scores.as_dict() | {"ceiling_bleu4": highest[name].bleu4}
    folder.mkdir(exist_ok=True)
    split = search["split"]
    path = folder / f"{split}.hypotheses.jsonl"
    report.write_hypotheses(path, hypotheses)
    content = {**search, **rows, "ceiling": {"bleu4": ceiling.bleu4, "changes": ceiling.changes}}
    replace_file(folder / f"{split}.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    names = {"scores": "model", "blind": "blind control"}
    print(report.table({names.get(name, name): row for name, row in rows.items()}))
    if str(ceiling):
        print(ceiling)
    print(f"signature: {rows['scores']['bleu_signature']}\nhypotheses: {path}")


if __name__ == "__main__":
    main(evaluate)
