"""New times for captions from the speech in their videos: torchaudio's forced alignment over a CTC model.

Captions of one video are placed together and in order, a minute or so at a time: the letters of each within a
margin around its old time, and between captions a wildcard that takes the speech nobody captioned.
torch, torchaudio and transformers are imported when a model is loaded, so that building shards needs none.

Source: Pratap et al. 2023 (arXiv 2305.13516), for the wildcard.
"""

import math
import pickle  # for its error alone
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np

from flallm_ds.data.video import OPEN_OPTIONS, check_whole
from flallm_ds.errors import UserError
from flallm_ds.terminal import progress
from shards.corpora import Row

MARGIN_S = 5.0  # how far a caption may move to either side
MIN_SCORE = 0.1  # geometric mean of the probabilities of a caption's letters where they were placed
_CHUNK_S = 60.0  # captions placed together span at most this: forced_align's table grows with its square
_WINDOW_S = 30.0  # of sound through the model at once
_CONTEXT_S = 2.0  # more of it on both sides, whose frames are not used
_LONGEST_S = 300.0  # of a caption that is looked for, for the same reason
_MAX_SOUND_S = 12 * 3600.0  # timestamps beyond it are taken for broken ones: silence up to them fills memory

_WILDCARD = -1
_BLANK_COLUMN, _WILDCARD_COLUMN = 0, 1
# Below 1, so that a letter's own frames and clear silence are not given to the wildcard.
_WILDCARD_LOG_PROB = math.log(0.9)
_OUTSIDE_LOG_PROB = -1e4  # added for each frame of a letter beyond the margin, so that none is taken
_AWAY_LOG_PROB = -0.01  # and for each second from the old time, which decides between equal sentences

_NOT_HEARD, _NOT_SPELT, _CROWDED = "not heard", "not in the model's letters", "with more letters than frames"
_NO_TIMES, _TOO_LONG = "without times", f"longer than {_LONGEST_S:.0f} s"
_NO_SOUND, _BROKEN = "in videos without sound", "in videos whose sound breaks"
_NUM_EXAMPLES = 3

# What transformers raises for a hub id or folder that does not hold what was asked for.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    pickle.UnpicklingError,
)


@dataclass
class _Caption:
    """A row on its way: where it stands in the tables, its old times, and what was found."""

    split: str
    number: int
    start_s: float
    end_s: float
    letters: list[int]  # ids of the model's letters, _WILDCARD for what it cannot spell
    heard: tuple[float, float] | None = None  # new start and end
    why_kept: str = _NOT_HEARD


@dataclass
class _Tally:
    """What the notes say."""

    shifts_s: list[float] = field(default_factory=list)  # new start less old start
    kept: Counter[str] = field(default_factory=Counter)
    num_cut: int = 0
    num_overlapping: int = 0
    videos: dict[str, list[Path]] = field(default_factory=dict)  # those that could not be listened to, by why


def retime(
    rows: dict[str, list[Row]], model: str, margin_s: float = MARGIN_S
) -> tuple[dict[str, list[Row]], list[str]]:
    """(the rows with start_s and end_s where their text is spoken, notes that count what was done).

    model: hub id or folder of a CTC model that writes letters of the captions' language, such as
        facebook/wav2vec2-base-960h.
    margin_s: how far before its old start a caption may begin, and how far after its old end it may end.
    Rows of one video, from whichever split, are placed in the order of their times and do not overlap. A row
    keeps its times where it has none or lasts minutes, its video has no sound, or its text cannot be spelt or
    is not heard (MIN_SCORE); it is cut where a re-timed neighbour is, unless less than half would remain.
    Raises UserError for a model that cannot serve.
    """
    recogniser = Recogniser(model)
    tally = _Tally()
    videos: dict[Path, list[_Caption]] = {}
    for split, table in rows.items():
        for number, row in enumerate(table):
            if row.start_s is None or row.end_s is None:
                tally.kept[_NO_TIMES] += 1
                continue
            if row.end_s - row.start_s > _LONGEST_S:
                tally.kept[_TOO_LONG] += 1
                continue
            caption = _Caption(split, number, row.start_s, row.end_s, recogniser.spell(row.text))
            videos.setdefault(row.path, []).append(caption)

    new = {split: list(table) for split, table in rows.items()}
    num_captions = sum(map(len, videos.values()))
    with progress(num_captions, "align") as bar:
        for path in sorted(videos):
            captions = sorted(videos[path], key=lambda c: (c.start_s, c.end_s, c.split, c.number))
            why = _listen(path, captions, recogniser, margin_s, bar.update)
            if why:
                tally.videos.setdefault(why, []).append(path)
            for caption, (start_s, end_s) in zip(captions, _new_times(captions, tally), strict=True):
                row = rows[caption.split][caption.number]
                new[caption.split][caption.number] = replace(row, start_s=start_s, end_s=end_s)
    return new, _notes(tally)


