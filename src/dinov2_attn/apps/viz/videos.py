"""Videos and folders of frames as pictures with times, one after the other."""

from __future__ import annotations

import contextlib
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dinov2_attn._files import is_no_file
from dinov2_attn._imports import is_installed
from dinov2_attn.apps.viz.opening import check_pixels, readable_suffixes
from dinov2_attn.apps.viz.reading import IMAGENET, Range, warn
from dinov2_attn.errors import (
    Dinov2AttnError,
    InvalidInputError,
    UnavailableError,
    UnreadableFileError,
)

SUFFIXES = frozenset(
    (
        *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
        *(".ogv", ".webm", ".wmv"),
    )
)
FRAMES_PER_SECOND = Fraction(25)  # of a folder of frames, as in DINO v1
# A video is truncated if more than this part of its frames and of its duration is missing.
MISSING = Fraction(1, 50)
# In the first byte of a packet: RFC 6386, 9.1.
SHOWN_IN_VP8 = 0x10

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken.

    Attributes:
        every: Each frame whose number is a multiple of it.
        fps: At most so many frames in a second. In a folder, how many are shown in a second.

    """

    every: int = 1
    fps: Fraction | None = None

    def of(self, times: Iterable[tuple[T, Fraction]]) -> Iterator[T]:
        """Yield what is taken of frames with times in seconds, in their order."""
        last = None
        for number, (frame, time) in enumerate(times):
            if number % self.every:
                continue
            # Some files round times to milliseconds.
            step = None if self.fps is None else int(time * self.fps + Fraction(1, 16))
            if step is None or step != last:
                last = step
                yield frame


WHOLE = Sampling()


def sampling_of(every: int, fps: float | None) -> Sampling:
    """Return which frames are taken. Raise ``InvalidInputError`` unless ``fps`` is above 0."""
    if fps is not None and not 0 < fps < math.inf:
        raise InvalidInputError("fps above 0", repr(fps), "Leave it out for all frames.")
    return Sampling(every, None if fps is None else Fraction(fps).limit_denominator(100_000))


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame, upright.

    Attributes:
        number: Its number among all frames of the video, from 0 on.
        time: Its time in seconds.
        pixels: uint8 ``(H, W, 3)``.

    """

    number: int
    time: Fraction
    pixels: Pixels


class Video(Protocol):
    """Frames of one size, which can be read again."""

    @property
    def path(self) -> Path: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def rate(self) -> Fraction: ...
    @property
    def aspect(self) -> Fraction: ...
    @property
    def count(self) -> int: ...
    def frames(self) -> Iterator[Frame]: ...


def is_video(path: Path) -> bool:
    """Return whether a file is called like a video."""
    return path.suffix.lower() in SUFFIXES


def library() -> Any:
    """Return PyAV. Raise ``UnavailableError`` without it."""
    if not is_readable():
        raise UnavailableError(
            "the library PyAV, which reads and writes videos",
            "no av in this environment",
            "Install it with `pip install 'dinov2-attn[video]'`.",
        )
    import av

    return av


def is_readable() -> bool:
    """Return whether PyAV is installed."""
    return is_installed("av")


def open_video(
    path: Path, sampling: Sampling = WHOLE, max_pixels: int | None = None, values: Range = None
) -> Video:
    """Return the frames of a video, or of a folder with an image for each frame.

    Args:
        path: The file, or the folder.
        sampling: Which frames are taken.
        max_pixels: The largest frame that is decoded; 100 million pixels by default.
        values: The range of the numbers in the images of a folder, as for ``load_image``.

    Raises:
        UnreadableFileError: If it is no complete video, or has no frames.
        InvalidInputError: If frames have too many pixels.
        UnavailableError: If PyAV is missing.

    """
    if path.is_dir():
        return _Folder.at(path, sampling, max_pixels, values)
    return _File.at(path, sampling, max_pixels)


@dataclass(frozen=True)
class _File:
    """A video that PyAV reads."""

    path: Path
    size: tuple[int, int]
    rate: Fraction
    aspect: Fraction
    count: int
    sampling: Sampling
    max_pixels: int | None

    @classmethod
    def at(cls, path: Path, sampling: Sampling, max_pixels: int | None) -> _File:
        times = times_of(path)
        first = next(_decoded(path, max_pixels), None)
        if first is None:
            raise _no_frames(path)
        size = first.pixels.shape[0], first.pixels.shape[1]
        with _opened(path) as (_, stream):
            rate = stream.average_rate or stream.guessed_rate or FRAMES_PER_SECOND
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            turned = size != (stream.height, stream.width)
        rate = Fraction(rate) / sampling.every
        rate = rate if sampling.fps is None else min(rate, sampling.fps)
        numbers = sampling.of(enumerate(times))
        count, aspect = sum(1 for _ in numbers), 1 / aspect if turned else aspect
        return cls(path, size, rate, aspect, count, sampling, max_pixels)

    def frames(self) -> Iterator[Frame]:
        """Yield the frames that are taken. Raises ``UnreadableFileError``."""
        yield from self.sampling.of(
            (frame, frame.time) for frame in _same_size(self, _decoded(self.path, self.max_pixels))
        )


