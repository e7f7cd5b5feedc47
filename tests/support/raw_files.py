"""Files that Pillow cannot write: TIFFs of any depth and number of channels, PNGs of 16 bits."""

from __future__ import annotations

import struct
import zlib

import numpy as np

SAMPLE_FORMAT = {"u": 1, "i": 2, "f": 3}


def tiff(path, values, bits=None, packed_to=None, **tags):
    """Write values (H, W) or (H, W, C), packed in ``bits`` each; ``tags`` are t281=4095.

    ``packed_to`` are bytes to write in place of them, for a compression as ``t259`` says.
    """
    height, width, channels = np.atleast_3d(values).shape
    bits = bits or 8 * values.dtype.itemsize
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8)
        data = packed.reshape(-1, 4)[:, 1:].tobytes()
    else:
        data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    data = data if packed_to is None else packed_to
    entries = {
        256: ("I", width),
        257: ("I", height),
        258: ("H", [bits] * channels),
        259: ("H", 1),
        262: ("H", 2 if channels in (3, 4) else 1),
        273: ("I", 8),
        277: ("H", channels),
        278: ("I", height),
        279: ("I", len(data)),
        339: ("H", [SAMPLE_FORMAT[values.dtype.kind]] * channels),
        **({338: ("H", [0] * (channels - 3))} if channels > 3 else {}),
        **{int(tag[1:]): ("f" if isinstance(v, float) else "H", v) for tag, v in tags.items()},
    }
    path.write_bytes(_tiff_file(data, entries))
    return path


def _tiff_file(data, entries):
    data += b"\0" * (len(data) % 2)
    directory = 8 + len(data)
    later = directory + 2 + 12 * len(entries) + 4
    fields, extra = b"", b""
    for tag, (kind, value) in sorted(entries.items()):
        several = value if isinstance(value, list) else [value]
        content = struct.pack(f"<{len(several)}{kind}", *several)
        if len(content) > 4:
            place, extra = later + len(extra), extra + content
            content = struct.pack("<I", place)
        code = {"H": 3, "I": 4, "f": 11}[kind]
        fields += struct.pack("<HHI", tag, code, len(several)) + content.ljust(4, b"\0")
    start = struct.pack("<2sHI", b"II", 42, directory) + data
    return start + struct.pack("<H", len(entries)) + fields + b"\0" * 4 + extra


def png(path, values):
    """Write 16 bits: (H, W), (H, W, 3) or (H, W, 4)."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, channels = np.atleast_3d(values).shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path
