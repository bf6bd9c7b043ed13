"""The page of `flallm demo` in a real browser, with a real model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from flallm_ds.inference.translator import Translator
from tests.helpers.browser import set_media, wait_until
from tests.helpers.demo_server import Running
from tests.helpers.exports import DECODER_ONLY, write_export
from tests.helpers.long_video import write_long_video
from tests.helpers.paths import SHARED

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def translator(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Translator:
    folder = tmp_path_factory.mktemp("page")
    return Translator.from_pretrained(
        write_export(DECODER_ONLY, tiny_corpus, folder / "run"), "cpu"
    )


@pytest.fixture(scope="module")
def running(translator: Translator) -> Iterator[Running]:
    running = Running(lambda: translator, max_mb=20)
    yield running
    running.stop()


@pytest.fixture
def page(browser: Any, running: Running) -> Any:
    """The browser with the page, when the model is loaded."""
    set_media(browser, prefers_color_scheme="light")
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(f"http://127.0.0.1:{running.port}/")
    wait_until(lambda: "into German, English" in one(browser, "#model").text)
    return browser


def one(driver: Any, selector: str) -> Any:
    return driver.find_element(By.CSS_SELECTOR, selector)


def all_of(driver: Any, selector: str) -> list[Any]:
    return list(driver.find_elements(By.CSS_SELECTOR, selector))


def is_done(driver: Any) -> bool:
    return one(driver, "#state").text.startswith("Done") or one(driver, "#error").text != ""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real clip, or a generated one where there are no real ones."""
    found = sorted((SHARED / "data" / "how2sign").rglob("*.mp4"))
    if found:
        return found[0]
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_long_video(path, 1)
    return path


def test_a_chosen_clip_is_translated_and_shown(
    page: Any, clip: Path, translator: Translator, running: Running
) -> None:
    assert not one(page, "#translate").is_enabled()
    one(page, "#file").send_keys(str(clip))
    Select(one(page, "#language")).select_by_visible_text("English")
    Select(one(page, "#long")).select_by_value("false")
    one(page, "#translate").click()
    wait_until(lambda: is_done(page))
    assert one(page, "#error").text == ""

    expected = translator.searching(nbest=5).nbest(clip, "English")
    sentence = one(page, ".sentence span")
    assert sentence.text == " ".join(expected[0][0].split())
    assert sentence.get_attribute("lang") == "en"
    widths = "return [...document.querySelectorAll('.strip img')].map(i => i.naturalWidth)"
    wait_until(lambda: all(page.execute_script(widths)))
    assert len(all_of(page, ".strip img")) == 8
    one(page, "summary").click()
    scores = [float(cell.text) for cell in all_of(page, "tbody td:first-child")]
    assert scores == pytest.approx([score for _, score in expected], abs=1e-3)
    assert "model" in one(page, "#timing").text
    # The browser plays the clip, and nothing came from another server.
    wait_until(
        lambda: page.execute_script("return document.querySelector('video').videoWidth")
    )
    own = f"http://127.0.0.1:{running.port}/"
    for url in requested(page):
        assert url.startswith((own, "data:", f"blob:{own}")), url
    assert page.get_log("browser") == []


def requested(driver: Any) -> set[str]:
    """Return the URLs that the page requested."""
    urls = set()
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.add(message["params"]["request"]["url"])
    return urls


# A canvas instead of a camera, which a machine without one does not have.
FAKE_CAMERA = """
const canvas = document.createElement("canvas");
canvas.width = 160; canvas.height = 120;
const context = canvas.getContext("2d");
let step = 0;
setInterval(() => { context.fillStyle = `hsl(${step += 9} 90% 50%)`; context.fillRect(step % 120, 20, 40, 60); }, 40);
navigator.mediaDevices.getUserMedia = async () => canvas.captureStream(25);
"""


def test_a_recording_of_the_camera_is_translated(page: Any) -> None:
    page.execute_script(FAKE_CAMERA)
    one(page, "#camera").click()
    wait_until(lambda: one(page, "#record").is_displayed())
    one(page, "#record").click()
    wait_until(lambda: one(page, "#recorded").text == "0:01")
    one(page, "#record").click()
    wait_until(lambda: one(page, "#translate").is_enabled())
    assert "Recording of 0:0" in one(page, "#name").text
    one(page, "#translate").click()
    wait_until(lambda: is_done(page))
    assert one(page, "#error").text == ""
    assert one(page, "#state").text == "Done: 1 sentence."


def test_errors_are_shown_as_text(page: Any, tmp_path: Path) -> None:
    wrong = tmp_path / f"{HOSTILE.replace('/', '')}.mp4"
    wrong.write_bytes(b"no video")
    one(page, "#file").send_keys(str(wrong))
    one(page, "#translate").click()
    wait_until(lambda: is_done(page))
    assert one(page, "#error").text.startswith("Cannot open the video: Invalid data")
    assert HOSTILE in one(page, "#name").text
    (tmp_path / "large.mp4").write_bytes(bytes(21_000_000))
    one(page, "#file").send_keys(str(tmp_path / "large.mp4"))
    one(page, "#translate").click()
    assert one(page, "#error").text == "The video must be at most 20 MB, got 21.0 MB."