@dataclass(frozen=True)
class _Folder:
    """A folder with an image for each frame, in the order of their names and numbers."""

    path: Path
    size: tuple[int, int]
    rate: Fraction
    files: tuple[Path, ...]
    max_pixels: int | None
    values: Range = None
    aspect: Fraction = Fraction(1)

    @classmethod
    def at(cls, path: Path, sampling: Sampling, max_pixels: int | None, values: Range) -> _Folder:
        files = images_in(path)[:: sampling.every]
        if not files:
            raise _no_frames(path)
        first = _read_image(files[0], max_pixels, values, warns=True)
        rate = sampling.fps or FRAMES_PER_SECOND
        return cls(path, first.shape[:2], rate, tuple(files), max_pixels, values)

    @property
    def count(self) -> int:
        """The number of frames."""
        return len(self.files)

    def frames(self) -> Iterator[Frame]:
        """Yield the frames. Raises ``UnreadableFileError``."""
        yield from _same_size(self, self._frames())

    def _frames(self) -> Iterator[Frame]:
        for number, file in enumerate(self.files):
            yield Frame(number, number / self.rate, _read_image(file, self.max_pixels, self.values))


def images_in(folder: Path) -> list[Path]:
    """Return the images of a folder, ``frame2`` before ``frame10``. Others are left out."""
    suffixes = readable_suffixes()
    found = [path for path in folder.iterdir() if path.suffix.lower() in suffixes]
    return sorted((path for path in found if not path.name.startswith(".")), key=_natural)


def times_of(path: Path) -> list[Fraction]:
    """Return the time in seconds of each frame of a video, in order, without decoding them.

    Raises:
        UnreadableFileError: If it is no video, or ends before its own header says.
        UnavailableError: If PyAV is missing.

    """
    return _times(path)[0]


def _times(path: Path) -> tuple[list[Fraction], int | None]:
    """Return the time of each frame, and the stamp of the first. A stream may have no stamps."""
    with _opened(path) as (container, stream):
        codec = stream.codec_context.codec.canonical_name
        # Only times: a packet holds its bytes.
        packets = [p.pts for p in container.demux(stream) if p.size and _is_shown(p, codec)]
        base = Fraction(stream.time_base or 1)
        rate = Fraction(stream.average_rate or FRAMES_PER_SECOND)
        stamps = sorted(pts for pts in packets if pts is not None)
        declared, duration = int(stream.frames or 0), stream.duration
    if not packets:
        raise _no_frames(path)
    if len(stamps) < len(packets):  # a stream without times
        return [number / rate for number in range(len(packets))], None
    begin = stamps[0]
    missing = declared * (1 - MISSING) > len(packets)
    if missing and duration and (stamps[-1] - begin) < duration * (1 - MISSING):
        raise UnreadableFileError(
            "a complete video",
            f"{path}, which ends after {len(packets)} of {declared} frames",
            "Copy it again, or repair it: ffmpeg -i broken.mp4 -c copy whole.mp4",
        )
    return [(stamp - begin) * base for stamp in stamps], begin


def _is_shown(packet: Any, codec: str) -> bool:
    """Return whether a packet has a frame to show. In VP8 some are only there to predict others."""
    if packet.is_discard:
        return False
    return codec != "vp8" or bool(memoryview(packet)[0] & SHOWN_IN_VP8)


