"""Evaluate the best export of a run on a split, with all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flallm_ds import dist, export
from flallm_ds.batch import Batch
from flallm_ds.config import DataConfig, RunConfig
from flallm_ds.data.index import FeatureIndex, Index
from flallm_ds.data.loader import Loader
from flallm_ds.data.mixture import open_indexes
from flallm_ds.data.readers import open_reader
from flallm_ds.data.storage.store import CacheOptions
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.languages import tag_or_name
from flallm_ds.errors import UserError
from flallm_ds.features.checks import check_evaluation, check_features
from flallm_ds.features.facts import OPTIONS
from flallm_ds.inference.analysis import Known
from flallm_ds.inference.controls import CHANGES
from flallm_ds.inference.results import Results
from flallm_ds.inference.translator import Translator
from flallm_ds.metrics.controls import BLIND
from flallm_ds.models.sign_translator import Candidate
from flallm_ds.training.build.data import decode_threads, open_index
from flallm_ds.training.hypotheses import Evaluation
from flallm_ds.training.progress import ScoringProgress
from flallm_ds.training.stop import StopRequest

CLIPS_A_BATCH = 8
# Seconds between two lines of progress.
PRINT_EVERY_S = 5.0


@dataclass(frozen=True)
class Search:
    """Options of the beam search.

    nbest: number of hypotheses per clip. length_penalty, bits: default: those of the run.
    """

    beams: int = 5
    nbest: int = 1
    length_penalty: float | None = None
    bits: Literal[32, 16, 8, 4] | None = None
    hub_code: bool = False


def evaluate_run(
    run: str,
    split: str,
    world: dist.World,
    search: Search = Search(),
    *,
    shards: tuple[str, ...] = (),
    threads: int = 0,
    data: DataConfig | None = None,
    stop: StopRequest | None = None,
    controls: Sequence[str] = (BLIND,),
) -> None:
    """Write RUN/evaluation/SPLIT.json and SPLIT.hypotheses.jsonl, and print the scores.

    run: run folder or export. shards: default: those of the training. data: replaces the
    data options of the run. controls: of `CONTROLS`. Raises Preempted after a request to
    `stop`.
    """
    folder = export.find(run)
    config_path = Path(run) / "config.json"
    if not shards and not config_path.is_file():
        raise UserError(
            f"--shards must be shard folders if {run} has no config.json, got none. Give "
            "--shards, or a run folder as --run."
        )
    if data is None:
        data = RunConfig.load(config_path).data if config_path.is_file() else DataConfig()
    threads = decode_threads(threads or data.threads, world)
    index = open_index(
        replace(data, shards=shards or data.shards, weights=()), split, world
    )
    results = Path(run) / export.EVALUATION
    lock = results / f".{split}.lock"
    with dist.locked_by_main(
        lock, f"{results / split}.json", "evaluate another --split", world
    ):
        of_export = dist.main_first(lambda: export.digest(folder), world)
        translator = Translator.from_pretrained(
            run, world.device, search.bits, search.hub_code
        )
        translator = translator.searching(search.beams, search.nbest, search.length_penalty)
        loader = split_loader(translator, index, run, world, threads)
        codec = translator.export.codec
        evaluation = Evaluation(loader, translator.generate, codec, world)
        hypotheses = evaluation.hypotheses(
            ScoringProgress(split, PRINT_EVERY_S, world.is_main), stop
        )
        searched = {}
        for control in controls:
            if control in CHANGES:
                progress = ScoringProgress(control, PRINT_EVERY_S, world.is_main)
                changed = _control(control, translator, loader, world)
                searched[control] = changed.hypotheses(progress, stop)
        facts = {
            "split": split,
            "export": of_export,
            "shards": list(shards or data.shards),
            "beams": translator.beam.num_beams,
            "length_penalty": translator.beam.length_penalty,
        }
        found = Results(hypotheses, codec, searched, facts)
        training = data if config_path.is_file() else None
        dist.main_first(lambda: found.write(results, _known(index, training, codec)), world)


def _control(
    name: str, translator: Translator, loader: Loader, world: dist.World
) -> Evaluation:
    """Return the evaluation of the same model on changed videos."""
    change = CHANGES[name]

    def generate(batch: Batch) -> list[list[Candidate]]:
        return translator.generate(change(batch))

    return Evaluation(loader, generate, translator.export.codec, world)


def _known(index: Index, training: DataConfig | None, codec: TextCodec) -> Known:
    """Return the signers of a split and the text of the training.

    training: data options of the run; None for an export, whose training text is not known.
    """
    signers = dict(zip(index.strings("key"), index.strings("signer"), strict=True))
    if training is None:
        return Known(signers)
    try:
        cache = CacheOptions.of_run(training)
        train = open_indexes(training.shards, "train", cache)
    except UserError as error:
        print(f"There are no scores by similarity to the training text: {error}")
        return Known(signers)
    languages = []
    for language in train.strings("language"):
        languages.append(
            tag_or_name(codec.instruction.language) or language or codec.language
        )
    return Known(signers, list(train.strings("text")), languages)


def split_loader(
    translator: Translator, index: Index, run: str, world: dist.World, threads: int
) -> Loader:
    """Return a loader of a split, in order of length.

    Raises UserError if the index contains features of another encoder.
    """
    frames = translator.export.settings["frames"]
    if isinstance(index, FeatureIndex):
        options = {name: frames[name] for name in OPTIONS if name != "augment"}
        encoder = translator.export.visual.fingerprint()
        check_features(index, options, encoder, f"--run={run}")
        check_evaluation(index)
    elif frames["feature_fps"] is not None:
        raise UserError(
            "--shards must be cached features if the model was trained on features at "
            f"{frames['feature_fps']:g} per second, got {index.root} with video. Write "
            "features with launch/features.py."
        )
    sampling = export.frame_sampling(translator.export.settings)
    reader = open_reader(
        index, sampling, seed=0, train=False, feature_fps=frames["feature_fps"]
    )
    plan = reader.plan(CLIPS_A_BATCH * world.size, num_micro_batches=world.size)
    return Loader(
        reader,
        plan.in_length_order(),
        translator.export.codec,
        rank=world.rank,
        world_size=world.size,
        threads=threads,
    )
