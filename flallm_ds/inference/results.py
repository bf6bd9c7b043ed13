"""Write and print the results of an evaluation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flallm_ds.batch import Hypothesis
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.files import replace_file
from flallm_ds.inference.analysis import Known, analyse
from flallm_ds.inference.hypothesis_file import write_hypotheses
from flallm_ds.metrics import Scores
from flallm_ds.metrics.columns import CEILING
from flallm_ds.metrics.controls import ANOTHER_SIGNER, BLIND, meaning, no_other_signer
from flallm_ds.metrics.counts import RESAMPLES
from flallm_ds.metrics.score_files import how_computed
from flallm_ds.metrics.scoring import (
    blind_scores,
    ceiling_of,
    perfect,
    scores_by,
    scores_of,
    signer_scores,
)
from flallm_ds.metrics.table import table

Stored = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The hypotheses of a model for a split, and those of its controls.

    controls: maps the name of a control to the hypotheses of its search. facts: stored in
    SPLIT.json, with the name of the split as `split`.
    """

    hypotheses: Sequence[Hypothesis]
    codec: TextCodec
    controls: Mapping[str, Sequence[Hypothesis]]
    facts: Mapping[str, Any]

    @cached_property
    def _perfect(self) -> list[Hypothesis]:
        return perfect(self.hypotheses, self.codec)

    def write(self, folder: Path, known: Known) -> None:
        """Write SPLIT.json and SPLIT.hypotheses.jsonl, and print the scores."""
        split = self.facts["split"]
        ceiling = ceiling_of(self._perfect)
        highest = {CEILING.key: ceiling.bleu4}
        model = scores_of(self.hypotheses, error_rates=True, resamples=RESAMPLES)
        scores = model.as_dict() | highest
        controls, meanings = self._score_controls(model, known)
        blind = controls.pop(BLIND).as_dict() | highest
        others: dict[str, Stored] = {}
        for name, one in controls.items():
            others[name] = one.as_dict() | highest
        parts = self._scores_of_parts()
        analysis = analyse(self.hypotheses, known, RESAMPLES)

        folder.mkdir(exist_ok=True)
        path = folder / f"{split}.hypotheses.jsonl"
        write_hypotheses(path, self.hypotheses)
        for name, clips in self.controls.items():
            write_hypotheses(folder / f"{split}.{name}.hypotheses.jsonl", clips)
        content = {
            **self.facts,
            "scores": scores,
            "blind": blind,
            "controls": others,
            "meanings": meanings,
            **parts,
            **analysis.as_dict(),
            "ceiling": {"bleu4": ceiling.bleu4, "changes": ceiling.changes},
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        replace_file(folder / f"{split}.json", text)

        rows = {"model": scores, "blind control": blind}
        for name, stored in others.items():
            rows[name.replace("_", " ")] = stored
        print(table({**rows, **parts}))
        for line in (*meanings, str(ceiling), str(analysis), *how_computed(scores)):
            if line:
                print(line)
        print(f"hypotheses: {path}")

    def _score_controls(
        self, model: Scores, known: Known
    ) -> tuple[dict[str, Scores], list[str]]:
        """Return the scores of all controls, and a sentence about each.

        BLIND and ANOTHER_SIGNER exchange hypotheses; the others were searched.
        """
        found = {BLIND: blind_scores(self.hypotheses, resamples=RESAMPLES)}
        meanings = [meaning(BLIND, model, found[BLIND])]
        exchanged = signer_scores(self.hypotheses, known.signers, resamples=RESAMPLES)
        if exchanged is None:
            meanings.append(no_other_signer(known.signers.values()))
        else:
            found[ANOTHER_SIGNER], any_signer = exchanged
            meanings.append(meaning(ANOTHER_SIGNER, any_signer, found[ANOTHER_SIGNER]))
        for name, clips in self.controls.items():
            found[name] = scores_of(clips, resamples=RESAMPLES)
            meanings.append(meaning(name, model, found[name]))
        return found, meanings

    def _scores_of_parts(self) -> dict[str, Stored]:
        """Score each corpus and each language alone, if there are several.

        Return {row of the table: scores}.
        """
        rows: dict[str, Stored] = {}
        for part in ("corpus", "language"):
            found = scores_by(self.hypotheses, part, RESAMPLES)
            highest = scores_by(self._perfect, part)
            if len(found) < 2:
                continue
            for name, alone in found.items():
                stored = alone.as_dict() | {CEILING.key: highest[name].bleu4}
                rows[f"{name} alone"] = stored
        return rows
