"""Fonts of pictures: those installed, and whether they have all characters of a text."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# DejaVu comes with matplotlib. The other fonts, where installed, have scripts that DejaVu
# lacks.
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "IPAGothic",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "PingFang SC",
    "Arial Unicode MS",
    "Noto Sans Devanagari",
)


def installed_fonts() -> list[str]:
    """Return the fonts for any text that are installed, for the `family` of matplotlib.

    matplotlib takes each character from the first of them that has it.
    """
    # matplotlib takes a second to import.
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in _FONTS if name in installed]


@dataclass
class Missing:
    """Whether the fonts lacked a character of what was drawn."""

    any: bool = False

    def note(self, file: str) -> None:
        """Print a line about boxes in a picture, if a character was missing.

        file: what has the boxes, such as "the PNG".
        """
        if self.any:
            print(
                f"note: the installed fonts lack some characters of the texts; {file} shows "
                "boxes instead. A font such as Noto Sans CJK has Chinese and Japanese ones."
            )


@contextmanager
def missing_characters() -> Iterator[Missing]:
    """Notice, until the end of the block, whether matplotlib draws a missing character."""
    missing = Missing()
    # Catch all warnings, also repeated ones, which Python hides by default.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield missing
    missing.any = any("missing from" in str(warning.message) for warning in caught)
