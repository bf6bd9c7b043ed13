"""The page of `flallm demo` in a real browser, with a real model."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from flallm_ds.inference.translator import Translator
from tests.helpers.attention import no_attention
from tests.helpers.browser import set_media, wait_until
from tests.helpers.demo_server import Running
from tests.helpers.exports import DECODER_ONLY, ENCODER_DECODER, write_export
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
    one(page, "details:not(.attention) summary").click()
    scores = [float(cell.text) for cell in all_of(page, "tbody td:first-child")]
    assert scores == pytest.approx([score for _, score in expected], abs=1e-3)
    assert re.search(r"model [\d.]+ s, attention [\d.]+ s\.$", one(page, "#timing").text)
    # The browser plays the clip, and nothing came from another server.
    wait_until(
        lambda: page.execute_script("return document.querySelector('video').videoWidth")
    )
    own = f"http://127.0.0.1:{running.port}/"
    for url in requested(page):
        assert url.startswith((own, "data:", f"blob:{own}")), url
    assert page.get_log("browser") == []


def test_the_attention_shows_which_frames_made_which_word(page: Any, clip: Path) -> None:
    words = translated(page, clip)
    assert words == [button.text for button in all_of(page, ".heat button")] != []
    # Words and frames have the same time axis; the frames above are not shown twice.
    assert len(all_of(page, ".heat .frames img")) == 8
    assert not one(page, ".strip").is_displayed()
    for row in all_of(page, ".heat svg"):
        assert row.find_elements(By.CSS_SELECTOR, "rect[fill-opacity='1.00']")
    one(page, ".attention summary").click()
    assert one(page, ".strip").is_displayed()


def translated(page: Any, clip: Path, long: str = "false") -> list[str]:
    """Translate a clip on the page; return the words of the first sentence."""
    one(page, "#file").send_keys(str(clip))
    Select(one(page, "#long")).select_by_value(long)
    one(page, "#translate").click()
    wait_until(lambda: is_done(page))
    assert one(page, "#error").text == ""
    return str(one(page, ".sentence span").text).split()


def test_the_attention_can_be_read_without_a_mouse_and_without_colours(
    page: Any, clip: Path
) -> None:
    translated(page, clip)
    # Behind the title of the table are its words.
    page.execute_script("document.querySelector('.attention summary').focus()")
    page.switch_to.active_element.send_keys(Keys.TAB)
    focused = page.switch_to.active_element
    assert focused.text == one(page, ".heat button").text
    assert focused.value_of_css_property("outline-style") == "solid"
    focused.send_keys(Keys.ENTER)
    time = "return document.querySelector('video').currentTime"
    moment = f"most attention at {page.execute_script(time):.1f} s; "
    # A word moves the video and a line, and says the moment.
    assert one(page, ".heat").get_attribute("class") == "heat marked"
    assert one(page, ".heat svg").accessible_name.startswith(moment)
    assert one(page, ".heat svg").aria_role == "image"
    for row in all_of(page, ".heat tr"):
        assert row.find_element(By.TAG_NAME, "th").get_attribute("scope") == "row"
    # What is announced is the sentence, not its tables.
    assert one(page, "#announced").get_attribute("textContent") == one(
        page, ".sentence span"
    ).get_attribute("textContent")


def test_the_attention_is_readable_in_light_and_dark(page: Any, clip: Path) -> None:
    translated(page, clip)

    def brightness(selector: str, name: str) -> float:
        value = one(page, selector).value_of_css_property(name)
        numbers = value[value.index("(") + 1 : -1].split(",")[:3]
        return sum(map(float, numbers)) / 3

    for scheme in ("light", "dark"):
        set_media(page, prefers_color_scheme=scheme)
        empty = brightness(".heat svg", "background-color")
        for selector in (".heat svg", ".heat button", ".heat th", ".heat .times"):
            assert abs(brightness(selector, "color") - empty) > 70, (scheme, selector)
    assert empty < 60


def test_only_the_first_sentence_of_a_long_video_shows_its_table(
    page: Any, tmp_path: Path
) -> None:
    write_long_video(tmp_path / "long.mp4", 2)
    translated(page, tmp_path / "long.mp4", long="true")
    parts = all_of(page, "#parts > li")
    assert len(parts) == 2
    assert len(all_of(page, ".heat")) == 1
    assert not parts[0].find_element(By.CLASS_NAME, "strip").is_displayed()
    assert parts[1].find_element(By.CLASS_NAME, "strip").is_displayed()
    parts[1].find_element(By.CSS_SELECTOR, ".attention summary").click()
    wait_until(lambda: len(all_of(page, ".heat")) == 2)
    # The moments are those of the whole video.
    second = parts[1].find_element(By.CLASS_NAME, "heat")
    second.find_element(By.TAG_NAME, "button").click()
    time = float(page.execute_script("return document.querySelector('video').currentTime"))
    assert (
        second.find_element(By.TAG_NAME, "button")
        .get_attribute("title")
        .startswith(f"most attention at {time:.1f} s; ")
    )
    start, end = (
        float(span.text[:-2])
        for span in second.find_elements(By.CSS_SELECTOR, ".times span")
    )
    assert 0 < start < time < end
    assert [table.get_attribute("class") for table in all_of(page, ".heat")] == [
        "heat",
        "heat marked",
    ]


def test_an_encoder_decoder_has_the_same_table(
    browser: Any, tiny_corpus: Path, tmp_path: Path, clip: Path
) -> None:
    model = write_export(ENCODER_DECODER, tiny_corpus, tmp_path / "run")
    running = Running(lambda: Translator.from_pretrained(model, "cpu"), max_mb=20)
    try:
        browser.get(f"http://127.0.0.1:{running.port}/")
        wait_until(lambda: "into German" in one(browser, "#model").text)
        words = translated(browser, clip)
        assert words == [button.text for button in all_of(browser, ".heat button")] != []
    finally:
        running.stop()


def test_a_model_without_attention_says_so_and_the_rest_is_shown(
    page: Any, translator: Translator, tmp_path: Path
) -> None:
    write_long_video(tmp_path / "long.mp4", 2)
    with no_attention(translator):
        translated(page, tmp_path / "long.mp4", long="true")
    notes = [note.text for note in all_of(page, ".note")]
    assert notes == ["This language model has no attention from words to frames."]
    assert all_of(page, ".attention") == []
    for part in all_of(page, "#parts > li"):
        assert part.find_element(By.CSS_SELECTOR, ".strip img").is_displayed()
        assert part.find_element(By.TAG_NAME, "summary").text == "5 best hypotheses"


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
    # The length of a recording is not in its file; a word finds its moment anyway.
    word = one(page, ".heat button")
    word.click()
    time = page.execute_script("return document.querySelector('video').currentTime")
    assert word.get_attribute("title").startswith(f"most attention at {time:.1f} s; ")


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