def _listen(
    path: Path,
    captions: list[_Caption],
    recogniser: "Recogniser",
    margin_s: float,
    tick: Callable[[int], Any],
) -> str:
    """Find the captions of one video; what kept it from being listened to, empty if nothing did.

    captions: in the order of their times. tick is called with the number of captions just done.
    """
    why = ""
    try:
        sound = read_sound(path, recogniser.rate)
        why = "" if sound is not None else _NO_SOUND
    except BrokenSound:
        sound, why = None, _BROKEN
    if sound is None:
        for caption in captions:
            caption.why_kept = why
        tick(len(captions))
        return why

    position, floor_s = 0, 0.0  # floor_s: where the last caption that was found ends
    while position < len(captions):
        stop, sure = _chunk(captions, position, margin_s)
        chunk = captions[position:stop]
        begin_s = max(floor_s, chunk[0].start_s - margin_s)
        end_s = max(caption.end_s for caption in chunk) + margin_s
        begin, end = (round(edge_s * recogniser.rate) for edge_s in (begin_s, end_s))
        frames_T2, log_probs_TC = recogniser.listen(sound[begin:end])
        _place(chunk, frames_T2 + begin / recogniser.rate, log_probs_TC, recogniser.blank, margin_s)
        done = captions[position:sure]
        floor_s = max([floor_s, *(caption.heard[1] for caption in done if caption.heard)])
        tick(len(done))
        position = sure
    return why


def _chunk(captions: Sequence[_Caption], position: int, margin_s: float) -> tuple[int, int]:
    """(where the captions to be placed together with this one end, up to where they are placed for good).

    Those that could lie where captions beyond the chunk may be spoken are placed again together with them.
    """
    end_s = captions[position].end_s
    for stop in range(position + 1, len(captions)):
        following = captions[stop]
        if following.start_s - margin_s >= end_s + margin_s:
            return stop, stop
        if following.end_s - captions[position].start_s > _CHUNK_S:
            sure_s = captions[stop - 1].start_s - margin_s
            sure = position + 1
            while sure < stop and captions[sure].end_s + margin_s <= sure_s:
                sure += 1
            return stop, sure
        end_s = max(end_s, following.end_s)
    return len(captions), len(captions)


def _place(
    captions: Sequence[_Caption],
    frames_T2: np.ndarray,
    log_probs_TC: np.ndarray,
    blank: int,
    margin_s: float,
) -> None:
    """Set `heard` of the captions that are in this sound, and `why_kept` of the others.

    frames_T2: start and end of each frame in seconds. blank: its column.
    """
    waiting = []
    for caption in captions:
        caption.heard, caption.why_kept = None, _NOT_HEARD
        num_frames = int((_away_s(frames_T2, caption) <= margin_s).sum())
        if not caption.letters:
            caption.why_kept = _NOT_SPELT
        elif 0 < num_frames < _num_frames_needed(caption.letters):
            caption.why_kept = _CROWDED
        elif num_frames:
            waiting.append(caption)
    while waiting:
        if sum(_num_frames_needed(caption.letters) + 1 for caption in waiting) + 1 > len(frames_T2):
            worst = max(waiting, key=lambda caption: len(caption.letters))
            worst.why_kept = _CROWDED
        else:
            found = _force(waiting, frames_T2, log_probs_TC, blank, margin_s)
            scores = [score for score, _, _ in found]
            if min(scores) >= math.log(MIN_SCORE):
                for caption, (_, start_s, end_s) in zip(waiting, found, strict=True):
                    caption.heard = start_s, end_s
                return
            # The worst alone: a caption that nobody speaks pushes its neighbours aside.
            worst = waiting[scores.index(min(scores))]
        waiting = [caption for caption in waiting if caption is not worst]


