"""Text in pictures: printable letters, broken into lines, and a warning below a picture."""

from __future__ import annotations

import functools
import math

import matplotlib.font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

FONT = "DejaVu Sans"  # shipped with matplotlib
POINTS_PER_INCH = 72
_SIZE = 100  # in which letters are measured
SCREEN = 100  # pixels per inch, the fewest that pictures here have

NO_MEANING = "RANDOM WEIGHTS: this map carries no meaning"

# A narrower picture is padded with white: one word per line would be hard to read.
LEAST_WIDTH = 168
LEAST_HEIGHT = 14


def printable(text: str) -> str:
    """Return ``text`` on one line, with a sign for each letter that the font lacks."""
    known = _letters()
    words = " ".join(text.split())
    return "".join(
        letter if letter.isprintable() and ord(letter) in known else "\N{REPLACEMENT CHARACTER}"
        for letter in words
    )


def wrap(sentences: list[str], inches: float, points: float, *, bold: bool = False) -> list[str]:
    """Break each of the ``sentences``, set in letters of ``points``, into lines of ``inches``."""
    room = inches * SCREEN
    pixels = points * SCREEN / POINTS_PER_INCH
    return [line for text in sentences for line in _lines(printable(text), room, pixels, bold)]


def _lines(text: str, room: float, pixels: float, bold: bool) -> list[str]:
    def width(letters: str) -> int:
        # Hinting rounds each letter, on a coarse screen up to the next pixel.
        return sum(math.ceil(pixels * _advance(letter, bold)) for letter in letters)

    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if width(longer) <= room:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:  # a word longer than a line goes on in the next
            if lines[-1] and width(lines[-1] + letter) > room:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def percent(share: float) -> str:
    """Return a share as 43.1 %."""
    return f"{100 * share:.1f} %"


def font_of(pixels: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the font of pictures at a size in pixels, for Pillow."""
    name = f"{FONT}:bold" if bold else FONT
    return ImageFont.truetype(matplotlib.font_manager.findfont(name), pixels)


@functools.cache
def _letters() -> frozenset[int]:
    return frozenset(FT2Font(matplotlib.font_manager.findfont(FONT)).get_charmap())


@functools.cache
def _advance(letter: str, bold: bool) -> float:
    """Return how far a letter of size 1 moves the pen."""
    name = f"{FONT}:bold" if bold else FONT
    font = ImageFont.truetype(matplotlib.font_manager.findfont(name), _SIZE)
    return float(font.getlength(letter)) / _SIZE


def with_banner(picture: Image.Image, text: str) -> Image.Image:
    """Return ``picture`` at the top left of a canvas with ``text`` in a strip below it."""
    width = max(picture.width, LEAST_WIDTH)
    strip = _strip(text, width, _letter_height(picture))
    canvas = Image.new("RGB", (width, picture.height + strip.height), "white")
    canvas.paste(picture, (0, 0))
    canvas.paste(strip, (0, picture.height))
    return canvas


def _letter_height(picture: Image.Image) -> int:
    # In proportion to the picture, because viewers shrink big pictures. For panoramas the short
    # side decides.
    return max(LEAST_HEIGHT, min(picture.width, 2 * picture.height) // 30)


def _strip(text: str, width: int, height: int) -> Image.Image:
    # Matplotlib ships this font. Pillow's own has only one tiny size before version 10.1.
    font = ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans:bold"), height)
    margin = height // 2
    lines = _wrap(text, font, width - 2 * margin)
    strip = Image.new("RGB", (width, len(lines) * height * 5 // 4 + 2 * margin), "firebrick")
    draw = ImageDraw.Draw(strip)
    draw.multiline_text((margin, margin), "\n".join(lines), "white", font, spacing=height // 4)
    return strip


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
