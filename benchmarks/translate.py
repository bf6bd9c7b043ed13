"""Measure the time of one short video, and the memory of long ones, in `flallm translate`.

python -m benchmarks.translate --model=runs/quickstart_llm --out=benchmarks/results

Without --model, the model has the sizes of the quickstart's and is not trained: its sentences
mean nothing, and are as long as the search allows.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from benchmarks.measure import ROOT, Report, cpu_seconds, spread
from flallm_ds import command

FPS = 25
# 720p, as of most cameras and corpora of web videos.
HEIGHT, WIDTH = 720, 1280
# A sentence of 3 s, then a rest of 1 s.
SIGNED_S, REST_S = 3, 1
# Runs the command; at its exit, the process prints its highest memory to stderr. The
# resource usage of a child would contain the memory of this process, from which it starts.
SCRIPT = """
import atexit, pathlib, re, sys

def report():
    status = pathlib.Path("/proc/self/status").read_text()
    print(re.search("VmHWM:.*", status)[0], file=sys.stderr)

atexit.register(report)
from flallm_ds.cli import run
run()
"""
TRAINED = ", trained. It makes some sentence of the signer of the videos"
UNTRAINED = (
    " and random weights, so every sentence has 40 tokens, the most that the search allows: "
    "an upper bound"
)
TIME_COLUMNS = ("a video of 4 s, 720p", "clock, s", "CPU time, s")
MEMORY_COLUMNS = (
    "video",
    "option",
    "sentences",
    "highest memory, MB",
    "clock, s",
    "CPU, s",
)


def run(
    *,
    model: Path | None = None,
    out: Path | None = None,
    hardware: str | None = None,
    short_s: int = 60,
    long_s: int = 300,
    rounds: int = 3,
) -> str:
    """Translate a sentence of 4 s cold and warm, and two longer videos in windows.

    --model: a trained model of the quickstart; by default an untrained one of its sizes.
    --short_s, --long_s: lengths of the longer videos in seconds. --rounds: of the sentence.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trained = model is not None
        model = model.resolve() if model else untrained_export(folder)
        clip = write_turn(folder / "clip.mp4")
        cold = [translated(model, clip) for _ in range(rounds)]
        warm = warm_times(model, clip, rounds)
        rows = [row_of(model, clip, SIGNED_S + REST_S)]
        for length_s in (short_s, long_s):
            times = length_s // (SIGNED_S + REST_S)
            video = repeat(clip, folder / f"{length_s}.mp4", times)
            rows.append(row_of(model, video, length_s, "--long"))
        rows.append(row_of(model, video, length_s, "--long=false"))
    report = Report(__file__, "flallm translate", {"transformers": "", "deepspeed": ""})
    report.text(
        f"The model {'is' if trained else 'has the sizes of'} the quickstart's (ResNet-18 a "
        "quarter as wide at 60 px, an mBART of 2 + 2 layers, beam 5)"
        f"{TRAINED if trained else UNTRAINED}. Cold: the whole command, with its imports and "
        f"the model. Warm: the model is loaded. {rounds} rounds. Load of the "
        f"machine at the end: {os.getloadavg()[0]:.1f}; the CPU time does not depend on it."
    )
    report.table(
        TIME_COLUMNS,
        [
            (
                "cold",
                spread([run_[0] for run_ in cold], 1),
                spread([run_[1] for run_ in cold], 1),
            ),
            (
                "warm",
                spread([run_[0] for run_ in warm], 2),
                spread([run_[1] for run_ in warm], 2),
            ),
        ],
    )
    report.text(
        "Memory is the largest resident memory of the process; importing torch and loading "
        "the model are most of it. In windows, the length of a video does not matter. As "
        "one sentence (`--long=false`), 512 frames are kept, and the video is read twice."
    )
    report.table(MEMORY_COLUMNS, rows)
    return report.finish(out, hardware)


def row_of(model: Path, video: Path, length_s: int, option: str = "") -> tuple[str, ...]:
    clock_s, cpu_s, memory_mb, num_sentences = translated(model, video, option)
    return (
        f"{length_s} s",
        f"`{option}`" if option else "",
        f"{num_sentences}",
        f"{memory_mb:,.0f}",
        f"{clock_s:.1f}",
        f"{cpu_s:.1f}",
    )


