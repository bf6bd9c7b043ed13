"""Hypotheses for a whole split on all ranks, each clip exactly once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flallm_ds.batch import Batch, Hypothesis
from flallm_ds.data.device import on_device
from flallm_ds.data.loader import Loader
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.languages import tag_of
from flallm_ds.dist import World, all_reduce_sum, gather_objects
from flallm_ds.errors import Preempted, UserError
from flallm_ds.metrics import Scores, score_by_language
from flallm_ds.metrics.ceiling import Ceiling, ceiling
from flallm_ds.models.sign_translator import Candidate
from flallm_ds.training.stop import StopRequest

# The hypotheses of each clip of a batch, best first.
Generate = Callable[[Batch], list[list[Candidate]]]


@dataclass(frozen=True)
class Evaluation:
    """A loader over a split in length order, and how its batches become token ids."""

    loader: Loader
    generate: Generate
    codec: TextCodec
    world: World

    def hypotheses(
        self, report: Callable[[int, int], None] | None = None, stop: StopRequest | None = None
    ) -> list[Hypothesis]:
        """Every clip's hypothesis, sorted by key, the same list on every rank.

        Every rank makes the same number of `generate` calls. report(clips done, all clips): called after each
        step. Raises Preempted on every rank soon after any of them was asked to stop.
        """
        found: list[Hypothesis] = []
        for step, batches in enumerate(on_device(self.loader.steps(), self.world.device)):
            for batch in batches:
                for row, candidates in enumerate(self.generate(batch)):
                    if batch.real_B[row]:
                        found.append(self._hypothesis(batch, row, candidates))
            if report is not None:
                report(int(self.loader.plan.ends[step]), len(self.loader.reader.index))
            if stop is not None and all_reduce_sum([bool(stop)], self.world)[0]:
                raise Preempted("stopped while clips were scored; the same command scores them anew.")
        gathered = [h for part in gather_objects(found, self.world) for h in part]
        by_key = {h.key: h for h in gathered}
        if not len(by_key) == len(gathered) == len(self.loader.reader.index):
            raise UserError(
                f"each of {len(self.loader.reader.index)} clips must be scored once, but {len(gathered)} "
                f"hypotheses came for {len(by_key)} clips. Run shards/verify.py on the shards."
            )
        return [by_key[key] for key in sorted(by_key)]

    def _hypothesis(self, batch: Batch, row: int, candidates: Sequence[Candidate]) -> Hypothesis:
        sentences = [self.codec.decode(candidate.ids) for candidate in candidates]
        scored = [(s, c.score) for s, c in zip(sentences, candidates, strict=True) if c.score is not None]
        return Hypothesis(
            key=batch.keys[row],
            hypothesis=sentences[0],
            reference=batch.texts[row],
            corpus=batch.corpora[row],
            language=tag_of(self.codec.instruction.language) or batch.languages[row] or self.codec.language,
            nbest=tuple(scored),
        )


def scores_of(hypotheses: Sequence[Hypothesis]) -> Scores:
    """Scores of hypotheses, each by the rule of its language; of several languages the mean over them."""
    return score_by_language(
        [h.hypothesis for h in hypotheses],
        [h.reference for h in hypotheses],
        [h.language for h in hypotheses],
    )


def perfect(hypotheses: Sequence[Hypothesis], codec: TextCodec) -> list[Hypothesis]:
    """What a perfect model would say: each reference as its tokenizer writes it."""
    return [replace(h, hypothesis=codec.decode(codec.encode(h.reference)), nbest=()) for h in hypotheses]


def ceiling_of(written: Sequence[Hypothesis]) -> Ceiling:
    """The ceiling by what `perfect` made of hypotheses."""
    return ceiling(
        [h.hypothesis for h in written], [h.reference for h in written], [h.language for h in written]
    )
