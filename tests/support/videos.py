"""Tiny videos, written by PyAV."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from PIL import Image

from tests.support.bright_patch import GRID, photograph_of

LOSSLESS = {"crf": "0", "preset": "ultrafast"}


def bright(patch, grid=GRID):
    """Return a photograph whose bright patch is ``patch``."""
    return photograph_of(grid, patch)


def write_video(path, frames, rate=10, times=None, codec="libx264"):
    """Write frames ``(H, W, 3)`` as a video, at ``times`` in milliseconds if they are given."""
    import av

    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "10"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_video(path):
    """Return frames, times in seconds, facts of the stream, and the number of streams."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = list(container.decode(stream))
        frames = [frame.to_ndarray(format="rgb24") for frame in decoded]
        about = (stream.height, stream.width, stream.average_rate, stream.pix_fmt)
        return frames, [float(frame.time) for frame in decoded], about, len(container.streams)


def turned(path, degrees=90):
    """Say in the header of an MP4 that its frames are to be turned."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # the matrix, after version, times and volumes
    numbers = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    for at, number in zip((0, 4, 12, 16), numbers, strict=True):
        content[place + at : place + at + 4] = (number * 65536 % 2**32).to_bytes(4, "big")
    path.write_bytes(content)
    return path


def hide(path, number):
    """Hide a frame of a VP8 video: its packet stays, for frames that refer to it."""
    import av

    with av.open(str(path)) as container:
        packet = [bytes(one) for one in container.demux(video=0) if one.size][number]
    content = bytearray(path.read_bytes())
    content[content.index(packet)] &= ~0x10  # show_frame
    path.write_bytes(content)
    return path


def without_beginning(path, count):
    """Return a copy without the first packets, as a recording that began in between."""
    import av

    cut = path.with_stem("cut")
    with av.open(str(path)) as source, av.open(str(cut), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in [one for one in source.demux(video=0) if one.size][count:]:
            packet.stream = stream
            container.mux(packet)
    return cut


def write_frames(folder, frames):
    folder.mkdir()
    for number, pixels in enumerate(frames):
        Image.fromarray(pixels).save(folder / f"f{number}.png")
    return folder