class FrameReader:
    """Reads frames of videos by their numbers. Reading in ascending order is fast."""

    def __init__(self) -> None:
        self._file: object = None
        self._frames: Iterator[Frame] = iter(())
        self._asked = 0
        self._frame: Frame | None = None  # the last that was decoded
        self._failed: Dinov2AttnError | None = None

    def __call__(self, path: Path, number: int, max_pixels: int | None = None) -> Pixels:
        """Return a frame, upright. Raises ``UnreadableFileError``."""
        file = (path, max_pixels, _state_of(path))
        if file != self._file or number < self._asked:
            self._file, self._frames = file, _numbered(path, max_pixels)
            self._frame = self._failed = None
        self._asked = number
        while self._frame is None or self._frame.number < number:
            # The frames behind a fault are not looked for by decoding all of it again.
            if self._failed is not None:
                raise self._failed.with_traceback(None)
            self._advance(path, number)
        if self._frame.number > number:
            raise UnreadableFileError(
                f"a video whose frame {number} can be decoded",
                f"{path}, whose decoder leaves it out",
                "Leave it out: the first frames of a recording may need frames from before it.",
            )
        return self._frame.pixels

    def _advance(self, path: Path, number: int) -> None:
        """Decode the next frame, or note why there is none."""
        try:
            self._frame = next(self._frames)
        except StopIteration:
            self._failed = self._too_short(path, number)
        except Dinov2AttnError as error:
            self._failed = error

    def _too_short(self, path: Path, number: int) -> UnreadableFileError:
        count = 0 if self._frame is None else self._frame.number + 1
        return UnreadableFileError(
            f"a video with a frame {number}",
            f"{path}, of which {count} can be decoded",
            "Check that a video player plays it to its last frame.",
        )


def _numbered(path: Path, max_pixels: int | None) -> Iterator[Frame]:
    """Yield the frames that can be decoded, each with its number among ``times_of``.

    A decoder leaves out frames that need others: those at the beginning of a recording, say.
    """
    times, begin = _times(path)
    number = -1
    for frame in _decoded(path, max_pixels, begin):
        place = bisect_left(times, frame.time)
        is_listed = begin is not None and place < len(times) and times[place] == frame.time
        number = max(number + 1, place) if is_listed else number + 1
        yield replace(frame, number=number)


def _decoded(
    path: Path, max_pixels: int | None = None, begin: int | None = None
) -> Iterator[Frame]:
    """Yield all frames. Times count from the stamp ``begin``, or from the first frame."""
    with _opened(path) as (container, stream):
        check_pixels(path, (stream.height, stream.width), max_pixels)
        stream.thread_type = "AUTO"
        rate = Fraction(stream.average_rate or FRAMES_PER_SECOND)
        base = Fraction(stream.time_base or 1)
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise UnreadableFileError(
                    "a video without damaged frames",
                    f"{path}, whose frame {number} is damaged",
                    "Check that a video player plays it.",
                )
            begin = frame.pts if begin is None else begin
            time = number / rate if frame.pts is None else (frame.pts - begin) * base
            # The matrix of a file turns counterclockwise, as rot90 does.
            turns = round(frame.rotation / 90) % 4
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), turns)
            yield Frame(number, time, np.ascontiguousarray(pixels))


def _same_size(video: Video, frames: Iterator[Frame]) -> Iterator[Frame]:
    for frame in frames:
        if frame.pixels.shape[:2] != video.size:
            found = "{} × {}".format(*frame.pixels.shape[:2])
            raise InvalidInputError(
                "frames of one size, {} × {}".format(*video.size),
                f"frame {frame.number} of {video.path}, of {found}",
                "Resize them. To draw the images of a folder one by one, name them: folder/*.jpg.",
            )
        yield frame


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video, and report what PyAV raises in the block."""
    av = library()
    _check_regular(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise _no_frames(path)
            yield container, container.streams.video[0]
    except (Dinov2AttnError, GeneratorExit):
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableFileError(
            "a video that can be decoded",
            f"{path} ({type(error).__name__}: {reason})",
            "Check that a video player plays it.",
        ) from error


def _check_regular(path: Path) -> None:
    """Raise ``UnreadableFileError`` if ``path`` is no file: reading a pipe may never end."""
    if is_no_file(path):
        raise UnreadableFileError(
            "a video in a file",
            f"{path}, which is a pipe, a device or a folder",
            "Write it into a file first: it is read several times.",
        )


def _read_image(
    path: Path, max_pixels: int | None, values: Range, *, warns: bool = False
) -> Pixels:
    from dinov2_attn.apps.viz.decoding import decode

    decoded = decode(path, replace(IMAGENET, range=values), max_pixels)
    if warns:
        warn(decoded.doubt)
    return decoded.pixels


def _state_of(path: Path) -> tuple[int, int] | None:
    """Return what changes with the content of a file, None if it is not there."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_size
    return None


def _no_frames(path: Path) -> UnreadableFileError:
    return UnreadableFileError(
        "a video, or a folder with an image for each frame",
        f"{path}, without any frame",
        "Name a video such as clip.mp4, or a folder of images.",
    )


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Return what sorts names so that numbers in them count."""
    parts = re.split(r"(\d+)", path.name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
