"""The attention of a model to a video, as a film of the same size and times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.colors import Normalize
from PIL import Image, ImageDraw
from torch import nn

from dinov2_attn.apps.viz.bars import times
from dinov2_attn.apps.viz.decoding import in_channels
from dinov2_attn.apps.viz.heatmap import Device
from dinov2_attn.apps.viz.images import LARGEST_SHORT_SIDE, ImageSize, fit, normalise
from dinov2_attn.apps.viz.inference import inference_on
from dinov2_attn.apps.viz.limits import scale
from dinov2_attn.apps.viz.pixels import greyed
from dinov2_attn.apps.viz.reading import Reading
from dinov2_attn.apps.viz.style import Style
from dinov2_attn.apps.viz.text import font_of
from dinov2_attn.apps.viz.videos import Frame, Pixels, Video, library
from dinov2_attn.errors import UnavailableError
from dinov2_attn.maps.one_batch import attention_maps
from dinov2_attn.maps.places import Head, place_of_head
from dinov2_attn.typing import Layer

Look = Literal["map", "overlay", "side"]
LOOKS: tuple[Look, ...] = ("map", "overlay", "side")
BATCH = 4  # frames that run together
QUALITY = "18"  # of H.264: lower is better, 18 looks like the source
Maps = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Asked:
    """What a film shows.

    Attributes:
        layer: The layer.
        head: The number of a head, or ``"mean"``.
        positions: The tokens whose attention is drawn, each in a film of its own.
        size: The size of frames for the model, as in ``load_image``. They are not cropped but
            stretched to whole patches.
        reading: The channels and the normalisation.

    """

    layer: Layer
    head: Head
    positions: Sequence[int]
    size: ImageSize
    reading: Reading


def fitted(size: tuple[int, int], patch: tuple[int, int], wanted: ImageSize) -> tuple[int, int]:
    """Return the height and width of a frame for the model: whole patches, without a crop."""
    if isinstance(wanted, tuple):
        sides: Sequence[float] = wanted
    else:
        short = wanted or min(*size, LARGEST_SHORT_SIDE)
        sides = [side * short / min(size) for side in size]
    height, width = (
        max(1, round(side / step)) * step for side, step in zip(sides, patch, strict=True)
    )
    return height, width


def maps_of_frames(
    model: nn.Module, video: Video, patch: tuple[int, int], asked: Asked, device: Device
) -> Iterator[Maps]:
    """Yield the maps ``(tokens, h, w)`` of each frame, in multiples of uniform attention.

    Raises:
        InvalidInputError: If the model cannot be run on a frame.
        UnreadableFileError: If a frame cannot be decoded.

    """
    height, width = fitted(video.size, patch, asked.size)

    def pixels(frame: Frame) -> Pixels:
        image = Image.fromarray(frame.pixels)
        channels = in_channels(image, asked.reading.channels, video.path)
        return fit(channels, patch, (height, width), video.path)

    frames = video.frames()
    while batch := list(islice(frames, BATCH)):
        images = normalise(torch.from_numpy(np.stack(list(map(pixels, batch)))), asked.reading)
        with inference_on(images):
            yield from _maps(model, images.to(device), asked)


def _maps(model: nn.Module, images: torch.Tensor, asked: Asked) -> Maps:
    found = attention_maps(model, images, [asked.layer], queries=list(asked.positions))
    tokens = found.weights[0].shape[-1]
    weights = found.patch_maps()[0].float()
    place = place_of_head(range(weights.shape[1]), asked.head)
    one = weights.mean(1) if place is None else weights[:, place]
    maps: Maps = (one * tokens).cpu().numpy()
    return maps


@dataclass
class Limits:
    """Where the colours of a film end: at the highest end that one of its frames would have.

    So every frame has the same scale, and none has more patches above it than a picture of its own.
    """

    style: Style
    high: float = 0.0

    def see(self, values: Maps) -> None:
        """Take a map ``(h, w)`` into account."""
        linear = replace(self.style, log=False)
        self.high = max(self.high, float(scale(values.astype(np.float64), linear).vmax or 0))

    def norm(self, values: Maps) -> Normalize:
        """Return the scale of a map."""
        wide = values.astype(np.float64)
        if self.style.limits == "each" or isinstance(self.style.limits, tuple):
            return scale(wide, self.style)
        return scale(wide, replace(self.style, limits=(0.0, self.high or 1.0)))

    def sentence(self, tokens: int) -> str:
        """Return where the colours end."""
        unit = f"1× is what each of the {tokens} tokens gets if all get the same."
        if self.style.limits == "each":
            return f"Each frame has its own colours, from 0 to its highest patch. {unit}"
        limits = self.style.limits
        ends = limits if isinstance(limits, tuple) else (0.0, self.high)
        end = f"Colours run from {ends[0]:g} to {times(ends[1])} uniform attention in all frames."
        rule = "Each frame alone would have its own end: this is the highest of them."
        return " ".join([end, *([] if isinstance(limits, tuple) else [rule]), unit])


def draw_frame(
    pixels: Pixels, values: Maps, norm: Normalize, style: Style, look: Look, warning: str | None
) -> Pixels:
    """Return a frame of the film, uint8 ``(H, W, 3)``; twice as wide with ``"side"``.

    Args:
        pixels: The frame of the video, ``(H, W, 3)``.
        values: The map ``(h, w)``, which covers all of it.
        norm: Its scale.
        style: Colours, interpolation, opacity and background.
        look: The map alone, over the frame, or beside it.
        warning: A sentence in a red strip at the bottom.

    """
    height, width = pixels.shape[:2]
    colours: Pixels = style.colour_map()(np.ma.masked_invalid(norm(values)), bytes=True)[..., :3]
    way = (
        Image.Resampling.NEAREST if style.interpolation == "nearest" else Image.Resampling.BILINEAR
    )
    drawn = np.asarray(Image.fromarray(colours).resize((width, height), way))
    if look == "overlay":
        below = greyed(pixels) if style.background == "grey" else pixels
        drawn = (below * (1 - style.alpha) + drawn * style.alpha).round().astype(np.uint8)
    drawn = drawn[: height - height % 2, : width - width % 2]
    if look == "side":
        drawn = np.concatenate([pixels[: len(drawn), : drawn.shape[1]], drawn], axis=1)
    return drawn if warning is None else _with_strip(drawn, warning)


def _with_strip(pixels: Pixels, warning: str) -> Pixels:
    """Return ``pixels`` with a line in white on red over its lowest part."""
    image = Image.fromarray(pixels)
    font = font_of(max(8, image.height // 24), bold=True)
    size = font.size * min(1.0, 0.96 * image.width / font.getlength(warning))
    font = font.font_variant(size=max(5, int(size)))
    strip = int(1.6 * font.size)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, image.height - strip, image.width, image.height), fill="firebrick")
    draw.text((0.02 * image.width, image.height - 0.85 * strip), warning, "white", font)
    return np.asarray(image)


class FilmWriter:
    """Writes frames as an MP4 of H.264 without sound, each at its own time.

    H.264 halves the resolution of colours: of an odd side the last pixel is left out.
    """

    def __init__(self, path: Path, video: Video, look: Look, about: dict[str, str]) -> None:
        av = library()
        height, width = (side - side % 2 for side in video.size)
        self._size = height, width * (2 if look == "side" else 1)
        self._container = av.open(
            str(path), "w", format="mp4", options={"movflags": "+faststart+use_metadata_tags"}
        )
        self._container.metadata.update(about)
        try:
            stream = self._container.add_stream("libx264", rate=video.rate)
        except (av.FFmpegError, ValueError) as error:
            self._container.close()
            raise UnavailableError(
                "a PyAV that writes H.264",
                str(error),
                "Install the one of PyPI: `pip install --force-reinstall av`.",
            ) from error
        stream.height, stream.width = self._size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": QUALITY}
        stream.codec_context.sample_aspect_ratio = video.aspect
        # Fine enough for every rate that is usual, and for times that are not regular.
        stream.codec_context.time_base = Fraction(1, 90_000)
        self._stream, self._av, self._last = stream, av, -1

    def __enter__(self) -> FilmWriter:
        return self

    def write(self, pixels: Pixels, time: Fraction) -> None:
        """Write a frame ``(H, W, 3)`` at a time in seconds."""
        height, width = self._size
        whole = np.ascontiguousarray(pixels[:height, :width])
        frame = self._av.VideoFrame.from_ndarray(whole, format="rgb24")
        self._last = max(round(time * 90_000), self._last + 1)
        frame.pts, frame.time_base = self._last, Fraction(1, 90_000)
        self._container.mux(self._stream.encode(frame))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._container:
            if kind is None:
                self._container.mux(self._stream.encode(None))
