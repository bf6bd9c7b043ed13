"""Tiny corpora in the exact layouts of the real ones, and what was built from them."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np


def write_frames(folder: Path, num_frames: int, shade: int = 0) -> None:
    folder.mkdir(parents=True)
    for number in range(num_frames):
        image = np.full((26, 21, 3), (shade * 40 + number * 5) % 256, np.uint8)
        cv2.imwrite(str(folder / f"images{number + 1:04d}.png"), image)


def write_video(
    path: Path, num_frames: int, fps: int = 10, half_black: bool = False
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(num_frames):
            image = np.full((48, 64, 3), 6 * number % 256, np.uint8)
            if half_black:
                image[:, 32:], image[:, :32] = 200, 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_audio(path: Path) -> None:
    """A file with sound and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])


PHOENIX_HEADER = "name|video|start|end|speaker|orth|translation"


def make_phoenix(
    root: Path, *, counts=(7, 2, 2), newline: str = "\n", with_1: bool = False
) -> Path:
    """A PHOENIX14T release; clip n of a split has n + 1 frames. Returns the release's folder."""
    inner = root / "PHOENIX-2014-T-release-v3" / "PHOENIX-2014-T"
    for split, count in zip(("train", "dev", "test"), counts, strict=True):
        lines = [PHOENIX_HEADER]
        for number in range(count):
            name = f"01April_2010_{split}_tagesschau-{number + 1}"
            write_frames(
                inner
                / "features"
                / "fullFrame-210x260px"
                / split
                / name
                / ("1" if with_1 else ""),
                number + 1,
                number,
            )
            text = f'am tag {number} "schönes" wetter'
            lines.append(
                f"{name}|{name}/1/*.png|-1|-1|Signer0{number % 3 + 1}|TAG {number} "
                f"WETTER|{text}"
            )
        table = inner / "annotations" / "manual" / f"PHOENIX-2014-T.{split}.corpus.csv"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(newline.join([*lines, ""]), encoding="utf-8", newline="")
    return inner.parent


HOW2SIGN_HEADER = [
    "VIDEO_ID",
    "VIDEO_NAME",
    "SENTENCE_ID",
    "SENTENCE_NAME",
    "START_REALIGNED",
    "END_REALIGNED",
    "SENTENCE",
]


def make_how2sign(
    root: Path, *, raw: bool, delimiter: str = "\t", newline: str = "\n"
) -> Path:
    """Two videos of 30 frames at 10 fps with two sentences each, in train; ids begin with '-'."""
    rows = [
        (
            "-aB",
            "-aB-5-rgb_front",
            "-aB_0",
            "-aB_0-5-rgb_front",
            "0.5",
            "1.0",
            "Hello, you.",
        ),
        (
            "-aB",
            "-aB-5-rgb_front",
            "-aB_1",
            "-aB_1-5-rgb_front",
            "1.0",
            "2.0",
            "My horseâ\x80\x99s nose.",
        ),
        (
            "-ab",
            "-ab-8-rgb_front",
            "-ab_0",
            "-ab_0-8-rgb_front",
            "0.0",
            "0.7",
            '"""Painting"" the wall."',
        ),
        (
            "-ab",
            "-ab-8-rgb_front",
            "-ab_1",
            "-ab_1-8-rgb_front",
            "2.0",
            "9.0",
            "Past the end.",
        ),
    ]
    lines = [delimiter.join(HOW2SIGN_HEADER)]
    for *fields, text in rows:
        if delimiter in text and not text.startswith('"'):
            text = f'"{text}"'
        lines.append(delimiter.join([*fields, text]))
    place = root / "sentence_level" / "train"
    table = (
        place / "text" / "en" / "raw_text" / "re_aligned" / "how2sign_realigned_train.csv"
    )
    table.parent.mkdir(parents=True)
    table.write_text(newline.join([*lines, ""]), encoding="utf-8", newline="")
    if raw:
        for name in sorted({row[1] for row in rows}):
            write_video(
                root / "video_level" / "train" / "rgb_front" / "raw_videos" / f"{name}.mp4",
                30,
            )
    else:
        for number, row in enumerate(rows):
            write_video(place / "rgb_front" / "raw_videos" / f"{row[3]}.mp4", 4 + number)
    return root


CSL_CLIPS = {  # name -> (split, characters, glosses)
    "S000007_P0003_T00": ("train", ["他", "是", "谁", "？"], ["他", "谁"]),
    "S000005_P0004_T00": ("train", ["你", "好", "。"], ["你", "好"]),
    "S000010_P0000_T01": (
        "train",
        ["3", "0", "元", "，", "不", "贵", "。"],
        ["30", "钱", "贵", "不"],
    ),
    "S000020_P0004_T00": ("dev", ["谢", "谢", "！"], ["谢谢"]),
    "S000030_P0009_T00": ("test", ["再", "见", "。"], ["再见"]),
}
CSL_MISSING = "S000005_P0004_T00"


