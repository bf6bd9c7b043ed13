"""A headless Chromium, driven by selenium, for tests of pages."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
DRIVER = Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a selenium driver. The test is skipped where Chromium is not installed."""
    for path in (CHROMIUM, DRIVER):
        if not path.is_file():
            pytest.skip(
                f"Chromium is not installed: no {path} (.ci/install_chromium --yes)"
            )
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS:
        options.add_argument(flag)
    # The log of the console, and that of the network.
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def wait_until(holds: Callable[[], object], timeout_s: float = 60) -> None:
    """Wait until a condition is true; fail after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "the page did not reach the state"
        time.sleep(0.05)


def set_media(driver: Any, **features: str) -> None:
    """Emulate media features, such as prefers_color_scheme="dark"."""
    values = [
        {"name": name.replace("_", "-"), "value": value} for name, value in features.items()
    ]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": values})
