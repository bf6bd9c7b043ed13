"""Draw the pictures of docs/tutorials/one_clip.md: one clip from tar to sentence.

Each function draws one step of a trained model on one clip. It calls the function of the
package that does the step; the title names this function and the shapes.
"""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from flallm_ds import command
from flallm_ds.batch import Batch, Hypothesis
from flallm_ds.data.index import load_index
from flallm_ds.data.loader import Loader
from flallm_ds.data.plan import EpochPlan
from flallm_ds.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from flallm_ds.data.readers import NUM_DRAWS, VideoReader, sample_rng
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.data.text.languages import word_rule
from flallm_ds.errors import UserError
from flallm_ds.export.format import frame_sampling
from flallm_ds.files import write_file
from flallm_ds.inference.heat_map import words_of
from flallm_ds.inference.pictures import read_frames
from flallm_ds.inference.strips import strip_figure
from flallm_ds.inference.translator import Translator
from flallm_ds.metrics.bleu import BleuRule
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.attention import visual_attention
from flallm_ds.models.lengths import pad_packed
from flallm_ds.models.sign_translator import SignTranslator
from flallm_ds.models.visual_encoder import LocalTemporalModule, VisualEncoder

CLIPS = 3  # in the batch: the clip and two others, for padding
CHANNELS = 64  # of a heat map
NAME = "one_clip_{}.png"
LARGE = 200_000  # bytes


@dataclass(frozen=True)
class Walk:
    """The clip and the model. batch: of the clip and of two others, the clip first."""

    folder: Path
    key: str
    reader: VideoReader
    row: int
    translator: Translator
    batch: Batch

    @property
    def num_kept(self) -> int:
        """Return the number of kept frames of the clip."""
        return int(self.batch.num_frames_B[0])

    @property
    def visual(self) -> VisualEncoder:
        """Return the visual encoder."""
        return self.translator.export.visual.encoder

    def pixels(self) -> torch.Tensor:
        """Return pixels_NCHW of the whole batch."""
        return self.translator.preprocess(self.batch, False, torch.device("cpu"))

    def features(self) -> torch.Tensor:
        """Return features_ND of the whole batch."""
        features_ND, _ = self.translator.features(self.batch)
        return features_ND