def _away_s(frames_T2: np.ndarray, caption: _Caption) -> np.ndarray:
    """By how many seconds each frame lies before or after the caption's old time, shape (T,)."""
    before_after_2T = caption.start_s - frames_T2[:, 0], frames_T2[:, 1] - caption.end_s
    away_T: np.ndarray = np.maximum(*before_after_2T).clip(0)
    return away_T


def _num_frames_needed(letters: Sequence[int]) -> int:
    """One a letter, and a blank between two that are alike."""
    return len(letters) + sum(one == other for one, other in pairwise(letters))


def _force(
    captions: Sequence[_Caption],
    frames_T2: np.ndarray,
    log_probs_TC: np.ndarray,
    blank: int,
    margin_s: float,
) -> list[tuple[float, float, float]]:
    """For each caption the mean log probability of its letters, and start and end in seconds.

    All are placed by one path: wildcard, first caption, wildcard, second caption, ... Every caption has
    columns of its own, so that its letters are found within its margin alone.
    """
    import torch
    from torchaudio.functional import forced_align, merge_tokens

    num_frames = len(frames_T2)
    columns = [log_probs_TC[:, [blank]], np.full((num_frames, 1), _WILDCARD_LOG_PROB, np.float32)]
    targets, owners = [_WILDCARD_COLUMN], [_WILDCARD]
    num_columns = 2
    for owner, caption in enumerate(captions):
        away_T = _away_s(frames_T2, caption)
        prior_T = _AWAY_LOG_PROB * away_T + _OUTSIDE_LOG_PROB * (away_T > margin_s)
        own = sorted(set(caption.letters) - {_WILDCARD})
        columns.append(log_probs_TC[:, own] + prior_T[:, None])
        column_of = {letter: num_columns + n for n, letter in enumerate(own)} | {_WILDCARD: _WILDCARD_COLUMN}
        num_columns += len(own)
        for letter in [*caption.letters, _WILDCARD]:
            if letter != _WILDCARD or targets[-1] != _WILDCARD_COLUMN:
                targets.append(column_of[letter])
                owners.append(_WILDCARD if letter == _WILDCARD else owner)

    # forced_align (2.11) takes a batch of one, contiguous.
    emission_TC = np.ascontiguousarray(np.concatenate(columns, axis=1).astype(np.float32))
    emission_1TC = torch.from_numpy(emission_TC)[None]
    labels_1T, scores_1T = forced_align(emission_1TC, torch.tensor([targets]), blank=_BLANK_COLUMN)
    spans = merge_tokens(labels_1T[0], scores_1T[0], blank=_BLANK_COLUMN)
    assert [span.token for span in spans] == targets

    found = []
    for owner in range(len(captions)):
        own_spans = [span for span, of in zip(spans, owners, strict=True) if of == owner]
        first, last = own_spans[0].start, own_spans[-1].end - 1
        score = float(np.mean([span.score for span in own_spans]))
        found.append((score, round(float(frames_T2[first, 0]), 3), round(float(frames_T2[last, 1]), 3)))
    return found


def _new_times(captions: Sequence[_Caption], tally: _Tally) -> list[tuple[float, float]]:
    """Start and end of each caption of a video, in the captions' order; counts what came of them.

    One that was not found is cut where a neighbour that was found lies.
    """
    ceilings_s = []
    ceiling_s = math.inf
    for caption in reversed(captions):
        ceilings_s.append(ceiling_s)
        ceiling_s = caption.heard[0] if caption.heard else ceiling_s
    times_s = []
    floor_s = 0.0
    for caption, ceiling_s in zip(captions, reversed(ceilings_s), strict=True):
        if caption.heard:
            tally.shifts_s.append(caption.heard[0] - caption.start_s)
            floor_s = caption.heard[1]
            times_s.append(caption.heard)
            continue
        tally.kept[caption.why_kept] += 1
        old = caption.start_s, caption.end_s
        cut = max(caption.start_s, floor_s), min(caption.end_s, ceiling_s)
        whole = cut == old
        enough = cut[1] - cut[0] >= (old[1] - old[0]) / 2
        tally.num_cut += enough and not whole
        tally.num_overlapping += not enough
        times_s.append(cut if enough else old)
    return times_s


