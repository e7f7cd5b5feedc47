"""The files in an uncompressed tar by their places: nothing is unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from dinov2_attn.errors import InvalidInputError

# gzip, bzip2, xz, Zstandard, zip.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")


def is_tar(source: Path) -> bool:
    """Return whether ``source`` is a tar. Raises ``InvalidInputError`` for a compressed file."""
    with source.open("rb") as file:
        start = file.read(512)
    if start.startswith(_COMPRESSED):
        raise InvalidInputError(
            "a tar in which every image can be read by itself",
            f"{source}, which is compressed",
            "Decompress it first: images gain nothing from compression.",
        )
    return source.suffix == ".tar" or start[257:262] == b"ustar"


def members(source: Path) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yield the name of each file in a tar with its offset and length.

    Links to files that are not in there before them, and devices, have no place. A second
    name of a file is a hard link to it.
    """
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(source, "r:") as tar:
        for member in tar:
            if member.isdir():
                continue
            if member.isreg() and not member.issparse():
                places[member.name] = member.offset_data, member.size
            elif member.islnk() and member.linkname in places:
                places[member.name] = places[member.linkname]
            else:
                yield member.name, None
                continue
            yield member.name, places[member.name]
