"""docs/overview.md names every file of the package."""

import re

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "flallm_ds"
SECTION = re.compile(
    r"^### flallm_ds/(?P<folder>[a-z_/]*).*\n(?P<table>(?:.*\n)*?)(?=\n###? )", re.MULTILINE
)


def named() -> set[str]:
    """The files that the tables name, relative to the package."""
    text = (ROOT / "docs" / "overview.md").read_text(encoding="utf-8")
    files = set()
    for section in SECTION.finditer(text):
        for row in re.findall(r"^\| (`[^|]*) \|", section["table"], re.MULTILINE):
            files |= {section["folder"] + name for name in re.findall(r"`([^`]+)`", row)}
    return files


def test_the_overview_names_every_file() -> None:
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("[!_]*.py")}
    assert sorted(files - named()) == []


def test_the_overview_names_nothing_that_is_gone() -> None:
    assert [name for name in sorted(named()) if not (PACKAGE / name).exists()] == []