def _notes(tally: _Tally) -> list[str]:
    num_retimed, num_kept = len(tally.shifts_s), tally.kept.total()
    note = f"align: {num_retimed:,} captions re-timed"
    if num_retimed:
        mean_s, apart_s = np.mean(tally.shifts_s), np.mean(np.abs(tally.shifts_s))
        note += f", their starts by {mean_s:+.2f} s on average ({apart_s:.2f} s either way)"
    note += f"; {num_kept:,} kept their times"
    if num_kept:
        note += ": " + ", ".join(f"{count:,} {why}" for why, count in sorted(tally.kept.items()))
    notes = [note]
    if tally.num_cut:
        notes.append(f"align: {tally.num_cut:,} of those kept were cut where a re-timed neighbour is")
    if tally.num_overlapping:
        notes.append(f"align: {tally.num_overlapping:,} of those kept overlap a re-timed neighbour")
    for why, paths in sorted(tally.videos.items()):
        names = ", ".join(path.name for path in paths[:_NUM_EXAMPLES])
        more = ", ..." if len(paths) > _NUM_EXAMPLES else ""
        notes.append(f"align: {len(paths):,} {why.removeprefix('in ')} ({names}{more})")
    return notes


class BrokenSound(UserError):
    """A sound track that is not there to read, or does not decode."""


def read_sound(path: Path, rate: int) -> np.ndarray | None:
    """int16 samples of one channel, `rate` a second, from the video's beginning; None if it has no sound.

    The first sound track counts. Gaps between its timestamps are silence. Raises BrokenSound.
    """
    if path.is_dir():
        return None
    pieces: list[np.ndarray] = []
    num_samples = 0
    try:
        check_whole(path)
        with av.open(
            str(path.absolute()), container_options=OPEN_OPTIONS, metadata_errors="replace"
        ) as container:
            if not container.streams.audio:
                return None
            begin_s = (container.start_time or 0) / av.time_base
            resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)
            for frame in container.decode(container.streams.audio[0]):
                heard_s = num_samples / rate
                time_s = heard_s if frame.time is None else frame.time - begin_s
                if time_s > _MAX_SOUND_S:
                    raise ValueError(f"it goes on at {time_s:.0f} s")
                gap_s = time_s - heard_s
                if gap_s > 0.1:  # less is the resampler's delay
                    pieces.append(np.zeros(round(gap_s * rate), np.int16))
                    num_samples += len(pieces[-1])
                for resampled in resampler.resample(frame):
                    pieces.append(resampled.to_ndarray()[0])
                    num_samples += len(pieces[-1])
            pieces += [resampled.to_ndarray()[0] for resampled in resampler.resample(None)]
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BrokenSound(f"a sound track must decode to its end, but did not ({reason}): {path}.") from error
    return np.concatenate(pieces) if pieces else None


