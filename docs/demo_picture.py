"""Draw the picture of docs/demo.md: the page of `flallm demo` after a translation.

It joins clips of signsim to one video, starts the demo, and translates the video in a
headless Chromium. It needs the packages of the tests and Chromium (.ci/install_chromium).
"""

import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from flallm_ds import command
from flallm_ds.data.codecs.h264 import encode_h264
from flallm_ds.errors import UserError

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FPS = 25
# A pause before each sentence and after the last one, at which the video is cut.
PAUSE_S = 0.8
WIDTH_PX = 765
NAME = "weather.mp4"


def demo_picture(
    *, model: str, corpus: Path, out: Path, clips: tuple[int, ...] = (8, 15, 29)
) -> None:
    """Draw the page of the demo with the translation of a video of several sentences.

    --model: as of flallm demo. --corpus: a folder of flallm signsim corpus. --out: a PNG.
    --clips: numbers of clips of the test split.
    """
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / NAME
        write_video(video, [read_clip(corpus, number) for number in clips])
        server = subprocess.Popen(
            [sys.executable, "-m", "flallm_ds", "demo", f"--model={model}", "--port=0"],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            words = server.stdout.readline().split()
            if not words:
                raise UserError("Cannot start the demo: the lines above say why.")
            draw(words[0], video, out)
        finally:
            server.terminate()
            server.wait()
    print(out)


def read_clip(corpus: Path, number: int) -> list[np.ndarray]:
    """Return the frames of a clip of the test split, uint8 RGB."""
    pattern = f"**/test/signsim_test-{number:06}/**/*.png"
    frames = []
    for path in sorted(corpus.glob(pattern)):
        frames.append(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB))
    if not frames:
        raise UserError(f"--corpus must hold {pattern}, got {corpus}.")
    return frames


def write_video(path: Path, clips: list[list[np.ndarray]]) -> None:
    """Write the clips to one mp4, with pauses."""
    num_still = round(PAUSE_S * FPS)
    frames = []
    for clip in clips:
        frames += [clip[0]] * num_still + clip + [clip[-1]] * num_still
    path.write_bytes(encode_h264(frames, FPS, gop=12, crf=20))


def draw(url: str, video: Path, out: Path) -> None:
    """Translate the video on the page, open the hypotheses of its first sentence, press a
    word of the sentence, and write a picture of the whole page."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"):
        options.add_argument(flag)
    # With the path of a driver, selenium asks no server for one.
    with webdriver.Chrome(options=options, service=Service(DRIVER)) as browser:
        browser.set_window_size(WIDTH_PX, 1000)
        browser.get(url)
        state = browser.find_element(By.ID, "state")
        wait(lambda: "into" in browser.find_element(By.ID, "model").text)
        browser.find_element(By.ID, "file").send_keys(str(video))
        Select(browser.find_element(By.ID, "long")).select_by_value("true")
        browser.find_element(By.ID, "translate").click()
        wait(lambda: state.text.startswith("Done"))
        browser.find_element(By.CSS_SELECTOR, "details:not(.attention) summary").click()
        browser.find_elements(By.CSS_SELECTOR, ".heat button")[-1].click()
        browser.execute_script("document.activeElement.blur()")
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.set_window_size(WIDTH_PX, height + 150)
        time.sleep(1)  # the frame of the video, and its subtitle
        content = browser.find_element(By.TAG_NAME, "body").screenshot_as_png
    # 256 colours take a third of the bytes.
    picture = Image.open(io.BytesIO(content)).convert("RGB").quantize(256)
    picture.save(out, "PNG", optimize=True)


def wait(holds: Callable[[], bool]) -> None:
    """Wait until a condition is true; raise UserError after two minutes."""
    end = time.monotonic() + 120
    while not holds():
        if time.monotonic() > end:
            raise UserError("Cannot draw the page: it did not reach the state. Open it.")
        time.sleep(0.1)


if __name__ == "__main__":
    command.main(demo_picture)