def translated(
    model: Path, video: Path, option: str = ""
) -> tuple[float, float, float, int]:
    """Run the command; return seconds, CPU seconds, highest memory in MB, and sentences."""
    words = [sys.executable, "-c", SCRIPT, "translate", str(video), f"--model={model}"]
    output, messages = video.with_suffix(".txt"), video.with_suffix(".log")
    begin = time.perf_counter()
    with output.open("w") as file, messages.open("w") as log:
        process = subprocess.Popen(
            words + ([option] if option else []),
            cwd=ROOT,
            stdout=file,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        # wait4 gives the usage of this process alone.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, messages.read_text()
    kilobytes = messages.read_text().split("VmHWM:")[1].split()[0]
    cpu_s = usage.ru_utime + usage.ru_stime
    num_sentences = len(output.read_text().splitlines())
    return time.perf_counter() - begin, cpu_s, int(kilobytes) / 1024, num_sentences


def warm_times(model: Path, video: Path, rounds: int) -> list[tuple[float, float]]:
    """Return (seconds, CPU seconds) of each round in this process, after one round."""
    from flallm_ds.inference import Translator

    translator = Translator.from_pretrained(model, "cpu")
    found = []
    for number in range(rounds + 1):
        begin, cpu_begin = time.perf_counter(), cpu_seconds()
        translator.translate(video)
        if number:
            found.append((time.perf_counter() - begin, cpu_seconds() - cpu_begin))
    return found


def untrained_export(folder: Path) -> Path:
    """Write an export with the sizes of the quickstart's and random weights."""
    from flallm_ds import export
    from flallm_ds.data.index import Index
    from flallm_ds.data.storage.store import LocalStore
    from flallm_ds.data.text.codec import TextCodec
    from flallm_ds.data.text.prompt import Instruction
    from flallm_ds.models.adapters import Adapter
    from flallm_ds.models.feature_extractor import FeatureExtractor
    from flallm_ds.models.llm.load import LlmOptions, embedding_scale, llm_width, load_llm
    from flallm_ds.models.llm.standin import standin_llm
    from flallm_ds.models.llm.trim import trim_llm
    from flallm_ds.models.sign_translator import SignTranslator
    from flallm_ds.models.visual_encoder import VisualEncoder
    from flallm_ds.models.weights import named_state
    from flallm_ds.recipes import resolve
    from flallm_ds.signsim.corpus import draw_monolingual

    texts = draw_monolingual(2000, seed=0)
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    standin_llm(str(folder / "texts.txt"), folder / "llm", steps=1)
    config = resolve("llm", "quickstart", {"llm.name": str(folder / "llm")})
    instruction = Instruction(language="de_DE", languages=("de",))
    codec = TextCodec.for_training_text(config.llm.name, instruction, texts, trim=True)
    (folder / "trimmed").mkdir()
    trim_llm(config.llm.name, codec, folder / "trimmed")
    llm = load_llm(str(folder / "trimmed"), LlmOptions())
    extractor = FeatureExtractor(VisualEncoder(config.visual.width)).eval()
    adapter = Adapter(extractor.feature_width, llm_width(llm), embedding_scale(llm))
    model = SignTranslator(extractor, adapter, llm, codec).eval()
    # The frames of the quickstart's shards.
    sizes = {"height": 79, "width": 64, "num_frames": 150, "fps": FPS}
    arrays = {name: np.array([value]) for name, value in sizes.items()}
    index = Index(LocalStore("shards"), "signsim", "train", "", (), arrays)
    visual = extractor.settings(), extractor.encoder.settings()
    (folder / "best").mkdir()
    settings = export.settings_of(config, index, {}, *visual)
    export.write(folder / "best", settings, named_state(model), llm, codec)
    return folder / "best"


def write_turn(path: Path) -> Path:
    """Write H.264 of 720p, in which a signer signs for 3 s and rests for 1 s."""
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "g": "50"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number, picture in enumerate(turn()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def repeat(turn_path: Path, path: Path, times: int) -> Path:
    """Write a video that shows another one several times, without encoding it again."""
    with av.open(str(path), "w") as container:
        stream = None
        for number in range(times):
            with av.open(str(turn_path)) as source:
                video = source.streams.video[0]
                if stream is None:
                    stream = container.add_stream_from_template(video)
                later = number * round((SIGNED_S + REST_S) / video.time_base)
                for packet in source.demux(video):
                    if packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + later, packet.dts + later
                        packet.stream = stream
                        container.mux(packet)
    return path


def turn() -> Iterator[np.ndarray]:
    """Yield the frames of a sentence and a rest, 720p."""
    from flallm_ds.signsim.corpus import plan_clip
    from flallm_ds.signsim.render import render_clip
    from flallm_ds.signsim.signer import SIGNERS, clip_poses, rest_pose
    from flallm_ds.signsim.signs import SIGNS

    rng = np.random.default_rng(0)
    poses: list[np.ndarray] = []
    number = 0
    while len(poses) < SIGNED_S * FPS:
        clip, _ = plan_clip(number, 40, 0)
        signs = [SIGNS[gloss] for gloss in clip.sentence.glosses]
        poses += list(clip_poses(signs, SIGNERS[0], rng)[1:-1])
        number += 1
    poses = poses[: SIGNED_S * FPS] + [rest_pose()] * (REST_S * FPS)
    for frame in render_clip(np.stack(poses), SIGNERS[0], rng):
        scaled = cv2.resize(frame[:, :, ::-1], (HEIGHT * 210 // 260, HEIGHT))
        side = WIDTH - scaled.shape[1]
        yield np.pad(scaled, ((0, 0), (side // 2, side - side // 2), (0, 0)), "edge")


if __name__ == "__main__":
    command.main(run)