def make_csl_daily(
    root: Path,
    *,
    frames: str = "sentence/frames_512x512",
    annotation: str = "pickle",
    gloss: type = list,
    missing: str = CSL_MISSING,
) -> Path:
    """CSL-Daily with frames of 64x64, black in their top 10 rows; clip n has 3 + n of them.

    annotation: pickle, map or both. missing: a clip that is in the split file alone, ""
    for none.
    """
    labels = root / "sentence_label"
    labels.mkdir(parents=True)
    there = {name: clip for name, clip in CSL_CLIPS.items() if name != missing}
    for number, name in enumerate(there):
        (root / frames / name).mkdir(parents=True)
        for frame in range(3 + number):
            image = np.full((64, 64, 3), 200 - 10 * frame, np.uint8)
            image[:10] = 0
            cv2.imwrite(str(root / frames / name / f"{frame:06d}.jpg"), image)
    splits = ["name|split", *(f"{name}|{clip[0]}" for name, clip in CSL_CLIPS.items())]
    (labels / "split_1.txt").write_text("\n".join([*splits, ""]), encoding="utf-8")
    if annotation != "map":
        info = [
            {
                "name": name, "length": 3 + number,
                "label_gloss": signs if gloss is list else " ".join(signs),
                "label_char": characters, "label_word": characters, "label_postag": ["x"] * len(characters),
                "signer": int(name[9:13]), "time": int(name[-2:]),
            }
            for number, (name, (_, characters, signs)) in enumerate(there.items())
        ]  # fmt: skip
        content = {
            "info": info,
            "gloss_map": ["他"],
            "char_map": ["是"],
            "word_map": [],
            "postag_map": [],
        }
        (labels / "csl2020ct_v2.pkl").write_bytes(pickle.dumps(content))
    if annotation != "pickle":
        lines = ["index|name|length|gloss|char|word|postag"]
        for number, (name, (_, characters, signs)) in enumerate(there.items()):
            cells = (signs, characters, characters, ["x"] * len(characters))
            lines.append(
                "|".join([str(number), name, str(3 + number), *map(" ".join, cells)])
            )
        (labels / "video_map.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return root


OPENASL_ROWS = [  # yid, start, end, text, split, box
    (
        "-aB_cD.fGh1",
        "00:00:00.500",
        "00:00:01.000",
        'He said: "Hello."',
        "train",
        [0.5, 0.0, 1.0, 1.0],
    ),
    ("-aB_cD.fGh1", "00:00:01.000", "00:00:02.000", "It's 5.30 pm.", "train", None),
    (
        "_b-C-dEfGh2",
        "00:00:00.000",
        "00:00:00.700",
        '"Quoted, but not closed.',
        "valid",
        [-0.1, 0, 0.5, 1.2],
    ),
    (
        "cccccccccc3",
        "00:00:01.000",
        "00:01:09.000",
        "Past the end.",
        "test",
        [0.25, 0.0, 0.75, 0.5],
    ),
]


def make_openasl(
    root: Path, *, raw: bool, colon: str = ":", boxes: bool = True, newline: str = "\n"
) -> Path:
    """OpenASL with three videos of 30 frames at 10 fps, left half black, or four
    ready-made clips."""
    lines = [
        "\t".join(
            ["vid", "yid", "start", "end", "raw-text", "tokenized-text", "gloss", "split"]
        )
    ]
    found = {}
    for number, (yid, start, end, text, split, box) in enumerate(OPENASL_ROWS):
        vid = f"{yid}-{start}-{end}"
        lines.append(
            "\t".join([vid, yid, start, end, text, text.lower(), f"SIGN{number}", split])
        )
        if box:
            found[vid] = box
        if raw:
            write_video(root / "raw-video" / f"{yid}.mp4", 30, half_black=True)
        else:
            write_video(root / "video-clip" / f"{vid.replace(':', colon)}.mp4", 4 + number)
    (root / "data").mkdir()
    table = newline.join([*lines, ""])
    (root / "data" / "openasl-v1.0.tsv").write_text(table, encoding="utf-8", newline="")
    if boxes:
        (root / "data" / "bbox-v1.0.json").write_text(json.dumps(found))
    return root


def write_vtt(path: Path, cues: list[tuple[str, str, str]], header: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = [f"{start} --> {end}\n{text}" for start, end, text in cues]
    path.write_text("\n\n".join(["WEBVTT" + header, *blocks, ""]), encoding="utf-8")


def built_clips(
    out: Path, split: str
) -> dict[str, tuple[dict[str, Any], list[np.ndarray]]]:
    """(the JSON, the frames as any player decodes them) of each clip of a split, by the
    corpus's id."""
    clips = {}
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for key in {name.split(".")[0] for name in members}:
            facts = json.loads(members[f"{key}.json"])
            with av.open(io.BytesIO(members[f"{key}.avi"])) as container:
                frames = [
                    frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)
                ]
            clips[facts["id"]] = (facts, frames)
    return clips
