"""Tiny corpora in the exact layouts of the real ones."""

from pathlib import Path

import av
import cv2
import numpy as np


def write_frames(folder: Path, num_frames: int, shade: int = 0) -> None:
    folder.mkdir(parents=True)
    for number in range(num_frames):
        image = np.full((26, 21, 3), (shade * 40 + number * 5) % 256, np.uint8)
        cv2.imwrite(str(folder / f"images{number + 1:04d}.png"), image)


def write_video(path: Path, num_frames: int, fps: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(num_frames):
            image = np.full((48, 64, 3), 6 * number % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


PHOENIX_HEADER = "name|video|start|end|speaker|orth|translation"


def make_phoenix(root: Path, *, counts=(7, 2, 2), newline: str = "\n", with_1: bool = False) -> Path:
    """A PHOENIX14T release; clip n of a split has n + 1 frames. Returns the release's folder."""
    inner = root / "PHOENIX-2014-T-release-v3" / "PHOENIX-2014-T"
    for split, count in zip(("train", "dev", "test"), counts, strict=True):
        lines = [PHOENIX_HEADER]
        for number in range(count):
            name = f"01April_2010_{split}_tagesschau-{number + 1}"
            write_frames(
                inner / "features" / "fullFrame-210x260px" / split / name / ("1" if with_1 else ""),
                number + 1,
                number,
            )
            text = f'am tag {number} "schönes" wetter'
            lines.append(f"{name}|{name}/1/*.png|-1|-1|Signer0{number % 3 + 1}|TAG {number} WETTER|{text}")
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


def make_how2sign(root: Path, *, raw: bool, delimiter: str = "\t", newline: str = "\n") -> Path:
    """Two videos of 30 frames at 10 fps with two sentences each, in train; ids begin with '-'."""
    rows = [
        ("-aB", "-aB-5-rgb_front", "-aB_0", "-aB_0-5-rgb_front", "0.5", "1.0", "Hello, you."),
        ("-aB", "-aB-5-rgb_front", "-aB_1", "-aB_1-5-rgb_front", "1.0", "2.0", "My horseâ\x80\x99s nose."),
        ("-ab", "-ab-8-rgb_front", "-ab_0", "-ab_0-8-rgb_front", "0.0", "0.7", '"""Painting"" the wall."'),
        ("-ab", "-ab-8-rgb_front", "-ab_1", "-ab_1-8-rgb_front", "2.0", "9.0", "Past the end."),
    ]
    lines = [delimiter.join(HOW2SIGN_HEADER)]
    for *fields, text in rows:
        if delimiter in text and not text.startswith('"'):
            text = f'"{text}"'
        lines.append(delimiter.join([*fields, text]))
    place = root / "sentence_level" / "train"
    table = place / "text" / "en" / "raw_text" / "re_aligned" / "how2sign_realigned_train.csv"
    table.parent.mkdir(parents=True)
    table.write_text(newline.join([*lines, ""]), encoding="utf-8", newline="")
    if raw:
        for name in sorted({row[1] for row in rows}):
            write_video(root / "video_level" / "train" / "rgb_front" / "raw_videos" / f"{name}.mp4", 30)
    else:
        for number, row in enumerate(rows):
            write_video(place / "rgb_front" / "raw_videos" / f"{row[3]}.mp4", 4 + number)
    return root
