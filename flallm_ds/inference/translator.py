"""Translate videos with an export folder, without DeepSpeed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import torch
from transformers import TextStreamer

from flallm_ds import export
from flallm_ds.batch import Batch, VideoBatch
from flallm_ds.data.preprocess import Preprocess
from flallm_ds.data.readers import NUM_DRAWS
from flallm_ds.data.text.languages import tag_or_name
from flallm_ds.data.text.prompt import Wording
from flallm_ds.errors import UserError
from flallm_ds.export.hub import folder_of
from flallm_ds.export.model_card import spoken
from flallm_ds.features.sequences import resample
from flallm_ds.inference.clips import Clip, ClipReader
from flallm_ds.models.encode import encode
from flallm_ds.models.llm.load import LlmOptions
from flallm_ds.models.llm.source import Bits
from flallm_ds.models.sign_translator import Beam, Candidate


@dataclass(frozen=True)
class Translation:
    """The hypotheses for a video, or for a part of it.

    nbest: pairs (sentence, score), best first; score: see `Translator.nbest`. start_s, end_s:
    of the part, in seconds. num_frames: number of frames that the model read. num_sampled:
    number of frames that it would have read without its limit, data.max_frames. is_part:
    whether it belongs to a window or a span. ids: tokens of the best hypothesis, up to the
    end of sentence if there is one.
    """

    nbest: tuple[tuple[str, float | None], ...]
    start_s: float
    end_s: float
    num_frames: int
    num_sampled: int
    is_part: bool
    ids: tuple[int, ...]

    @property
    def sentence(self) -> str:
        """The best hypothesis."""
        return self.nbest[0][0]


@dataclass(frozen=True)
class EncodedClip:
    """A clip as the language model reads it.

    features_SD: S visual tokens of width D, float32. wording: the text around them.
    language: target language, as `Translator.language` returns it.
    """

    clip: Clip
    features_SD: torch.Tensor
    wording: Wording
    language: str


@dataclass(frozen=True)
class Translator:
    """A model that translates videos.

    >>> Translator.from_pretrained(folder).translate("video.mp4")
    """

    export: export.Export
    preprocess: Preprocess
    beam: Beam
    device: torch.device

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device | None = None,
        bits: Bits | None = None,
        hub_code: bool = False,
    ) -> "Translator":
        """Load an export folder, the best export of a run folder, or USER/NAME of the hub.

        device: default: a GPU if there is one.
        bits: bits of the LLM parameters (8 and 4 need bitsandbytes). None: as in training,
        so that hypotheses equal those of the search on dev in training.
        hub_code: run code from the hub that belongs to the LLM.
        Raises UserError if there is no complete export, or if `bits` has no effect.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = folder_of(model)
        settings = export.read_settings(folder)
        if bits is not None and settings["stage"] == "visual":
            raise UserError(
                f"--bits must go with a model that has an LLM, got --bits={bits} for {folder} "
                "of stage visual. Leave it out."
            )
        if bits is None:
            bits = export.trained_bits(folder, settings)
            if bits < 16 and chosen.type != "cuda":
                bits = 32
        loaded = export.read(folder, LlmOptions(bits=bits, hub_code=hub_code))
        loaded.visual.to(chosen)
        # bitsandbytes moves quantized weights to the device itself.
        if bits > 8 or loaded.settings["stage"] == "visual":
            loaded.translator.to(chosen)
        loaded.translator.adapter.to(chosen)
        frames = loaded.settings["frames"]
        preprocess = Preprocess(frames["frame_size"], frames["crop_size"])
        return cls(loaded, preprocess, Beam(**loaded.settings["generation"]), chosen)

    def searching(
        self,
        beams: int | None = None,
        nbest: int | None = None,
        length_penalty: float | None = None,
    ) -> "Translator":
        """Return a translator with other search options.

        beams: number of beams. nbest: number of hypotheses per clip. Raises UserError if
        `nbest` is not between 1 and `beams`.
        """
        beam = self.beam
        if beams is not None:
            beam = replace(beam, num_beams=beams)
        if nbest is not None:
            beam = replace(beam, num_return=nbest)
        if length_penalty is not None:
            beam = replace(beam, length_penalty=length_penalty)
        if not 1 <= beam.num_return <= beam.num_beams:
            raise UserError(
                f"--nbest must be at least 1 and at most --beams ({beam.num_beams}), got "
                f"{beam.num_return}. Give another --nbest or --beams."
            )
        return replace(self, beam=beam)

    def translate(self, video: str | Path, language: str = "") -> str:
        """Translate a video file or a folder of frames into one sentence.

        language: target language, if the model has several. Frames are resized and sampled
        as in the evaluation of the training; of a long video, data.max_frames frames are
        used. Raises UserError if nothing can be decoded.
        """
        return self.nbest(video, language)[0][0]

    def nbest(
        self, video: str | Path, language: str = ""
    ) -> list[tuple[str, float | None]]:
        """Translate a video into `beam.num_return` pairs (sentence, score), best first.

        score: log probability / length ** length_penalty; None for a single hypothesis.
        """
        (translation,) = self.translations(video, language, windows=False)
        return list(translation.nbest)

    def translations(
        self,
        video: str | Path,
        language: str = "",
        *,
        windows: bool | None = None,
        spans: Sequence[tuple[float, float]] = (),
        idle_s: float | None = None,
    ) -> Iterator[Translation]:
        """Translate a video sentence by sentence, while it is decoded.

        windows: cut the video at pauses into windows of one sentence; False: the whole video
        is one sentence; None: cut it if it is longer than `reader.limit_s`. spans: (start,
        end) of the sentences in seconds, instead of windows. idle_s: with windows, for a
        video that is still being written: it has ended if nothing was added for this time.
        Raises UserError as `translate` does.
        """
        path = _existing(video)
        named = self.language(language)
        for clip in self.clips(path, windows=windows, spans=spans, idle_s=idle_s):
            yield self.translation(self.encoded(clip, named, path.name))

    def clips(
        self,
        video: str | Path,
        *,
        windows: bool | None = None,
        spans: Sequence[tuple[float, float]] = (),
        idle_s: float | None = None,
    ) -> Iterator[Clip]:
        """Yield the clips that `translations` translates, while the video is decoded."""
        path = _existing(video)
        if not (windows or spans or idle_s):
            clip = self.reader.read(path, limited=windows is None)
            if clip is not None:
                yield clip
                return
        if not spans:
            yield from self.reader.windows(path, idle_s)
        for start_s, end_s in spans:
            clip = self.reader.read(path, start_s, end_s)
            assert clip is not None, "only a limited reading returns no clip"
            # The times that were asked for, not those of the frames.
            yield replace(clip, start_s=start_s, end_s=end_s, is_part=True)

    def encoded(self, clip: Clip, language: str, name: str = "") -> EncodedClip:
        """Encode one clip. language: as `language()` returns it. name: of the video."""
        batch = self._batch(clip, name, language)
        features_SD, _ = self.features(batch, clip.rate)
        (wording,) = self.wordings(batch)
        return EncodedClip(clip, features_SD, wording, language)

    def translation(self, encoded: EncodedClip) -> Translation:
        """Search the hypotheses for one clip."""
        num_1 = torch.tensor([len(encoded.features_SD)])
        (candidates,) = self.export.translator.generate(
            encoded.features_SD, num_1, [encoded.wording], self.beam
        )
        nbest = []
        for candidate in candidates:
            nbest.append((self.export.codec.decode(candidate.ids), candidate.score))
        clip = encoded.clip
        return Translation(
            tuple(nbest),
            clip.start_s,
            clip.end_s,
            len(clip.frames_THWC),
            clip.num_sampled,
            clip.is_part,
            candidates[0].ids,
        )

    @cached_property
    def reader(self) -> ClipReader:
        """How videos are read: as in the evaluation of the training."""
        return ClipReader.of_settings(self.export.settings["frames"])

    def stream(self, video: str | Path, language: str = "") -> Iterator[str]:
        """Translate a video with one beam, and yield the sentence word by word."""
        named = self.language(language)  # before the video is decoded
        (clip,) = self.clips(video, windows=False)
        yield from self.stream_clip(clip, named, Path(video).name)

    def stream_clip(self, clip: Clip, language: str, name: str = "") -> Iterator[str]:
        """Translate one clip as `stream` does. language, name: as of `translation`."""
        greedy = self.searching(beams=1, nbest=1)
        batch, rate = self._batch(clip, name, language), clip.rate
        streamer = _QueueStreamer(self.export.codec)
        failure: list[BaseException] = []

        def generate() -> None:
            try:
                greedy.generate(batch, rate, streamer)
            except BaseException as error:  # noqa: BLE001 - raised below, in the calling thread
                failure.append(error)
            streamer.queue.put(None)

        # The search runs in a thread and fills the queue, while words are yielded here.
        thread = Thread(target=generate, daemon=True)
        thread.start()
        while (text := streamer.queue.get()) is not None:
            yield text
        thread.join()
        if failure:
            raise failure[0]

    def language(self, asked: str = "") -> str:
        """Return the target language `asked`, by the name that the model was trained with.

        Without `asked`, return the only target language. Raises UserError if the model was
        not trained with this language, or if none is asked for and there are several.
        """
        trained = spoken(self.export.codec)
        same = trained
        if asked:
            same = [
                language
                for language in trained
                if tag_or_name(language) == tag_or_name(asked)
            ]
        if len(same) == 1:
            return same[0]
        if not trained and not asked:
            return ""
        names = ", ".join(trained) or "none is recorded"
        raise UserError(
            f"--language must be a target language of the model ({names}), got {asked!r}."
        )

    def _batch(self, clip: Clip, key: str, language: str) -> Batch:
        """Return a batch of one clip. key: its name."""
        frames_NHWC = torch.from_numpy(clip.frames_THWC)
        corpora = self.export.settings["training"]["corpora"]
        return VideoBatch(
            frames_NHWC=frames_NHWC,
            num_frames_B=torch.tensor([len(frames_NHWC)]),
            size_B2=torch.tensor([frames_NHWC.shape[1:3]], dtype=torch.float32),
            draws_B9=torch.zeros(1, NUM_DRAWS),
            target_ids_BL=torch.full((1, 1), -100),
            keys=(key,),
            texts=("",),
            # The prompt may contain the sign language of the corpus.
            corpora=(corpora[0] if len(corpora) == 1 else "",),
            languages=(language,),
            real_B=(True,),
        )

    @torch.no_grad()
    def generate(
        self, batch: Batch, rate: float | None = None, streamer: TextStreamer | None = None
    ) -> list[list[Candidate]]:
        """Return the hypotheses of each clip of a batch, best first.

        rate: frames per second of the batch, if the LLM reads features at another rate.
        """
        features_ND, num_frames_B = self.features(batch, rate)
        return self.export.translator.generate(
            features_ND,
            num_frames_B,
            self.wordings(batch),
            self.beam,
            streamer=streamer,
        )

    @torch.no_grad()
    def features(
        self, batch: Batch, rate: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (features_ND in float32, number of features of each clip), which the
        language model reads. rate: as in `generate`."""
        autocast = bool(self.export.settings.get("visual_autocast", True))
        features_ND = encode(
            batch,
            self.export.visual,
            self.preprocess,
            train=False,
            device=self.device,
            autocast=autocast,
        )
        # Outside autocast, as in training: the features are resampled in fp32, and autocast
        # would cast the matrices of the LLM again for each token.
        return self._at_trained_rate(features_ND, batch.num_frames_B, rate)

    def _at_trained_rate(
        self, features_ND: torch.Tensor, num_frames_B: torch.Tensor, rate: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Resample features to the rate of the training. rate: as in `generate`.

        Return (features_ND, number of features of each clip).
        """
        wanted = self.export.settings["frames"]["feature_fps"]
        if wanted is None or rate is None:
            return features_ND, num_frames_B
        lengths_B = num_frames_B.to(self.device)
        features_BSD, lengths_B = resample(features_ND[None], lengths_B, rate, wanted)
        return features_BSD[0], lengths_B.cpu()

    def wordings(self, batch: Batch) -> list[Wording]:
        """Return the ids around each clip's visual tokens."""
        return list(map(self.export.codec.wording, batch.languages, batch.corpora))


def _existing(video: str | Path) -> Path:
    """Return the path. Raises UserError if it does not exist."""
    path = Path(video)
    if not path.exists():
        raise UserError(
            f"The video must be an existing file or folder of frames, got {path}. Check the "
            "path."
        )
    return path


class _QueueStreamer(TextStreamer):  # type: ignore[misc]  # transformers is untyped
    """Put complete words of a sentence into a queue while tokens are generated."""

    def __init__(self, codec: object) -> None:
        # A codec instead of a tokenizer, because TextStreamer only calls `decode`.
        super().__init__(codec, skip_prompt=True)
        self.queue: SimpleQueue[str | None] = SimpleQueue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Put text into the queue. TextStreamer calls this for complete words."""
        if text:
            self.queue.put(text)
