"""An export folder as an object that turns videos into sentences, without DeepSpeed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np
import torch
from transformers import TextStreamer

from flallm_ds import export
from flallm_ds.batch import Batch, VideoBatch
from flallm_ds.data.codecs.video import Video
from flallm_ds.data.preprocess import Preprocess
from flallm_ds.data.readers import NUM_DRAWS
from flallm_ds.data.text.languages import tag_of
from flallm_ds.data.text.prompt import Wording
from flallm_ds.errors import UserError
from flallm_ds.export.hub import folder_of
from flallm_ds.export.model_card import spoken
from flallm_ds.features.sequences import resample
from flallm_ds.models.encode import encode
from flallm_ds.models.llm.load import LlmOptions
from flallm_ds.models.llm.source import Bits
from flallm_ds.models.sign_translator import Beam, Candidate


@dataclass(frozen=True)
class Translator:
    """`Translator.from_pretrained(folder).translate("video.mp4")` -> a sentence."""

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

        device: a GPU where there is one. bits: of the LLM's parameters (8 and 4 need
        bitsandbytes); none: those of its training, so that sentences are those of the
        training's dev search. hub_code: run code that comes with the LLM. Raises
        UserError where there is no whole export.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = folder_of(model)
        if bits is None:
            bits = export.trained_bits(folder, export.read_settings(folder))
            bits = 32 if bits < 16 and chosen.type != "cuda" else bits
        loaded = export.read(folder, LlmOptions(bits=bits, hub_code=hub_code))
        loaded.visual.to(chosen)
        # bitsandbytes puts its weights itself
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
        """The same with another search. Raises UserError for one that cannot be."""
        beam = self.beam
        if beams is not None:
            beam = replace(beam, num_beams=beams)
        if nbest is not None:
            beam = replace(beam, num_return=nbest)
        if length_penalty is not None:
            beam = replace(beam, length_penalty=length_penalty)
        if not 1 <= beam.num_return <= beam.num_beams:
            raise UserError(
                "the sentences of a clip must be 1 to as many as there are beams, but are "
                f"{beam.num_return} of {beam.num_beams}. Give --nbest of at least 1, and "
                "--beams as large or larger."
            )
        return replace(self, beam=beam)

    def translate(self, video: str | Path, language: str = "") -> str:
        """The sentence signed in a video file or a folder of frames.

        language: of the sentence, where the model speaks several. Frames are scaled and
        picked as in training's evaluation. Raises UserError if nothing can be decoded.
        """
        return self.nbest(video, language)[0][0]

    def nbest(
        self, video: str | Path, language: str = ""
    ) -> list[tuple[str, float | None]]:
        """(sentence, score) of each hypothesis that `beam` asks for, best first, as `translate`.

        score: log probability over length ** length_penalty; None where only one is asked
        for.
        """
        batch, rate = self._read(Path(video), self.language(language))
        found = []
        for candidate in self.generate(batch, rate)[0]:
            found.append((self.export.codec.decode(candidate.ids), candidate.score))
        return found

    def stream(self, video: str | Path, language: str = "") -> Iterator[str]:
        """The sentence as `translate` with one beam says it, word by word."""
        greedy = self.searching(beams=1, nbest=1)
        batch, rate = self._read(Path(video), self.language(language))
        pieces = _Pieces(self.export.codec)
        failure: list[BaseException] = []

        def say() -> None:
            try:
                greedy.generate(batch, rate, pieces)
            except BaseException as error:  # noqa: BLE001 - raised below, by the thread that asked
                failure.append(error)
            pieces.queue.put(None)

        thread = Thread(target=say, daemon=True)
        thread.start()
        while (piece := pieces.queue.get()) is not None:
            yield piece
        thread.join()
        if failure:
            raise failure[0]

    def language(self, asked: str = "") -> str:
        """One of the languages that the model was trained to say: the one asked for, or
        the only one.

        Raises UserError where it is none of them, or where there are several and none is
        asked for.
        """
        known = spoken(self.export.codec)
        same = known
        if asked:
            same = [language for language in known if tag_of(language) == tag_of(asked)]
        if len(same) == 1:
            return same[0]
        if not known and not asked:
            return ""
        must = "be given where the model speaks several"
        if asked:
            must = "be one of those the model speaks"
        raise UserError(
            f"--language must {must} ({', '.join(known) or 'which are not recorded'}), but "
            f"is {asked!r}."
        )

    def _read(self, path: Path, language: str) -> tuple[Batch, float]:
        """(the kept frames as a batch of one clip, how many of them a second has)."""
        if not path.exists():
            raise UserError(
                f"there must be a video file or a folder of frames at {path}, but there is "
                "nothing."
            )
        kept, rate = self.kept_frames(path)
        corpora = self.export.settings["training"]["corpora"]
        batch = VideoBatch(
            frames_NHWC=torch.from_numpy(kept),
            num_frames_B=torch.tensor([len(kept)]),
            size_B2=torch.tensor([kept.shape[1:3]], dtype=torch.float32),
            draws_B9=torch.zeros(1, NUM_DRAWS),
            target_ids_BL=torch.full((1, 1), -100),
            keys=(path.name,),
            texts=("",),
            # a prompt may name its sign language
            corpora=(corpora[0] if len(corpora) == 1 else "",),
            languages=(language,),
            real_B=(True,),
        )
        return batch, rate

    def kept_frames(self, path: Path) -> tuple[np.ndarray, float]:
        """(the frames that the model sees of a video, uint8 (T, H, W, 3), how many of
        them a second has)."""
        settings = self.export.settings["frames"]
        sampling = export.frame_sampling(self.export.settings)
        video = Video(path)
        fps = settings.get("fps")
        stored = video.frames(short_side=settings["short_side"], fps=fps)
        kept: list[np.ndarray] = []
        num_frames = 0
        for frame in stored:
            if sampling.keeps_first(num_frames, fps or video.fps):
                kept.append(frame)
            num_frames += 1
        (rate,) = sampling.rates(np.array([num_frames]), np.array([fps or video.fps]))
        thinned = [kept[i] for i in sampling.thin(len(kept))]
        return np.stack(thinned), float(rate)

    @torch.no_grad()
    def generate(
        self, batch: Batch, rate: float | None = None, streamer: TextStreamer | None = None
    ) -> list[list[Candidate]]:
        """The hypotheses of each clip of a batch, best first.

        rate: of the frames, a second, where the LLM reads features at another one.
        """
        autocast = bool(self.export.settings.get("visual_autocast", True))
        # Not the LLM: autocast would cast each of its matrices again for every token. The
        # outer autocast covers what training does without it: pixels where the fused
        # kernel cannot run, and features at another rate. Earlier exports were scored so.
        half = autocast and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            features_ND = encode(
                batch,
                self.export.visual,
                self.preprocess,
                train=False,
                device=self.device,
                autocast=autocast,
            )
            features_ND, num_frames_B = self._at_trained_rate(
                features_ND, batch.num_frames_B, rate
            )
        return self.export.translator.generate(
            features_ND.float(),
            num_frames_B,
            self._wordings(batch),
            self.beam,
            streamer=streamer,
        )

    def _at_trained_rate(
        self, features_ND: torch.Tensor, num_frames_B: torch.Tensor, rate: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(features_ND, how many each clip has) at the rate of training. rate: as in
        `generate`."""
        wanted = self.export.settings["frames"]["feature_fps"]
        if wanted is None or rate is None:
            return features_ND, num_frames_B
        lengths_B = num_frames_B.to(self.device)
        features_BSD, lengths_B = resample(features_ND[None], lengths_B, rate, wanted)
        return features_BSD[0], lengths_B.cpu()

    def _wordings(self, batch: Batch) -> list[Wording]:
        codec = self.export.codec
        light_t = self.export.settings["stage"] == "visual"
        wording = codec.light_wording if light_t else codec.wording
        return list(map(wording, batch.languages, batch.corpora))


class _Pieces(TextStreamer):  # type: ignore[misc]  # transformers is untyped
    """Whole words of a sentence, as its pieces come, into a queue."""

    def __init__(self, codec: object) -> None:
        super().__init__(codec, skip_prompt=True)  # of a tokenizer it uses `decode` alone
        self.queue: SimpleQueue[str | None] = SimpleQueue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by `put` and `end`."""
        if text:
            self.queue.put(text)
