"""Load clips with SPDL for benchmarks.loader, in an environment without flallm_ds.

The first line of stdin is the job, each later line requests a pass. Each is answered by a line
of counts. Both ways read a clip by one pread and decode in the Pipeline of SPDL with as many
threads as our loader:
    video   spdl.io.load_video of the Motion-JPEG member if all frames are kept, else of the kept
            JPEGs in a row (format `mjpeg` of FFmpeg). This was the fastest way found.
    images  spdl.io.load_image_batch of the kept JPEGs, the documented way for images.
"""

import json
import os
import sys

import spdl.io
from spdl.pipeline import PipelineBuilder


def read(clip: dict) -> bytes:
    file = os.open(clip["path"], os.O_RDONLY)
    try:
        return os.pread(file, clip["size"], clip["offset"])
    finally:
        os.close(file)


def load_as_video(clip: dict, whole: bool) -> object:
    member = read(clip)
    if whole:
        return spdl.io.load_video(member)
    kept = b"".join([member[begin : begin + size] for begin, size in clip["spans"]])
    return spdl.io.load_video(kept, demux_config=spdl.io.demux_config(format="mjpeg"))


def load_as_images(clip: dict) -> object:
    member = read(clip)
    kept = [member[begin : begin + size] for begin, size in clip["spans"]]
    return spdl.io.load_image_batch(kept, width=None, height=None, pix_fmt="rgb24")


def one_pass(job: dict) -> dict[str, int]:
    def load(clip: dict) -> object:
        return (
            load_as_video(clip, job["whole"])
            if job["way"] == "video"
            else load_as_images(clip)
        )

    builder = (
        PipelineBuilder().add_source(job["clips"]).pipe(load, concurrency=job["threads"])
    )
    pipeline = builder.add_sink(3).build(num_threads=job["threads"])
    num_frames = 0
    with pipeline.auto_stop():
        for buffer in pipeline.get_iterator(timeout=60):
            num_frames += len(spdl.io.to_numpy(buffer))
    expected = sum(len(clip["spans"]) for clip in job["clips"])
    if num_frames != expected:
        sys.exit(f"The number of frames of SPDL must be {expected}, got {num_frames}.")
    return {"frames": num_frames, "clips": len(job["clips"])}


job = json.loads(sys.stdin.readline())
print("{}", flush=True)
for _ in sys.stdin:
    print(json.dumps(one_pass(job)), flush=True)
