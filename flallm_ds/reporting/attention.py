"""The heat maps of a report: attention over time of clips that a run was evaluated on."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from flallm_ds import dist
from flallm_ds.data.loader import Loader
from flallm_ds.data.mixture import open_indexes
from flallm_ds.data.plan import EpochPlan
from flallm_ds.data.readers import ClipReader
from flallm_ds.data.storage.store import CacheOptions
from flallm_ds.errors import UserError, file_problem
from flallm_ds.inference.evaluate import split_loader
from flallm_ds.inference.heat_map import HeatMap, heat_map_of
from flallm_ds.inference.translator import Translator
from flallm_ds.models.pretrained import first_line
from flallm_ds.reporting.clips import shards_of
from flallm_ds.reporting.runs import Run

_Found = TypeVar("_Found")


def heat_maps(
    run: Run, split: str, keys: Sequence[str], hub_code: bool = False
) -> dict[str, HeatMap | str]:
    """Return {key: heat map, or why there is none} of clips that a run was evaluated on."""
    evaluation = run.evaluations.get(split)
    if evaluation is None or not keys:
        return {}
    hypothesis_of = {clip.key: clip.hypothesis for clip in evaluation.hypotheses}
    wanted = [key for key in keys if key in hypothesis_of]
    opened = or_reason(partial(_open, run, split, hub_code))
    if isinstance(opened, str):
        return dict.fromkeys(wanted, opened)
    translator, reader = opened
    names = reader.index.strings("key")
    row_of = {names[row]: row for row in range(len(reader.index))}
    maps: dict[str, HeatMap | str] = {}
    for key in wanted:
        if key not in row_of:
            maps[key] = f"The shards in {reader.index.root} have no clip {key}."
            continue
        # A clip that cannot be read leaves the others their heat maps.
        find = partial(_heat_map, translator, reader, row_of[key], hypothesis_of[key])
        maps[key] = or_reason(find)
    return maps


def or_reason(find: Callable[[], _Found]) -> _Found | str:
    """Return what a function finds, or a sentence that says why it cannot."""
    try:
        return find()
    except UserError as error:
        reason = str(error)
    # Errors of transformers about a hub have no number, but lines of advice.
    except OSError as error:
        reason = file_problem(error) if error.errno else first_line(error)
    # Remote code may raise anything while a model is loaded.
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {first_line(error)}"
    return f"The attention cannot be shown: {reason}"


def _open(run: Run, split: str, hub_code: bool) -> tuple[Translator, ClipReader]:
    """Load the model of a run, and open its clips to be read as the evaluation did."""
    translator = Translator.from_pretrained(run.folder, hub_code=hub_code)
    world = dist.World(rank=0, size=1, local_rank=0, local_size=1)
    index = open_indexes(shards_of(run, split), split, CacheOptions.of_run(run.config.data))
    loader = split_loader(translator, index, str(run.folder), world, threads=1)
    return translator, loader.reader


def _heat_map(
    translator: Translator, reader: ClipReader, row: int, hypothesis: str
) -> HeatMap | str:
    """Return the heat map of the hypothesis for the clip in a row of the index."""
    plan = EpochPlan(
        order=np.array([row], np.int64),
        passes=np.zeros(1, np.int64),
        ends=np.ones(1, np.int64),
        num_kept=reader.num_places(),
        num_micro_batches=1,
    )
    (batch,) = Loader(reader, plan)
    features_ND, _ = translator.features(batch)
    (wording,) = translator.wordings(batch)
    ids = translator.export.codec.encode(hypothesis)
    (language,) = batch.languages
    return heat_map_of(translator.export, features_ND, wording, ids, language)
