"""Write frames as a film: GIF, WebP or MP4."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.colors import Colormap
from PIL import Image, features

from dinov2_attn.apps.viz.colours import Pixels
from dinov2_attn.errors import UnavailableError, UnwritableOutputError

FILMS = ("gif", "webp", "mp4")
# How far the colours of a GIF may be from those of the colour map, of 255.
NEAR = 2
# A GIF has so many colours.
COLOURS = 256
# So many pixels stand for all frames when its colours are chosen.
SAMPLED = 200_000
# Writes frames uint8 (H, W, 3), drawn in a colour map, each shown for so many seconds.
Writer = Callable[[list[Pixels], Path, float, Colormap], None]


def writer_of(kind: str) -> Writer:
    """Return the writer of a film. Raise ``UnavailableError`` without what it needs."""
    if kind == "mp4" and shutil.which("ffmpeg") is None:
        raise UnavailableError(
            "the program ffmpeg, which writes MP4",
            "none on the PATH",
            "Install it (apt install ffmpeg, brew install ffmpeg), or write a GIF.",
        )
    if kind == "webp" and not features.check("webp"):
        raise UnavailableError(
            "a Pillow that writes WebP",
            "one that was built without it",
            "Run `pip install --upgrade pillow`, or write a GIF.",
        )
    return {"gif": _write_gif, "webp": _write_webp, "mp4": _write_mp4}[kind]


def palette_for(frames: list[Pixels], colours: Colormap) -> Pixels:
    """Return the one palette ``(256, 3)`` of a film.

    It holds the colour map, with steps of ``NEAR``, and the most useful of all other colours.
    """
    ours = _thinned(colours)
    seen, counts = _counted(frames)
    far = np.abs(seen.astype(int) - ours[_nearest(seen, ours)]).max(axis=1) > NEAR
    palette = np.zeros((COLOURS, 3), np.uint8)
    palette[: len(ours)] = ours
    if far.any():
        others = _useful(seen[far], counts[far], COLOURS - len(ours))
        palette[len(ours) : len(ours) + len(others)] = others
    return palette


def _counted(frames: list[Pixels]) -> tuple[Pixels, npt.NDArray[np.int_]]:
    """Return the colours of all frames ``(n, 3)``, and how many pixels have each of them."""
    each = [np.unique(_packed(frame), return_counts=True) for frame in frames]
    seen, places = np.unique(np.concatenate([colours for colours, _ in each]), return_inverse=True)
    counts = np.bincount(places, np.concatenate([count for _, count in each]))
    return _unpacked(seen), counts.astype(int)


def _useful(colours: Pixels, counts: npt.NDArray[np.int_], most: int) -> Pixels:
    """Return at most so many colours for pixels of ``colours`` ``(n, 3)``, by median cut."""
    pixels = colours.repeat(-(-counts * SAMPLED // counts.sum()), axis=0)
    image = Image.fromarray(pixels[np.newaxis]).quantize(most, Image.Quantize.MEDIANCUT)
    found: Pixels = np.array(image.getpalette(), np.uint8).reshape(-1, 3)[:most]
    return found


def _thinned(colours: Colormap) -> Pixels:
    """Return so many colours of the map that each of it is within ``NEAR`` of one of them."""
    every = colours(np.arange(colours.N), bytes=True)[:, :3].astype(int)
    kept: list[npt.NDArray[np.int_]] = []
    first = 0
    while first < len(every):
        near = np.abs(every[first:] - every[first]).max(axis=1) <= NEAR
        middle = every[first + _run(near) - 1]
        kept.append(middle)
        first += _run(np.abs(every[first:] - middle).max(axis=1) <= NEAR)
    return np.array(kept, dtype=np.uint8)


def _run(flags: npt.NDArray[np.bool_]) -> int:
    """Return how many flags at the beginning are set."""
    return len(flags) if flags.all() else int(flags.argmin())


def _packed(pixels: Pixels) -> npt.NDArray[np.uint32]:
    """Return the colours of pixels ``(…, 3)`` as one number each."""
    wide = pixels.reshape(-1, 3).astype(np.uint32)
    return np.asarray(wide[:, 0] << 16 | wide[:, 1] << 8 | wide[:, 2], dtype=np.uint32)


def _unpacked(packed: npt.NDArray[np.uint32]) -> Pixels:
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1).astype(np.uint8)


def _nearest(pixels: Pixels, palette: Pixels) -> npt.NDArray[np.uint8]:
    """Return the place in the palette of the colour nearest to each of the pixels ``(n, 3)``.

    The channel that is farthest off decides, then the sum of squares.
    """
    wide = palette.astype(np.int32)
    found = np.empty(len(pixels), dtype=np.uint8)
    for start in range(0, len(pixels), 4096):
        some = pixels[start : start + 4096].astype(np.int32)
        squares = (some[:, np.newaxis] - wide) ** 2
        distances = squares.max(axis=2) * 1024 + squares.sum(axis=2) // 256
        found[start : start + 4096] = distances.argmin(axis=1)
    return found


def _write_gif(frames: list[Pixels], path: Path, seconds: float, colours: Colormap) -> None:
    palette = palette_for(frames, colours)
    indexed = [_indexed(frame, palette) for frame in frames]
    indexed[0].save(
        path,
        "GIF",
        save_all=True,
        append_images=indexed[1:],
        duration=round(1000 * seconds),
        loop=0,
        optimize=False,
        disposal=1,
    )


def _indexed(frame: Pixels, palette: Pixels) -> Image.Image:
    """Return a frame in the nearest colours of the palette. Pillow finds only near ones."""
    packed, places = np.unique(_packed(frame), return_inverse=True)
    indices = _nearest(_unpacked(packed), palette)[places].reshape(frame.shape[:2])
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    return image


def _write_webp(frames: list[Pixels], path: Path, seconds: float, colours: Colormap) -> None:
    first, *others = map(Image.fromarray, frames)
    duration = round(1000 * seconds)
    first.save(
        path, "WEBP", save_all=True, append_images=others, duration=duration, loop=0, lossless=True
    )


def _write_mp4(frames: list[Pixels], path: Path, seconds: float, colours: Colormap) -> None:
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
