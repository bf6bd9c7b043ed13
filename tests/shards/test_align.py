"""A language of tones: each letter is a sound of its own pitch, and a small Wav2Vec2 learns to hear them."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
)

from flallm_ds.errors import UserError
from shards import align
from shards.align import Recogniser, read_sound, retime
from shards.corpora import Row

RATE = 16000
LETTERS = "abcdefgh"
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS.upper()]
LETTER_S, PAUSE_S, SPACE_S = 0.1, 0.04, 0.12  # a letter, the silence after it, and that between words
ROOT = Path(__file__).resolve().parents[2]


def say(text: str, rng: np.random.Generator) -> np.ndarray:
    """float32 samples at 16 kHz."""
    pieces = []
    for character in text.lower():
        if character in LETTERS:
            t = np.arange(round(LETTER_S * RATE)) / RATE
            pitch = 300 * 1.35 ** LETTERS.index(character)
            pieces.append(0.3 * np.sin(2 * np.pi * (pitch * t + rng.random())))
            pieces.append(np.zeros(round(PAUSE_S * RATE)))
        else:
            pieces.append(np.zeros(round(SPACE_S * RATE)))
    return np.concatenate(pieces).astype(np.float32)


def labels_of(text: str, num_frames: int) -> torch.Tensor:
    """Which letter sounds in each frame of 20 ms; blank in silence, the delimiter amid that between words."""
    labels = torch.zeros(num_frames, dtype=torch.long)
    at_s = 0.0
    for character in text.lower():
        if character in LETTERS:
            labels[round(at_s * 50) : round((at_s + LETTER_S) * 50)] = VOCABULARY.index(character.upper())
            at_s += LETTER_S + PAUSE_S
        else:
            labels[round((at_s + SPACE_S / 2) * 50)] = VOCABULARY.index("|")
            at_s += SPACE_S
    return labels


def record(
    path: Path,
    spoken: list[tuple[float, str]],
    length_s: float,
    codec: str = "flac",
    sound_from_s: float = 0.0,
) -> None:
    """A video whose sound says each text at its second; sound_from_s: of the sound's first timestamp."""
    rng = np.random.default_rng(7)
    sound = rng.normal(0, 0.003, round(length_s * RATE)).astype(np.float32)
    for start_s, text in spoken:
        begin = round(start_s * RATE)
        piece = say(text, rng)[: len(sound) - begin]
        sound[begin : begin + len(piece)] += piece
    rate, layout = (44100, "stereo") if codec == "aac" else (RATE, "mono")
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=5)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        track = container.add_stream(codec, rate=rate, layout=layout)
        for _ in range(math.ceil(length_s * 5)):
            grey = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format="rgb24")
            container.mux(pictures.encode(grey))
        container.mux(pictures.encode())
        resampler = av.AudioResampler(format=track.format, layout=layout, rate=rate, frame_size=1024)
        samples = (sound * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = RATE
        num_samples = round(sound_from_s * rate)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            piece.pts, num_samples = num_samples, num_samples + piece.samples
            container.mux(track.encode(piece))
        container.mux(track.encode())


def length_of(text: str) -> float:
    """Seconds from a text's first letter to the end of its last."""
    num_letters = sum(c in LETTERS for c in text)
    return num_letters * (LETTER_S + PAUSE_S) + (len(text) - num_letters) * SPACE_S - PAUSE_S


def captions(path: Path, spoken: list[tuple[float, str]], shifts_s: list[float]) -> list[Row]:
    return [
        Row(
            f"{path.stem}-{n}", path, text, "xx", signer="anna", video=path.stem,
            start_s=max(0.0, start_s + shift_s), end_s=start_s + length_of(text) + shift_s,
        )
        for n, ((start_s, text), shift_s) in enumerate(zip(spoken, shifts_s, strict=True))
    ]  # fmt: skip


def off_by(rows: list[Row], spoken: list[tuple[float, str]]) -> float:
    """Seconds of the start or end that is farthest from the truth."""
    return max(
        max(abs(row.start_s - start_s), abs(row.end_s - start_s - length_of(text)))
        for row, (start_s, text) in zip(rows, spoken, strict=True)
    )


def in_order(rows: list[Row]) -> bool:
    return all(one.start_s < one.end_s <= other.start_s for one, other in pairwise(rows))


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join("".join(rng.choice(list(LETTERS), rng.integers(3, 6))) for _ in range(count))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as the hub has them, with a model that hears tones."""
    folder = tmp_path_factory.mktemp("tones")
    (folder / "vocab.json").write_text(json.dumps({piece: n for n, piece in enumerate(VOCABULARY)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True).save_pretrained(folder)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    net = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, conv_dim=(64, 32), conv_kernel=(320, 1), conv_stride=(320, 1),
            feat_extract_norm="layer", num_feat_extract_layers=2, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0, hidden_dropout=0.0,
            attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0, final_dropout=0.0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(120):
        sounds, labels = [], []
        for _ in range(8):
            text = words(rng, 4)
            sound = np.zeros(4 * RATE, np.float32)
            spoken = say(text, rng)[: len(sound)]
            sound[: len(spoken)] = spoken
            sound += rng.normal(0, 0.003, len(sound))
            sounds.append((sound - sound.mean()) / sound.std())
            labels.append(labels_of(text, 400)[:200])
        logits = net(torch.from_numpy(np.stack(sounds))).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.stack(labels).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "aac"), ("mkv", "flac"), ("webm.mkv", "libopus")])
def test_captions_move_to_where_they_are_spoken(model: str, tmp_path: Path, suffix: str, codec: str) -> None:
    rng = np.random.default_rng(1)
    spoken = [(start_s, words(rng, 3)) for start_s in (2.0, 6.5, 12.0, 30.0)]
    path = tmp_path / f"talk.{suffix}"
    record(path, spoken, 36.0, codec)
    rows = {"train": captions(path, spoken, [1.7, -1.2, 2.0, 1.0]), "dev": []}
    new, notes = retime(rows, model)
    assert off_by(new["train"], spoken) < 0.1
    assert in_order(new["train"])
    assert [replace(row, start_s=0, end_s=0) for row in new["train"]] == [
        replace(row, start_s=0, end_s=0) for row in rows["train"]
    ]
    assert new["dev"] == []
    assert len(notes) == 1
    assert notes[0].startswith("align: 4 captions re-timed, their starts by -0.8")
    assert notes[0].endswith("; 0 kept their times")
    assert retime(rows, model) == (new, notes)


def test_long_talks_are_placed_piece_by_piece(model: str, tmp_path: Path) -> None:
    """Four minutes without a pause longer than half a second; every fourth sentence has no caption."""
    rng = np.random.default_rng(2)
    said, at_s = [], 1.0
    while at_s < 235:
        said.append((at_s, words(rng, int(rng.integers(2, 6)))))
        at_s += length_of(said[-1][1]) + rng.uniform(0.2, 0.5)
    record(tmp_path / "talk.mkv", said, 240.0)
    spoken = [sentence for n, sentence in enumerate(said) if n % 4]
    rows = captions(tmp_path / "talk.mkv", spoken, [1.0 + math.sin(n) for n in range(len(spoken))])
    rng.shuffle(rows)  # the order of a table is nobody's promise, and a video's clips may be in two splits
    new, notes = retime({"train": rows[10:], "dev": rows[:10]}, model)
    assert notes[0].startswith(f"align: {len(spoken)} captions re-timed")
    assert [row.id for row in new["dev"] + new["train"]] == [row.id for row in rows]
    both = sorted(new["train"] + new["dev"], key=lambda row: int(row.id.split("-")[1]))
    assert off_by(both, spoken) < 0.2
    assert in_order(both)


def test_equal_sentences_are_told_apart_by_their_order(model: str, tmp_path: Path) -> None:
    """Over two minutes, so that some of a row are placed with one piece and some with the next."""
    rng = np.random.default_rng(4)
    spoken = [(3.0 + 2 * n, words(rng, 2) if n % 7 == 3 else "abc dead") for n in range(60)]
    record(tmp_path / "talk.mkv", spoken, 126.0)
    for shift_s in (1.5, -1.5):
        new, _ = retime({"train": captions(tmp_path / "talk.mkv", spoken, [shift_s] * 60)}, model)
        assert off_by(new["train"], spoken) < 0.1


def test_of_equal_sentences_the_nearer_is_taken(model: str, tmp_path: Path) -> None:
    said = [(10.0, "gag fab"), (13.0, "gag fab")]
    record(tmp_path / "talk.mkv", said, 20.0)
    for sentence, shift_s in zip(said, (0.5, -0.5), strict=True):
        new, _ = retime({"train": captions(tmp_path / "talk.mkv", [sentence], [shift_s])}, model)
        assert off_by(new["train"], [sentence]) < 0.1


def test_what_is_said_beyond_the_margin_is_not_taken(model: str, tmp_path: Path) -> None:
    """Word for word it is said twice, but too far away; within the margin only nearly so."""
    said = [(5.0, "bad cafe"), (7.0, "gag fab"), (14.0, "gag fad"), (21.0, "gag fab"), (23.0, "head deaf")]
    record(tmp_path / "talk.mkv", said, 28.0)
    spoken = [said[0], said[2], said[4]]
    rows = captions(tmp_path / "talk.mkv", spoken, [1.0, 0.5, -1.0])
    rows[1] = replace(rows[1], text="gag fab")
    new, _ = retime({"train": rows}, model)
    assert off_by(new["train"], spoken) < 0.15


def test_what_is_not_heard_keeps_its_time_and_is_counted(model: str, tmp_path: Path) -> None:
    spoken = [(3.0, "bad cafe"), (8.0, "head deaf"), (20.0, "gag fab")]
    record(tmp_path / "talk.mkv", spoken, 26.0)
    rows = captions(tmp_path / "talk.mkv", spoken, [1.5, 1.5, -1.0])
    unheard = replace(rows[0], id="unheard", text="fgfgf hghghg", start_s=6.0, end_s=8.0)
    foreign = replace(rows[0], id="foreign", text="привет abc", start_s=12.0, end_s=14.0)
    number = replace(rows[0], id="number", text="1984!", start_s=14.0, end_s=15.0)
    crowded = replace(rows[0], id="crowded", text="a" * 400, start_s=16.0, end_s=17.0)
    late = replace(rows[0], id="late", start_s=70.0, end_s=71.0)
    timeless = replace(rows[0], id="timeless", start_s=None, end_s=None)
    whole = replace(rows[0], id="whole", start_s=0.0, end_s=900.0)
    kept = [unheard, foreign, number, crowded, late, timeless, whole]
    new, notes = retime({"train": rows + kept}, model)
    assert off_by(new["train"][:3], spoken) < 0.1
    assert new["train"][3:] == kept
    assert len(notes) == 1
    assert notes[0].endswith(
        "7 kept their times: 1 longer than 300 s, 2 not heard, 2 not in the model's letters, "
        "1 with more letters than frames, 1 without times"
    )


def test_captions_that_fit_only_alone_are_taken_singly(model: str, tmp_path: Path) -> None:
    record(tmp_path / "talk.mkv", [(8.0, "bad cafe")], 16.0)
    rows = captions(tmp_path / "talk.mkv", [(8.0, "bad cafe")], [0.0])
    crowd = [replace(rows[0], text="ab" * count, start_s=6.0, end_s=7.0) for count in (160, 150)]
    new, notes = retime({"train": crowd}, model)
    assert new["train"] == crowd
    assert notes[0].endswith("2 kept their times: 1 not heard, 1 with more letters than frames")


def test_a_margin_bounds_how_far_a_caption_moves(model: str, tmp_path: Path) -> None:
    spoken = [(12.0, "bad cafe")]
    record(tmp_path / "talk.mkv", spoken, 16.0)
    rows = {"train": captions(tmp_path / "talk.mkv", spoken, [-4.0])}
    assert off_by(retime(rows, model)[0]["train"], spoken) < 0.1
    assert retime(rows, model, margin_s=3.0)[0] == rows


def test_a_kept_caption_gives_way_to_its_neighbours(model: str, tmp_path: Path) -> None:
    spoken = [(3.0, "bad cafe"), (8.0, "head deaf")]
    record(tmp_path / "talk.mkv", spoken, 14.0)
    rows = captions(tmp_path / "talk.mkv", spoken, [-1.0, -1.0])
    between = replace(rows[0], text="1984", start_s=3.5, end_s=6.5)
    covered = replace(rows[0], text="2001", start_s=8.2, end_s=8.6)
    new, notes = retime({"train": [*rows, between, covered]}, model)
    first, second, cut, old = new["train"]
    assert (cut.start_s, cut.end_s) == (first.end_s, 6.5)
    assert first.end_s > 3.5
    assert old == covered
    assert notes[1:] == [
        "align: 1 of those kept were cut where a re-timed neighbour is",
        "align: 1 of those kept overlap a re-timed neighbour",
    ]


def test_videos_that_cannot_be_heard_are_counted_and_kept(model: str, tmp_path: Path) -> None:
    spoken = [(1.0, "bad cafe")]
    record(tmp_path / "cut.mp4", spoken, 5.0, "aac")
    whole = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with av.open(str(tmp_path / "silent.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        container.mux(stream.encode())
    (tmp_path / "frames").mkdir()
    names = ("absent.mp4", "cut.mp4", "silent.mp4", "frames")
    rows = {"train": [row for name in names for row in captions(tmp_path / name, spoken, [1.0])]}
    assert retime(rows, model) == (
        rows,
        [
            "align: 0 captions re-timed; 4 kept their times: 2 in videos whose sound breaks, "
            "2 in videos without sound",
            "align: 2 videos whose sound breaks (absent.mp4, cut.mp4)",
            "align: 2 videos without sound (frames, silent.mp4)",
        ],
    )


def test_sound_is_read_at_its_own_times(tmp_path: Path) -> None:
    record(tmp_path / "late.mkv", [(0.5, "a")], 2.0, sound_from_s=3.0)
    sound = read_sound(tmp_path / "late.mkv", 8000)
    assert sound is not None
    assert sound.dtype == np.int16
    assert len(sound) == pytest.approx(5 * 8000, abs=80)
    loud = np.flatnonzero(np.abs(sound) > 3000) / 8000
    assert loud[0] == pytest.approx(3.5, abs=0.01)
    assert loud[-1] == pytest.approx(3.6, abs=0.01)


def test_windows_leave_no_seam(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    sound = say(words(rng, 60), rng)
    sound = ((sound + rng.normal(0, 0.003, len(sound))) * 32767).astype(np.int16)
    recogniser = Recogniser(model)
    whole_T2, whole_TC = recogniser.listen(sound[: 29 * RATE])
    monkeypatch.setattr(align, "_WINDOW_S", 4.0)
    parts_T2, parts_TC = recogniser.listen(sound[: 29 * RATE])
    assert np.all(np.diff(parts_T2[:, 0]) > 0)
    assert abs(len(parts_T2) - len(whole_T2)) <= 8
    nearest = np.abs(whole_T2[:, :1] - parts_T2[:, 0]).argmin(1)
    assert np.mean(whole_TC.argmax(1) == parts_TC[nearest].argmax(1)) > 0.95


def test_texts_are_spelt_in_the_letters_of_the_model(model: str) -> None:
    recogniser = Recogniser(model)

    def spelt(text: str) -> str:
        return "".join("*" if n < 0 else VOCABULARY[n] for n in recogniser.spell(text))

    assert spelt("Abc,  DÉF!") == "ABC|DEF"
    assert spelt("(abc) – def") == "ABC|DEF"
    assert spelt("abc 1984 def") == "ABC|*|DEF"
    assert spelt("a1zb 22 abc") == "A*B|*|ABC"
    assert spelt("1984") == spelt("...") == spelt("") == ""


def test_a_number_within_a_caption_is_passed_over(model: str, tmp_path: Path) -> None:
    record(tmp_path / "talk.mkv", [(3.0, "bad cafe gghh fed")], 9.0)
    row = captions(tmp_path / "talk.mkv", [(3.0, "bad cafe gghh fed")], [1.5])[0]
    new, _ = retime({"train": [replace(row, text="Bad café 1984 fed.")]}, model)
    assert off_by(new["train"], [(3.0, "bad cafe gghh fed")]) < 0.1


class _Opens:
    """Whoever unpickles it writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def test_models_that_cannot_serve_are_refused(model: str, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        (tmp_path / name).mkdir()
        for file in Path(model).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        return tmp_path / name

    with pytest.raises(UserError, match=r"must be a hub id or a folder .* there is none: .*nowhere"):
        retime({"train": []}, str(tmp_path / "nowhere"))

    bert = copy("bert")
    tiny = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertForMaskedLM(tiny).save_pretrained(bert)
    with pytest.raises(
        UserError, match=r"must name a CTC model .* the model of .* does not load: .*BertConfig"
    ):
        retime({"train": []}, str(bert))

    headless = copy("headless")
    Wav2Vec2Model(Wav2Vec2Config.from_pretrained(model)).save_pretrained(headless)
    with pytest.raises(UserError, match=r"was never trained to write letters: it lacks lm_head"):
        retime({"train": []}, str(headless))

    without_tokenizer = copy("without_tokenizer")
    for name in ("vocab.json", "tokenizer_config.json"):
        (without_tokenizer / name).unlink()
    with pytest.raises(UserError, match=r"the tokenizer of .* does not load"):
        retime({"train": []}, str(without_tokenizer))

    pieces = copy("pieces")
    (pieces / "vocab.json").write_text(json.dumps({p * (1 + (n > 4)): n for n, p in enumerate(VOCABULARY)}))
    with pytest.raises(UserError, match="must name a model that writes single letters"):
        retime({"train": []}, str(pieces))

    larger = copy("larger")
    (larger / "vocab.json").write_text(json.dumps({p: n for n, p in enumerate([*VOCABULARY, "Q", "R"])}))
    with pytest.raises(UserError, match="must have an output for each piece"):
        retime({"train": []}, str(larger))

    pickled = copy("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({"lm_head.bias": _Opens(str(tmp_path / "ran"))}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"the model of .* does not load: it holds more than tensors"):
        retime({"train": []}, str(pickled))

    torn = copy("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"the model of .* does not load"):
        retime({"train": []}, str(torn))

    stranger = copy("stranger")
    (stranger / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "stranger", "auto_map": {"AutoConfig": "code.C", "AutoModelForCTC": "code.M"}}
    (stranger / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the model of .* does not load"):
        retime({"train": []}, str(stranger))
    assert not (tmp_path / "ran").exists()


def test_shards_start_without_torch_and_say_so_when_it_is_needed() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from shards.align import UserError, retime\n"
        "assert 'torchaudio' not in sys.modules and 'transformers' not in sys.modules\n"
        "try: retime({}, 'x')\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "--align needs torch, torchaudio and transformers, but they do not import ("
    )
