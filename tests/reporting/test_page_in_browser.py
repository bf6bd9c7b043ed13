"""The page of `flallm report` in a real browser: a report of two evaluated runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from flallm_ds.reporting.build import report
from tests.helpers.browser import set_media, wait_until
from tests.helpers.exports import DECODER_ONLY, ENCODER_DECODER
from tests.helpers.runs import HOSTILE, spoil, write_run

NUM_CLIPS = 9  # of the test split
NUM_VIDEOS, NUM_MAPS = 4, 2


@pytest.fixture(scope="module")
def page(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an encoder-decoder and a decoder-only LLM."""
    folder = tmp_path_factory.mktemp("report")
    runs = []
    for kind in (ENCODER_DECODER, DECODER_ONLY):
        runs.append(write_run(kind, tiny_corpus, folder / kind))
        spoil(folder / kind)
    report(runs, folder / "report.html", num_clips=NUM_VIDEOS, num_attention=NUM_MAPS)
    return folder / "report.html"


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    """The browser with the page, as it is after loading."""
    set_media(browser, prefers_color_scheme="light")
    browser.get(page.as_uri())
    return browser


def all_of(driver: Any, selector: str) -> list[Any]:
    return list(driver.find_elements(By.CSS_SELECTOR, selector))


def one(driver: Any, selector: str) -> Any:
    return driver.find_element(By.CSS_SELECTOR, selector)


def column(driver: Any, number: int) -> list[str]:
    """The texts of a column of the samples, from 1."""
    return [cell.text for cell in all_of(driver, f"#rows td:nth-child({number})")]


def choose(driver: Any, value: str) -> None:
    one(driver, f'#filter option[value="{value}"]').click()


def test_every_sample_is_listed_and_the_count_is_announced(opened: Any) -> None:
    assert len(all_of(opened, "#rows tr")) == NUM_CLIPS
    count = one(opened, "#count")
    assert count.text == f"{NUM_CLIPS} of {NUM_CLIPS} clips"
    assert count.get_attribute("aria-live") == "polite"


def test_search_finds_words_of_references_and_hypotheses(opened: Any) -> None:
    one(opened, "#search").send_keys("SCRIPT")
    # The hypothesis with a script, and the reference that ends one.
    assert one(opened, "#count").text == f"2 of {NUM_CLIPS} clips"
    for text in column(opened, 2):
        assert "script" in text
    one(opened, "#search").send_keys("xyz")
    assert all_of(opened, "#rows tr") == []


def test_a_header_sorts_in_both_directions_and_says_so(opened: Any) -> None:
    header = one(opened, "#head th:nth-child(3)")
    values = []
    for order in ("descending", "ascending"):
        header.find_element(By.TAG_NAME, "button").click()
        if header.get_attribute("aria-sort") != order:
            header.find_element(By.TAG_NAME, "button").click()
        assert header.get_attribute("aria-sort") == order
        values.append([float(text) for text in column(opened, 3)])
    assert values[0] == sorted(values[0], reverse=True)
    assert values[1] == sorted(values[1])
    assert len(set(values[0])) > 2
    sorts = [cell.get_attribute("aria-sort") for cell in all_of(opened, "#head th")]
    assert sorts.count("none") == len(sorts) - 1


def test_filters_show_clips_with_a_video_or_with_attention(opened: Any) -> None:
    choose(opened, "clip")
    assert len(all_of(opened, "#rows tr")) == NUM_VIDEOS
    assert len(all_of(opened, "#rows img")) == NUM_VIDEOS
    choose(opened, "attention")
    assert len(all_of(opened, "#rows tr")) == NUM_MAPS
    choose(opened, "best")
    assert len(all_of(opened, "#rows tr")) == NUM_CLIPS


def test_texts_of_the_corpus_are_inert(opened: Any) -> None:
    assert opened.title.startswith("Report: ")
    assert HOSTILE in one(opened, "#rows").text
    assert all_of(opened, "#rows script, #rows b, #rows img:not([src^='data:'])") == []
    assert opened.get_log("browser") == []


def test_the_page_makes_no_request(opened: Any, page: Path) -> None:
    opened.get_log("performance")  # of the tests before
    opened.get(page.as_uri())
    choose(opened, "clip")
    one(opened, "#rows button").click()
    wait_until(lambda: opened.execute_script(READY))
    urls = set()
    for entry in opened.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.add(message["params"]["request"]["url"].partition(":")[0])
    assert urls == {"file", "data"}


READY = (
    "const v = document.querySelector('video'); return v.readyState >= 2 && v.videoWidth"
)