def one_clip(*, run: Path, shards: Path, key: str, out: Path, split: str = "test") -> None:
    """Draw eight pictures, OUT/one_clip_1.png to OUT/one_clip_8.png.

    --run: a run folder with best/. --shards: a shard folder with videos. --key: of the
    clip. --out: an existing folder. --split: the split of the clip.
    """
    if not out.is_dir():
        raise UserError(f"--out must be an existing folder, got {out}.")
    torch.manual_seed(0)
    walk = open_walk(run, shards, split, key)
    pictures = (sample, frames, pixels, features, tokens, attention, beams, score)
    with torch.no_grad():
        for number, draw in enumerate(pictures, start=1):
            path = out / NAME.format(number)
            save(draw(walk), path)
            print(path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, with 256 colours if it would be large."""
    content = io.BytesIO()
    figure.savefig(content)
    if content.tell() > LARGE:
        image = Image.open(content).convert("RGB").quantize(256)
        content = io.BytesIO()
        image.save(content, "PNG", optimize=True)
    write_file(path, content.getvalue())


def open_walk(run: Path, shards: Path, split: str, key: str) -> Walk:
    """Load the model and read the clip, with the next two clips of the split.

    Raises UserError if the split has no clip of this key.
    """
    translator = Translator.from_pretrained(run, device="cpu")
    index = load_index(shards, split)
    keys = index.strings("key")
    if key not in keys:
        raise UserError(f"--key must be a key of {split}, e.g. {keys[0]}, got {key}.")
    row = keys.index(key)
    rows = np.arange(row, row + CLIPS) % len(index)
    sampling = frame_sampling(translator.export.settings)
    reader = VideoReader(index, sampling, seed=0, train=False)
    plan = EpochPlan(
        order=rows,
        passes=np.zeros(len(rows), np.int64),
        ends=np.array([len(rows)]),
        num_kept=reader.num_places(),
        num_micro_batches=1,
    )
    (batch,) = Loader(reader, plan, translator.export.codec)
    return Walk(shards, key, reader, row, translator, batch)


def new_figure(height: float, title: str, *functions: Callable[..., Any]) -> Figure:
    """Return a figure with a title, and below it the functions that do the step."""
    figure = Figure(figsize=(9, height), dpi=100, layout="constrained")
    lines = [title, *map(place, functions)]
    figure.suptitle("\n".join(lines), fontsize=10, ha="left", x=0.01)
    return figure


def place(function: Callable[..., Any]) -> str:
    """Return file and name of a function or class."""
    file = function.__module__.replace(".", "/")
    return f"{file}.py, {function.__qualname__}"


# --- the steps


def sample(walk: Walk) -> Figure:
    """Draw the members of the clip in its tar, and the JSON."""
    index = walk.reader.index
    tar = index.tar(walk.row).file
    offset = int(index.arrays["offset"][walk.row])
    lines = [f"{tar}"]
    record: dict[str, object] = {}
    with tarfile.open(walk.folder / tar) as file:
        for member in file:
            own = member.name.startswith(walk.key)
            if abs(member.offset_data - offset) > 300_000:
                continue
            mark = "->" if own else "  "
            lines.append(
                f"{mark} {member.name}   {member.size:>9,} bytes at {member.offset_data:>11,}"
            )
            if own and member.name.endswith(".json"):
                content = file.extractfile(member)
                assert content is not None
                record = json.load(content)
    shown = json.dumps(record, ensure_ascii=False, indent=2).splitlines()
    figure = new_figure(2.7, "1  The sample in the tar", VideoReader.read)
    axes = figure.subplots(1, 2, width_ratios=(1.25, 1))
    texts = (("members next to the clip", lines), (f"{walk.key}.json", shown))
    for axis, (title, text) in zip(axes, texts, strict=True):
        axis.set_axis_off()
        axis.set_title(title, loc="left", fontsize=10)
        style = {"family": "monospace", "fontsize": 8, "va": "top", "parse_math": False}
        axis.text(0, 0.98, "\n".join(text), transform=axis.transAxes, **style)
    return figure


def frames(walk: Walk) -> Figure:
    """Draw all frames of the clip; those that are not kept are pale."""
    all_THWC = read_frames(walk.reader, walk.row)
    _, picks = walk.reader.draws(walk.row, epoch=0)
    fps = float(walk.reader.index.arrays["fps"][walk.row])
    in_row = 4 * max(1, round(walk.reader.sampling.stride(fps))) if len(picks) > 1 else 8
    in_row = min(max(in_row, 12), 20)
    num_rows = -(-len(all_THWC) // in_row)
    title = (
        f"2  The kept frames: {len(picks)} of {len(all_THWC)}. "
        f"frames_NHWC: N = {len(picks)}, H x W = {all_THWC.shape[1]} x {all_THWC.shape[2]}, "
        "uint8"
    )
    figure = new_figure(0.5 + 0.75 * num_rows, title, FrameSampling.picks)
    axes = figure.subplots(num_rows, in_row, squeeze=False).ravel()
    for number, axis in enumerate(axes):
        axis.set(xticks=[], yticks=[])
        if number >= len(all_THWC):
            axis.set_axis_off()
            continue
        kept = number in picks
        axis.imshow(all_THWC[number], alpha=1.0 if kept else 0.25)
        axis.spines[:].set(color="C2" if kept else "white", linewidth=2.5)
    return figure


def pixels(walk: Walk) -> Figure:
    """Draw the middle kept frame as stored, squashed, cropped and augmented."""
    middle = walk.num_kept // 2
    used = walk.translator.preprocess
    stored = walk.batch.frames_NHWC[middle].numpy()
    height, width = map(int, walk.batch.size_B2[0])
    shown = [(f"stored\n{height} x {width}", stored[:height, :width])]
    squashed = Preprocess(used.frame_size, used.frame_size)
    side = f"{used.frame_size} x {used.frame_size}"
    shown.append((f"squashed\n{side}", picture(squashed, walk.batch, False, middle)))
    side = f"{used.crop_size} x {used.crop_size}"
    shown.append((f"evaluation: centre\n{side}", picture(used, walk.batch, False, middle)))
    for epoch in range(3):
        # The draws of a clip are its own in each epoch: here those of epochs 0 to 2.
        draws_B9 = torch.zeros(len(walk.batch.keys), NUM_DRAWS)
        draws = sample_rng(0, epoch, walk.row).random(NUM_DRAWS)
        draws_B9[0] = torch.from_numpy(draws)
        drawn = replace(walk.batch, draws_B9=draws_B9)
        shown.append(
            (f"training: epoch {epoch}\n{side}", picture(used, drawn, True, middle))
        )
    title = (
        f"3  The input: pixels_NCHW, N = {walk.num_kept}, C = 3, H x W = {side}, float32"
    )
    figure = new_figure(2.6, title, Preprocess.__call__)
    for axis, (label, image) in zip(figure.subplots(1, len(shown)), shown, strict=True):
        axis.imshow(image)
        axis.set_title(label, fontsize=8)
        axis.set_axis_off()
    return figure


def picture(preprocess: Preprocess, batch: Batch, train: bool, number: int) -> np.ndarray:
    """Return frame `number` of a batch after preprocessing, uint8, without normalisation."""
    pixels_CHW = preprocess(batch, train, torch.device("cpu"))[number]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    image_HWC = ((pixels_CHW * std + mean) * 255).clamp(0, 255).permute(1, 2, 0)
    return image_HWC.round().byte().numpy()


def features(walk: Walk) -> Figure:
    """Draw the features after the backbone and after the temporal module."""
    num = walk.num_kept
    frames_ND = walk.visual.frame_features(walk.pixels())
    signs_ND = walk.visual.temporal(frames_ND, walk.batch.num_frames_B)
    title = f"4  The features: N = {num} frames, D = {walk.visual.feature_width} channels"
    figure = new_figure(4, title, VisualEncoder.frame_features, LocalTemporalModule.forward)
    axes = figure.subplots(1, 2)
    labels = ("backbone: frame-wise features_ND", "temporal module: sign-wise features_ND")
    for axis, values_ND, label in zip(axes, (frames_ND, signs_ND), labels, strict=True):
        heat(figure, axis, values_ND[:num], label)
    return figure


def heat(figure: Figure, axis: Any, values_ND: torch.Tensor, label: str) -> None:
    """Draw a heat map: time from left to right, the first channels from top to bottom."""
    shown = values_ND[:, :CHANNELS].T.numpy()
    image = axis.imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis")
    axis.set_title(label, fontsize=9)
    axis.set(xlabel="kept frame", ylabel=f"channel (first {len(shown)})")
    figure.colorbar(image, ax=axis, label="value")


def tokens(walk: Walk) -> Figure:
    """Draw the visual tokens of the clip, and the padding of the batch."""
    adapter = walk.translator.export.translator.adapter
    num_frames_B = walk.batch.num_frames_B
    tokens_NE = adapter(walk.features())
    memory_BSE, mask_BS = pad_packed(tokens_NE, num_frames_B)
    batch, length, width = memory_BSE.shape
    title = f"5  The visual tokens: memory_BSE, B = {batch}, S = {length}, E = {width}"
    figure = new_figure(4, title, Adapter.forward, pad_packed)
    left, right = figure.subplots(1, 2)
    heat(figure, left, tokens_NE[: walk.num_kept], f"the clip: {walk.num_kept} tokens")
    right.imshow(mask_BS.numpy(), aspect="auto", cmap="Greys", vmin=-0.3, vmax=2)
    for row, count in enumerate(num_frames_B.tolist()):
        right.text(0.3, row, f"{count} tokens", va="center")
    right.set_title("mask_BS of the batch (grey: token, pale: padding)", fontsize=9)
    right.set(xlabel="visual token", yticks=range(batch), yticklabels=walk.batch.keys)
    return figure


def attention(walk: Walk) -> Figure:
    """Draw which visual tokens each word of the best hypothesis attended to."""
    codec = walk.translator.export.codec
    candidate = walk.translator.generate(walk.batch)[0][0]
    language = walk.batch.languages[0]
    wording = walk.translator.wordings(walk.batch)[0]
    values_LS = visual_attention(
        walk.translator.export.translator,
        walk.features()[: walk.num_kept],
        wording,
        candidate.ids,
    )
    if values_LS is None:
        raise UserError(
            "--run must have a language model with attention to frames, got one without."
        )
    # The last token is the end of the sentence.
    characters = word_rule(language) != "13a"
    words, tokens_of_word = words_of(codec.decode, candidate.ids[:-1], characters)
    of_words = [values_LS[positions].mean(0).numpy() for positions in tokens_of_word]
    title = f"6  The attention: L = {len(candidate.ids)} tokens, S = {walk.num_kept}"
    figure = new_figure(4.6, title, visual_attention)
    above, below = figure.subplots(2, 1, height_ratios=(1, 3.2))
    shown = np.linspace(0, walk.num_kept - 1, 10).round().astype(int)
    above.imshow(np.concatenate([walk.batch.frames_NHWC[n].numpy() for n in shown], axis=1))
    above.set_axis_off()
    above.set_title(f"kept frames {', '.join(map(str, shown))}", fontsize=9)
    image = below.imshow(np.stack(of_words), aspect="auto", cmap="magma")
    below.set(xlabel="visual token = kept frame", yticks=range(len(words)))
    below.set_yticklabels(words, parse_math=False)
    figure.colorbar(image, ax=below, label="share of attention")
    return figure


def beams(walk: Walk) -> Figure:
    """Draw the hypotheses of the beam search with their scores."""
    searching = walk.translator.searching(beams=5, nbest=5)
    candidates = searching.generate(walk.batch)[0]
    title = "7  The beam search: 5 beams; score = log probability / length (0 is certain)"
    figure = new_figure(2.9, title, SignTranslator.generate)
    axis = figure.subplots()
    decode = walk.translator.export.codec.decode
    for number, candidate in enumerate(candidates):
        assert candidate.score is not None
        axis.barh(number, candidate.score, color="C0" if number == 0 else "C7", alpha=0.5)
        text = f" {candidate.score:.3f}  {decode(candidate.ids)}"
        axis.text(0, number, text, ha="left", va="center", parse_math=False, fontsize=9)
    lowest = min(candidate.score or 0.0 for candidate in candidates)
    axis.set_xlim(1.05 * lowest, -1.6 * lowest)  # the sentences are at the right
    axis.set(xlabel="score", yticks=range(len(candidates)), ylabel="rank")
    axis.set_yticklabels(range(1, len(candidates) + 1))
    axis.set_xticks([tick for tick in axis.get_xticks() if 1.05 * lowest <= tick <= 0])
    axis.invert_yaxis()
    return figure


def score(walk: Walk) -> Figure:
    """Draw hypothesis and reference with marked differences, and their BLEU-4."""
    (best, *_) = walk.translator.generate(walk.batch)[0]
    hypothesis = walk.translator.export.codec.decode(best.ids)
    reference, language = walk.batch.texts[0], walk.batch.languages[0]
    said = Hypothesis(walk.key, hypothesis, reference, language=language)
    all_NHWC = walk.batch.frames_NHWC[: walk.num_kept].numpy()
    picked = [
        all_NHWC[n] for n in np.linspace(0, len(all_NHWC) - 1, 10).round().astype(int)
    ]
    rule = BleuRule(word_rule(language), effective_order=True)
    bleu = rule.metric().sentence_score(hypothesis, [reference])
    counts = zip(bleu.counts, bleu.totals, strict=True)
    shares = ", ".join(f"{found} of {total}" for found, total in counts)
    lines = (
        f"8  The score of this sentence: BLEU-4 = {bleu.score:.1f} ({place(BleuRule)})",
        f"n-grams of 1 to 4 words that are in the reference: {shares}",
        f"brevity penalty: {bleu.bp:.2f}",
    )
    return strip_figure([(picked, said)], 10, lines)


if __name__ == "__main__":
    command.main(one_clip)
