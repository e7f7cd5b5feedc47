"""Write figures to files: PNG, SVG, PDF, or the frames of a film."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dinov2_attn._files import atomic_file
from dinov2_attn.apps.viz.colours import Pixels
from dinov2_attn.apps.viz.films import FILMS, writer_of
from dinov2_attn.apps.viz.pictures import plot_heads
from dinov2_attn.apps.viz.provenance import Facts, metadata_for
from dinov2_attn.apps.viz.rows import Drawable
from dinov2_attn.apps.viz.style import PLAIN, Style
from dinov2_attn.errors import InvalidInputError, UnwritableOutputError

DPI = 150
FRAME_DPI = 100
SECONDS = 0.8  # of each layer
FORMATS = ("png", "svg", "pdf")


def save(figure: Figure, path: str | Path, *, dpi: int = DPI, facts: Facts | None = None) -> None:
    """Write a figure as PNG, SVG or PDF.

    >>> viz.save(figure, "heads.png", facts={"image": "cat.jpg", "layer": 11, "query": "cls"})

    Text in an SVG or PDF stays text. The same figure gives the same bytes. The metadata of the file
    name this package and its version.

    Args:
        figure: What ``plot_heads`` returned, or ``plot(…).figure``.
        path: The file. Its suffix, ``.png``, ``.svg`` or ``.pdf``, chooses the format.
        dpi: Pixels per inch, also of the images in an SVG or PDF.
        facts: What else the metadata say, as values of JSON: the image, its digest, the model, and
            so on. It is the description of a PNG or SVG, and the subject of a PDF.

    Raises:
        InvalidInputError: for another suffix.
        UnwritableOutputError: if the file cannot be written.

    """
    with written(Path(path)) as unfinished:
        write_figure(figure, unfinished, dpi, facts)


def animate(maps: Drawable, path: str | Path, *, seconds: float = SECONDS, **options: Any) -> None:
    """Write a film with one frame for each layer of ``maps``, all on one scale.

    A WebP has every colour of the figures. A GIF has one palette for all frames, whose colours
    for maps are within 2 of 255.

    Args:
        maps: An ``AttentionMaps``, or a ``Recording`` of one pass.
        path: The file. Its suffix, ``.gif``, ``.webp`` or ``.mp4``, chooses the format.
        seconds: The duration of each frame.
        **options: Arguments of ``plot_heads``, which draws each frame.

    Raises:
        InvalidInputError: for another suffix, or as ``plot_heads`` does.
        UnavailableError: for an MP4 without the program ffmpeg, or a WebP that Pillow cannot
            write.
        UnwritableOutputError: if the file cannot be written.

    """
    with written(Path(path)) as unfinished:
        write_film(maps, unfinished, seconds, **options)


def write_figure(figure: Figure, path: Path, dpi: int = DPI, facts: Facts | None = None) -> None:
    """Write as ``save`` does, but raise ``OSError`` unchanged."""
    kind = _kind(path, FORMATS)
    # matplotlib has these only as settings of the process. The context restores them.
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "dinov2-attn",
        "pdf.fonttype": 42,  # TrueType, which journals ask for
    }
    metadata = metadata_for(kind, facts or {})
    drawn = BytesIO()  # matplotlib raises other errors than OSError where a disk is full
    with matplotlib.rc_context(settings):
        figure.savefig(drawn, format=kind, dpi=dpi, metadata=metadata)
    path.write_bytes(drawn.getvalue())


def write_film(maps: Drawable, path: Path, seconds: float = SECONDS, **options: Any) -> None:
    """Write as ``animate`` does, but raise ``OSError`` unchanged."""
    write = writer_of(_kind(path, FILMS))
    figures = (plot_heads(maps, layer=layer, together=True, **options) for layer in maps.layers)
    style: Style = options.get("style", PLAIN)
    write(_frames(figures), path, seconds, style.colour_map())


def _kind(path: Path, kinds: tuple[str, ...]) -> str:
    kind = path.suffix.lower().lstrip(".")
    if kind not in kinds:
        raise InvalidInputError(
            f"a name that ends in .{', .'.join(kinds[:-1])} or .{kinds[-1]}",
            path.name,
            "Rename it.",
        )
    return kind


def pixels_of(figure: Figure, dpi: int = DPI) -> Pixels:
    """Return ``figure`` as uint8 ``(H, W, 3)``."""
    figure.set_dpi(dpi)
    canvas: Any = figure.canvas
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _frames(figures: Iterable[Figure]) -> list[Pixels]:
    """Return pictures of one size. Captions may have more lines in one layer than in another.

    Maps stand at the bottom, so that they have one place in all frames.
    """
    frames = [pixels_of(figure, FRAME_DPI) for figure in figures]
    height, width = (max(frame.shape[axis] for frame in frames) for axis in (0, 1))
    # H.264 halves the resolution of colours: both sides must be even.
    height, width = height + height % 2, width + width % 2
    padded = []
    for frame in frames:
        canvas = np.full((height, width, 3), 255, dtype=np.uint8)
        canvas[height - frame.shape[0] :, : frame.shape[1]] = frame
        padded.append(canvas)
    return padded


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield where to write ``path``, which appears whole; make errors of the disk ours."""
    try:
        with atomic_file(path) as unfinished:
            yield unfinished
    except OSError as error:
        raise UnwritableOutputError(
            f"a file that can be written at {path}",
            f"{type(error).__name__}: {error}",
            "Nothing was left there. Create its folder, or give another path.",
        ) from error