def test_a_sample_shows_its_clip_its_differences_and_the_n_best(opened: Any) -> None:
    choose(opened, "clip")
    one(opened, "#rows button").click()
    dialog = one(opened, "#sample")
    assert dialog.get_attribute("open") is not None
    wait_until(lambda: opened.execute_script(READY))
    # A video of two runs: both have marked words and three hypotheses of the search.
    assert (
        len(all_of(opened, "#sample del")) >= 2 and len(all_of(opened, "#sample ins")) >= 2
    )
    assert len(all_of(opened, "#sample .nbest li")) == 2 * 3
    key = one(opened, "#sample-title").text
    one(opened, "#next").click()
    assert one(opened, "#sample-title").text != key
    one(opened, "#close").click()
    assert dialog.get_attribute("open") is None


def test_the_address_names_the_open_sample(opened: Any, page: Path) -> None:
    one(opened, "#rows button").click()
    address, title = opened.current_url, one(opened, "#sample-title").text
    assert address.startswith(f"{page.as_uri()}#clip=")
    one(opened, "#close").click()
    assert opened.current_url == page.as_uri()
    opened.get("about:blank")
    opened.get(address)
    assert one(opened, "#sample-title").text == title


def test_attention_has_a_row_of_each_word_of_both_models(opened: Any) -> None:
    choose(opened, "attention")
    # The last one is the best one, which the tokenizers of both models can write.
    all_of(opened, "#rows button")[-1].click()
    maps = all_of(opened, "#sample .heat")
    hypotheses = all_of(opened, "#sample .hypothesis span[dir]")
    assert len(maps) == 2
    for table, hypothesis in zip(maps, hypotheses, strict=True):
        words = [button.text for button in table.find_elements(By.TAG_NAME, "button")]
        assert words == hypothesis.text.split()
        cells = table.find_elements(By.CSS_SELECTOR, "rect[fill-opacity='1.00']")
        assert len(cells) >= len(words)  # the highest value of each row
        assert table.find_elements(By.TAG_NAME, "img")
    # A word moves the video to its moment.
    wait_until(lambda: opened.execute_script(READY))
    one(opened, "#sample .heat button").click()
    time = opened.execute_script("return document.querySelector('video').currentTime")
    assert (
        one(opened, "#sample .heat button")
        .get_attribute("title")
        .startswith(f"most attention at {time:.1f} s")
    )


def test_everything_can_be_reached_by_keyboard(opened: Any) -> None:
    one(opened, "#search").send_keys(Keys.TAB, Keys.TAB, Keys.ENTER)
    # Behind the search and the filter is the first header, which now sorts.
    assert one(opened, "#head th").get_attribute("aria-sort") == "ascending"
    focused = opened.switch_to.active_element
    outline = focused.value_of_css_property("outline-style")
    assert outline == "solid", "the focus must be visible"
    first = one(opened, "#rows button")
    first.send_keys(Keys.ENTER)
    title = one(opened, "#sample-title").text
    opened.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert one(opened, "#sample-title").text != title
    opened.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert one(opened, "#sample").get_attribute("open") is None
    assert opened.switch_to.active_element == first


def test_arrow_keys_read_the_values_of_a_chart(opened: Any) -> None:
    figure = one(opened, "figure")
    figure.send_keys(Keys.ARROW_RIGHT)
    assert figure.find_element(By.TAG_NAME, "output").text.startswith("step 1. ")
    figure.send_keys(Keys.ARROW_RIGHT)
    text = figure.find_element(By.TAG_NAME, "output").text
    assert text.startswith("step 2. ") and "encoder_decoder: 3.536;" in text


def test_colors_follow_the_color_scheme(opened: Any) -> None:
    def brightness(selector: str, name: str) -> float:
        value = one(opened, selector).value_of_css_property(name)
        numbers = value[value.index("(") + 1 : -1].split(",")[:3]
        return sum(map(float, numbers)) / 3

    assert brightness("body", "background-color") > 200 > 80 > brightness("body", "color")
    set_media(opened, prefers_color_scheme="dark")
    assert brightness("body", "background-color") < 60 < 180 < brightness("body", "color")
    # The text of a chart stays readable.
    assert brightness("svg text", "fill") > 130


def test_the_page_names_its_parts_for_a_screen_reader(opened: Any) -> None:
    unnamed = """
        return [...document.querySelectorAll('button, input, select, svg[role=img]')].filter(
          (e) => !(e.textContent.trim() || e.labels?.length || e.getAttribute('aria-label'))
        ).length"""
    assert opened.execute_script(unnamed) == 0
    headers = all_of(opened, "table:not(.heat) th:not([scope])")
    assert headers == []
    for name in ("header", "main", "nav[aria-label]", "h1", "table caption"):
        assert all_of(opened, name)
    assert "Training loss" in one(opened, "svg").get_attribute("aria-label")


def test_a_printed_page_has_the_samples_and_the_curves(opened: Any) -> None:
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not one(opened, "#filters").is_displayed()
        assert one(opened, "#rows").is_displayed() and one(opened, "figure").is_displayed()
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