class Recogniser:
    """A CTC model of transformers that writes letters.

    rate: samples a second that it hears. blank: the column of its outputs that stands for no letter.
    """

    def __init__(self, name: str) -> None:
        """name: hub id or folder. Raises UserError where it does not load, or is no CTC model of letters."""
        extractor, tokenizer, model, torch = _load(name)
        self._extractor, self._torch = extractor, torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device).eval()
        self.rate = int(extractor.sampling_rate)
        self.blank = int(model.config.pad_token_id)
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        special = {*tokenizer.all_special_ids, self.blank}
        delimiter = getattr(tokenizer, "word_delimiter_token", None) or "|"
        self._delimiter = [vocabulary[delimiter]] if delimiter in vocabulary else []
        special.update(self._delimiter)
        pieces = {piece: number for piece, number in vocabulary.items() if number not in special}
        self._letters = {piece: number for piece, number in pieces.items() if len(piece) == 1}
        if len(self._letters) * 2 < len(pieces) or not self._letters:
            raise UserError(
                f"--align must name a model that writes single letters, but most of the {len(pieces)} pieces "
                f"of {name} are longer. Name another one."
            )
        if max(self.blank, *self._letters.values()) >= model.config.vocab_size:
            raise UserError(
                f"a model must have an output for each piece of its tokenizer, but {name} has "
                f"{model.config.vocab_size} for {len(vocabulary)}. Name another one with --align."
            )

    def spell(self, text: str) -> list[int]:
        """Ids of a text's letters and of the delimiters between words; -1, a wildcard, for digits and letters
        that the model does not know. Empty if it knows less than half of them.
        """
        spelt: list[int] = []
        num_known = num_unknown = 0
        for word in unicodedata.normalize("NFKC", text).replace("’", "'").split():
            ids: list[int] = []
            for character in word:
                number = self._letter(character)
                if number is not None:
                    ids.append(number)
                    num_known += 1
                elif character.isalnum():  # punctuation is not spoken
                    ids += [_WILDCARD] if ids[-1:] != [_WILDCARD] else []
                    num_unknown += 1
            spelt += [*(self._delimiter if spelt else []), *ids] if ids else []
        return spelt if num_known > 0 and num_known >= num_unknown else []

    def _letter(self, character: str) -> int | None:
        """The id of a character, of its other case, or of it without its accent."""
        plain = unicodedata.normalize("NFD", character)[0]
        for form in (character, character.lower(), character.upper(), plain.lower(), plain.upper()):
            if form in self._letters:
                return self._letters[form]
        return None

    def listen(self, sound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start and end of each frame in seconds, shape (T, 2); log probabilities of shape (T, C)).

        sound: int16 samples. They pass the model in windows that overlap by their context.
        """
        num_windows = max(1, math.ceil(len(sound) / (_WINDOW_S * self.rate)))
        edges = [len(sound) * n // num_windows for n in range(num_windows + 1)]
        context = round(_CONTEXT_S * self.rate)
        frames, log_probs = [], []
        for begin, end in pairwise(edges):
            left, right = max(0, begin - context), min(len(sound), end + context)
            window = sound[left:right].astype(np.float32) / 32768
            if len(window) < self.rate:  # the model's filters may be longer than what there is
                window = np.pad(window, (0, self.rate - len(window)))
            log_probs_TC = self._log_probs(window)
            hop = len(window) / len(log_probs_TC)
            begins_T = left + hop * np.arange(len(log_probs_TC))
            used_T = (begins_T + hop / 2 >= begin) & (begins_T + hop / 2 < end)
            frames.append(np.stack([begins_T, begins_T + hop], axis=1)[used_T] / self.rate)
            log_probs.append(log_probs_TC[used_T])
        return np.concatenate(frames), np.concatenate(log_probs)

    def _log_probs(self, window: np.ndarray) -> np.ndarray:
        inputs = self._extractor(window, sampling_rate=self.rate, return_tensors="pt")
        with self._torch.inference_mode():
            logits_1TC = self._model(**inputs.to(self._device)).logits
            log_probs: np.ndarray = logits_1TC[0].float().log_softmax(-1).cpu().numpy()
        return log_probs


def _load(name: str) -> tuple[Any, Any, Any, Any]:
    """(feature extractor, tokenizer, model, torch). Raises UserError where one is not to be had."""
    try:
        import torch
        import torchaudio.functional  # noqa: F401  # so that a missing one is found before the work
        from safetensors import SafetensorError
        from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer
    except (ImportError, OSError) as error:
        raise UserError(
            f"--align needs torch, torchaudio and transformers, but they do not import ({error}). "
            "Install them as README.md says, or leave --align out."
        ) from error
    if ("/" not in name or name.startswith((".", "/")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UserError(f"--align must be a hub id or a folder with a CTC model, but there is none: {name}.")
    loaded = []
    for what, load in (
        ("model", partial(AutoModelForCTC.from_pretrained, dtype=torch.float32, output_loading_info=True)),
        ("feature extractor", AutoFeatureExtractor.from_pretrained),
        ("tokenizer", AutoTokenizer.from_pretrained),
    ):
        try:
            # False and not unset: transformers would ask on the terminal whether to run a repository's code.
            loaded.append(load(name, trust_remote_code=False))
        except (*_LOAD_ERRORS, SafetensorError) as error:
            # Torch's own words would advise to unpickle it all the same.
            unsafe = isinstance(error, pickle.UnpicklingError)
            reason = "it holds more than tensors" if unsafe else str(error).partition("\n")[0].rstrip(" .")
            raise UserError(
                f"--align must name a CTC model with its feature extractor and tokenizer, but the {what} of "
                f"{name} does not load: {reason}."
            ) from error
    (model, info), extractor, tokenizer = loaded
    # Some lack weights of the body that only training uses; a head made up at random hears nothing.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(model.base_model_prefix + "."))
    if missing:
        raise UserError(
            f"--align must name a CTC model, but {name} was never trained to write letters: it lacks "
            f"{missing[0]}. Name one that was fine-tuned for speech recognition."
        )
    return extractor, tokenizer, model, torch
