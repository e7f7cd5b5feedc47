"""A warning below a picture, inside the same file."""

from __future__ import annotations

import matplotlib.font_manager
from PIL import Image, ImageDraw, ImageFont

NO_MEANING = "RANDOM WEIGHTS: this map carries no meaning"

# A narrower picture is padded with white: one word per line would be hard to read.
LEAST_WIDTH = 168
LEAST_HEIGHT = 14


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
