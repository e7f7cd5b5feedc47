"""The images of a source: a folder, a list of paths, a tar, or one image."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2_attn.errors import InvalidInput, UnreadableFile

# What counts as an image in a folder or a tar, where other files may lie beside it.
EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"),
    *(".ppm", ".tif", ".tiff", ".webp"),
)


@dataclass(frozen=True)
class Item:
    """One image of a source.

    ======  ====================================================================
    source  the name of the folder, list or tar
    path    the image's path in there, as a list has it, parts joined by ``/``
    file    the file with its bytes: the image itself, or the tar
    place   offset and length of the image in a tar
    ======  ====================================================================
    """

    source: str
    path: str
    file: str
    place: tuple[int, int] | None = None

    def check(self) -> None:
        """Raise ``UnreadableFile`` for what is there but no file: a pipe is waited for forever."""
        if os.path.exists(self.file) and not os.path.isfile(self.file):
            raise UnreadableFile(
                "a file that can be read",
                f"{self.path}, which is a pipe, a device or a folder",
                "Leave it out of the source.",
            )

    def read(self) -> bytes:
        """Return the bytes of the image. Raises ``UnreadableFile``."""
        try:
            with open(self.file, "rb") as file:
                if self.place is None:
                    return file.read()
                file.seek(self.place[0])
                return file.read(self.place[1])
        except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise UnreadableFile(
                "a file that can be read",
                f"{self.path} ({type(error).__name__}: {reason})",
                "Check the path and who may read it.",
            ) from error


def list_items(sources: Sequence[str | Path]) -> list[Item]:
    """Return the images of all ``sources``, one after the other, in an order of their own.

    ========  ======================================================================
    a folder  every file below it that is called like an image, folders and files in the
              order of their names; links to folders are followed, what begins with a
              dot is not looked at
    a tar     every image in it, in its order, WebDataset's shards among them
    an image  itself
    a list    any other file: a path on each line, absolute or from the list's own folder
    ========  ======================================================================

    Raises ``UnreadableFile`` for a source that cannot be read and ``InvalidInput`` for one
    without images, or compressed.
    """
    items: list[Item] = []
    for source in map(Path, sources):
        found = list(_items_of(source))
        if not found:
            raise InvalidInput(
                f"images in {source}",
                f"none called {', '.join(EXTENSIONS)}",
                "Name a folder, a tar, or a list with a path on each line.",
            )
        items += found
    if not items:
        raise InvalidInput("a source of images", "none", "Name a folder, a list or a tar.")
    return items


def _items_of(source: Path) -> Iterator[Item]:
    name = Path(os.path.abspath(source)).name
    try:
        if source.is_dir():
            for path in _walk(source, frozenset()):
                inside = path.relative_to(source).as_posix()
                yield Item(name, inside, str(path))
        elif not stat.S_ISREG(source.stat().st_mode):
            raise InvalidInput(
                "a folder or a file",
                f"{source}, which is neither",
                "Write a list into a file first: a pipe can be read only once.",
            )
        elif _is_image(source.name):
            yield Item(name, name, str(source))
        elif _is_tar(source):
            yield from _in_tar(source, name)
        else:
            yield from _in_list(source, name)
    except InvalidInput:  # which is a ValueError
        raise
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise UnreadableFile(
            "a folder, a list of paths, an uncompressed tar or an image",
            f"{source} ({type(error).__name__}: {error})",
            "Check the path and who may read it.",
        ) from error


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it is in
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _walk(folder / entry.name, above | {real})
        elif _is_image(entry.name):
            yield folder / entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say
        return False


def _is_tar(source: Path) -> bool:
    with source.open("rb") as file:
        start = file.read(512)
    if start.startswith(_COMPRESSED):
        raise InvalidInput(
            "a tar in which every image can be read by itself",
            f"{source}, which is compressed",
            "Decompress it first: images gain nothing from compression.",
        )
    return source.suffix == ".tar" or start[257:262] == b"ustar"


# gzip, bzip2, xz, Zstandard, zip.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")


def _in_tar(source: Path, name: str) -> Iterator[Item]:
    """Yield the images of a tar by their places: nothing is unpacked."""
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(source, "r:") as tar:
        for member in tar:
            if member.isreg() and not member.issparse():
                places[member.name] = member.offset_data, member.size
            elif member.islnk() and member.linkname in places:  # a second name of one before
                places[member.name] = places[member.linkname]
            else:
                continue
            if _is_image(Path(member.name).name):
                yield Item(name, member.name, str(source), places[member.name])


def _in_list(source: Path, name: str) -> Iterator[Item]:
    # As paths are decoded: bytes that are no UTF-8 come back as they were.
    text = source.read_bytes().decode("utf-8-sig", "surrogateescape")
    if "\0" in text:
        raise InvalidInput(
            "a folder, an uncompressed tar, an image, or a text with a path on each line",
            f"{source}, which is none of these",
            f"Images are called {', '.join(EXTENSIONS)}.",
        )
    for line in text.split("\n"):
        if path := line.rstrip("\r"):
            yield Item(name, path, str(source.parent / path))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)
