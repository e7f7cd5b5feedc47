"""Write figures to files: PNG, SVG, or the frames of a GIF or an MP4."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dinov2_attn.apps.viz.colours import Pixels
from dinov2_attn.apps.viz.pictures import plot_heads
from dinov2_attn.apps.viz.rows import Drawable
from dinov2_attn.errors import InvalidInputError, UnavailableError, UnwritableOutputError

DPI = 150
FRAME_DPI = 100
SECONDS = 0.8  # of each layer
FORMATS = ("png", "svg")
FILMS = ("gif", "mp4")


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG or SVG.

    Text in an SVG stays text. The same figure gives the same bytes.

    Args:
        figure: What ``plot_heads`` returned, or ``plot(…).figure``.
        path: The file. Its suffix, ``.png`` or ``.svg``, chooses the format.

    Raises:
        InvalidInputError: for another suffix.
        UnwritableOutputError: if the file cannot be written.

    """
    with _written(Path(path)):
        write_figure(figure, Path(path))


def animate(maps: Drawable, path: str | Path, *, seconds: float = SECONDS, **options: Any) -> None:
    """Write a GIF or MP4 with one frame for each layer of ``maps``, all on one scale.

    Args:
        maps: An ``AttentionMaps``, or a ``Recording`` of one pass.
        path: The file. Its suffix, ``.gif`` or ``.mp4``, chooses the format.
        seconds: The duration of each frame.
        **options: Arguments of ``plot_heads``, which draws each frame.

    Raises:
        InvalidInputError: for another suffix, or as ``plot_heads`` does.
        UnavailableError: for an MP4 without the program ffmpeg.
        UnwritableOutputError: if the file cannot be written.

    """
    with _written(Path(path)):
        write_film(maps, Path(path), seconds, **options)


def write_figure(figure: Figure, path: Path) -> None:
    """Write as ``save`` does, but raise ``OSError`` unchanged."""
    kind = _kind(path, FORMATS)
    # matplotlib has these only as settings of the process. The context restores them.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "dinov2-attn"}
    about = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context(settings):
        figure.savefig(path, format=kind, dpi=DPI, metadata=about)


def write_film(maps: Drawable, path: Path, seconds: float = SECONDS, **options: Any) -> None:
    """Write as ``animate`` does, but raise ``OSError`` unchanged."""
    write = writer_of(_kind(path, FILMS))
    figures = (plot_heads(maps, layer=layer, together=True, **options) for layer in maps.layers)
    write(_frames(figures), path, seconds)


def _kind(path: Path, kinds: tuple[str, ...]) -> str:
    kind = path.suffix.lower().lstrip(".")
    if kind not in kinds:
        raise InvalidInputError(
            f"a name that ends in .{' or .'.join(kinds)}", path.name, "Rename it."
        )
    return kind


def writer_of(kind: str) -> Callable[[list[Pixels], Path, float], None]:
    """Return the writer of a ``"gif"`` or ``"mp4"``. Raise ``UnavailableError`` without ffmpeg."""
    if kind == "mp4" and shutil.which("ffmpeg") is None:
        raise UnavailableError(
            "the program ffmpeg, which writes MP4",
            "none on the PATH",
            "Install it (apt install ffmpeg, brew install ffmpeg), or write a GIF.",
        )
    return _write_gif if kind == "gif" else _write_mp4


def pixels_of(figure: Figure, dpi: int = DPI) -> Pixels:
    """Return ``figure`` as uint8 ``(H, W, 3)``."""
    figure.set_dpi(dpi)
    canvas: Any = figure.canvas
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _frames(figures: Iterable[Figure]) -> list[Pixels]:
    """Return pictures of one size. Captions may have more lines in one layer than in another."""
    frames = [pixels_of(figure, FRAME_DPI) for figure in figures]
    height, width = (max(frame.shape[axis] for frame in frames) for axis in (0, 1))
    # H.264 halves the resolution of colours: both sides must be even.
    height, width = height + height % 2, width + width % 2
    padded = []
    for frame in frames:
        canvas = np.full((height, width, 3), 255, dtype=np.uint8)
        canvas[: frame.shape[0], : frame.shape[1]] = frame
        padded.append(canvas)
    return padded


def _write_gif(frames: list[Pixels], path: Path, seconds: float) -> None:
    first, *others = map(Image.fromarray, frames)
    duration = round(1000 * seconds)
    first.save(path, "GIF", save_all=True, append_images=others, duration=duration, loop=0)


def _write_mp4(frames: list[Pixels], path: Path, seconds: float) -> None:
    height, width = frames[0].shape[:2]
    command = ["ffmpeg", "-y", "-loglevel", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    # Some players fail at one frame per second, so each frame is repeated.
    command += ["-r", f"{1 / seconds:.6f}", "-i", "-", "-r", "10", "-pix_fmt", "yuv420p"]
    command += ["-f", "mp4", "-movflags", "+faststart", str(path.absolute())]
    raw = b"".join(frame.tobytes() for frame in frames)
    done = subprocess.run(command, input=raw, capture_output=True, check=False)
    if done.returncode:
        path.unlink(missing_ok=True)
        raise UnwritableOutputError(
            f"ffmpeg to write {path.name}",
            done.stderr.decode(errors="replace").strip()[-300:] or f"status {done.returncode}",
            "Write a GIF, or install an ffmpeg with H.264.",
        )


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnwritableOutputError(
            f"a file that can be written at {path}",
            f"{type(error).__name__}: {error}",
            "Create its folder, or give another path.",
        ) from error
