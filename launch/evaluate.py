"""Score a run on a split with all ranks: `deepspeed launch/evaluate.py --run DIR --split test`."""

import json
import time
from dataclasses import replace
from pathlib import Path

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.errors import UserError

CLIPS_A_BATCH = 8


def evaluate(
    *,
    run: str,
    split: str = "test",
    beams: int = 5,
    shards: tuple[str, ...] = (),
    threads: int = 0,
) -> None:
    """BLEU-1..4, ROUGE-L, chrF, the blind control and a file of hypotheses for the best export of a run.

    run: a run's folder or an export. shards: default those the run was trained on. The results go to
    RUN/evaluation/SPLIT.json and SPLIT.hypotheses.jsonl.
    """
    if beams < 1:
        raise UserError(f"--beams must be at least 1, but is {beams}.")
    from flallm_ds import export
    from flallm_ds.config import DataConfig, RunConfig
    from flallm_ds.data.loader import ClipReader, Loader
    from flallm_ds.data.plan import Plan
    from flallm_ds.inference import report
    from flallm_ds.inference.translator import Translator
    from flallm_ds.metrics import score
    from flallm_ds.training.build import decode_threads, open_index
    from flallm_ds.training.checkpoint import replace_file
    from flallm_ds.training.evaluate import Evaluation, texts_of
    from flallm_ds.training.progress import clock

    export.find(run)
    config_path = Path(run) / "config.json"
    if not shards and not config_path.is_file():
        raise UserError(f"--shards must be given where {run} is no run folder (it has no config.json).")
    data = RunConfig.load(config_path).data if config_path.is_file() else DataConfig()
    with dist.session() as world:
        index = open_index(replace(data, shards=shards or data.shards, weights=()), split, world)
        translator = Translator.from_pretrained(run, world.device)
        translator = replace(translator, beam=replace(translator.beam, num_beams=beams))
        sampling = export.frame_sampling(translator.export.settings)
        kept = sampling.num_kept(index.num_frames, index.arrays["fps"])
        plan = Plan(index.fingerprint, kept, index.arrays["shard"], 0, CLIPS_A_BATCH * world.size, world.size)
        reader = ClipReader(index, sampling, seed=0, train=False)
        loader = Loader(
            reader,
            plan.in_length_order(),
            translator.export.codec,
            rank=world.rank,
            world_size=world.size,
            threads=threads or decode_threads(world),
        )
        begin = time.perf_counter()

        def progress(done: int, steps: int) -> None:
            seconds = time.perf_counter() - begin
            if done == steps or done % max(1, steps // 10) == 0:
                rate, left = done * CLIPS_A_BATCH * world.size / seconds, seconds * (steps / done - 1)
                print(f"{split}: batch {done}/{steps}  {rate:.1f} clips/s  left {clock(left)}", flush=True)

        hypotheses = Evaluation(loader, translator.generate, translator.export.codec, world).hypotheses(
            progress
        )
        if world.is_main:
            language = translator.export.codec.language
            scores = score(*texts_of(hypotheses), language=language).as_dict()
            blind = report.blind_scores(hypotheses, language).as_dict()
            folder = Path(run) / "evaluation"
            folder.mkdir(exist_ok=True)
            report.write_hypotheses(folder / f"{split}.hypotheses.jsonl", hypotheses)
            by_corpus = {}
            if len(set(index.corpora)) > 1:
                parts = report.scores_by_corpus(hypotheses, language)
                by_corpus = {f"{name} alone": part.as_dict() for name, part in parts.items()}
            content = {"split": split, "beams": beams, "scores": scores, "blind": blind} | by_corpus
            replace_file(folder / f"{split}.json", json.dumps(content, indent=2) + "\n")
            print(report.table({"model": scores, "blind control": blind} | by_corpus))
            print(
                f"signature: {scores['bleu_signature']}\nhypotheses: {folder / f'{split}.hypotheses.jsonl'}"
            )


if __name__ == "__main__":
    main(evaluate)
