"""Generate the hypotheses of a split on all ranks, exactly one for each clip."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

from flallm_ds.batch import Batch, Hypothesis
from flallm_ds.data.device import on_device
from flallm_ds.data.loader import Loader
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.languages import tag_or_name
from flallm_ds.dist import World, all_reduce_sum, gather_objects
from flallm_ds.errors import Preempted, UserError
from flallm_ds.models.sign_translator import Candidate
from flallm_ds.training.intake import Intake
from flallm_ds.training.stop import StopRequest

# Returns the hypotheses of each clip of a batch, best first.
Generate = Callable[[Batch], list[list[Candidate]]]


@dataclass(frozen=True)
class Evaluation:
    """Generates hypotheses for the batches of a loader.

    loader: reads a split, longest clip first. generate: returns the token ids of a batch.
    codec: decodes them.
    """

    loader: Loader
    generate: Generate
    codec: TextCodec
    world: World

    def hypotheses(
        self,
        report: Callable[[int, int], None] | None = None,
        stop: StopRequest | None = None,
    ) -> list[Hypothesis]:
        """Return the hypotheses of all clips, sorted by key; the same list on every rank.

        Every rank must call it, and calls `generate` equally often. report: called after
        each step with the number of clips done and of all clips. Raises Preempted on every
        rank before the next step if a rank was asked to stop, and SharedRankError if a rank
        cannot load its clips.
        """
        found: list[Hypothesis] = []
        steps = on_device(self.loader.steps(), self.world.device)
        intake = Intake(self.loader.broken, self.world)
        for step in range(len(self.loader)):
            batches, _ = intake.take(steps)
            # A signal or a broken clip may concern one rank only, but all must stop before
            # the same step.
            values = [intake.has_news, stop is not None and bool(stop)]
            news, stops = all_reduce_sum(values, self.world)
            if news:
                intake.share_news()
            if stops:
                raise Preempted(
                    "stopped while clips were scored; the same command scores them again."
                )
            for batch in batches:
                for row, candidates in enumerate(self.generate(batch)):
                    # Clips repeated as padding keep the number of calls equal on all ranks.
                    if batch.real_B[row]:
                        found.append(self._hypothesis(batch, row, candidates))
            if report is not None:
                report(int(self.loader.plan.ends[step]), len(self.loader.reader.index))

        # Join the parts of all ranks. A clip that is missing or comes twice would change
        # the scores without an error.
        by_rank = gather_objects(found, self.world)
        gathered: list[Hypothesis] = sorted(chain(*by_rank), key=attrgetter("key"))
        num_keys = len(set(map(attrgetter("key"), gathered)))
        num_clips = len(self.loader.reader.index)
        if not num_keys == len(gathered) == num_clips:
            raise UserError(
                f"Each of {num_clips} clips must be scored once, got {len(gathered)} "
                f"hypotheses for {num_keys} clips. Run shards/verify.py on the shards."
            )
        return gathered

    def _hypothesis(
        self, batch: Batch, row: int, candidates: Sequence[Candidate]
    ) -> Hypothesis:
        """Return the hypothesis of a clip, with all candidates that have a score."""
        # A search that returns one candidate gives no score: its n-best list is empty.
        sentences: list[str] = []
        scored: list[tuple[str, float]] = []
        for candidate in candidates:
            sentence = self.codec.decode(candidate.ids)
            sentences.append(sentence)
            if candidate.score is not None:
                scored.append((sentence, candidate.score))
        # llm.language sets one language for all clips; otherwise each clip has its own.
        language = tag_or_name(self.codec.instruction.language) or batch.languages[row]
        return Hypothesis(
            key=batch.keys[row],
            hypothesis=sentences[0],
            reference=batch.texts[row],
            corpus=batch.corpora[row],
            language=language or self.codec.language,
            nbest=tuple(scored),
        )
