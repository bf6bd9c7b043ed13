"""An export folder as an object that turns videos into sentences, without DeepSpeed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flallm_ds import export
from flallm_ds.contracts import Batch
from flallm_ds.data.loader import NUM_DRAWS
from flallm_ds.data.video import Video
from flallm_ds.errors import UserError
from flallm_ds.models.sign_translator import Beam, Candidate
from flallm_ds.preprocess import Preprocess


@dataclass(frozen=True)
class Translator:
    """`Translator.from_pretrained(folder).translate("video.mp4")` -> a sentence."""

    export: export.Export
    preprocess: Preprocess
    beam: Beam
    device: torch.device

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None) -> "Translator":
        """Load an export folder, or the best export of a run folder. device: a GPU where there is one.

        Raises UserError where the folder holds no whole export.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = export.read(export.find(folder))
        loaded.visual.to(chosen)
        loaded.translator.to(chosen)
        frames = loaded.settings["frames"]
        preprocess = Preprocess(frames["frame_size"], frames["crop_size"])
        return cls(loaded, preprocess, Beam(**loaded.settings["generation"]), chosen)

    def translate(self, video: str | Path) -> str:
        """The sentence signed in a video file or a folder of frames.

        Frames are scaled and picked as in training's evaluation. Raises UserError if nothing can be decoded.
        """
        path = Path(video)
        if not path.exists():
            raise UserError(
                f"there must be a video file or a folder of frames at {path}, but there is nothing."
            )
        kept = self.kept_frames(path)
        batch = Batch(
            frames_NHWC=torch.from_numpy(kept),
            num_frames_B=torch.tensor([len(kept)]),
            size_B2=torch.tensor([kept.shape[1:3]], dtype=torch.float32),
            draws_B9=torch.zeros(1, NUM_DRAWS),
            target_ids_BL=torch.full((1, 1), -100),
            keys=(path.name,),
            texts=("",),
            corpora=("",),
            languages=("",),
            real_B=(True,),
        )
        return self.export.codec.decode(self.generate(batch)[0][0].ids)

    def kept_frames(self, path: Path) -> np.ndarray:
        """The frames that the model sees of a video, uint8 (T, H, W, 3)."""
        settings = self.export.settings["frames"]
        sampling = export.frame_sampling(self.export.settings)
        video = Video(path)
        fps = settings.get("fps")
        stored = video.frames(short_side=settings["short_side"], fps=fps)
        kept = [frame for i, frame in enumerate(stored) if sampling.keeps_first(i, fps or video.fps)]
        return np.stack([kept[i] for i in sampling.thin(len(kept))])

    @torch.no_grad()
    def generate(self, batch: Batch) -> list[list[Candidate]]:
        """The hypotheses of each clip of a batch, best first."""
        half = self.device.type == "cuda"
        codec = self.export.codec
        wording = codec.light_wording if self.export.settings["stage"] == "visual" else codec.wording
        wordings = [wording(*of) for of in zip(batch.languages, batch.corpora, strict=True)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            pixels_NCHW = self.preprocess(batch, train=False, device=self.device)
            features_ND = self.export.visual(pixels_NCHW, batch.num_frames_B)
            return self.export.translator.generate(features_ND, batch.num_frames_B, wordings, self.beam)
