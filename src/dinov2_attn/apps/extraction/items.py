"""The images of a source of files: folders, lists of paths, tars and single images."""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from dinov2_attn._files import is_no_file
from dinov2_attn.apps.extraction.layout import ABOUT
from dinov2_attn.apps.extraction.passed_over import LINKS, Sieve, describe, is_hidden, suffix_of
from dinov2_attn.apps.viz.decoding import stored_size
from dinov2_attn.apps.viz.opening import check_bytes, length_of, plugin_for
from dinov2_attn.apps.viz.videos import WHOLE, Sampling, is_video, library, times_of
from dinov2_attn.errors import Dinov2AttnError, InvalidInputError, UnreadableFileError

# The header of a file of more bytes is looked at before all of it is read.
LARGE = 2**20
# The first bytes of gzip, bzip2, xz, Zstandard and zip.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")

# What reading a source that is damaged raises: its sizes may be any numbers, its headers nested.
_UNLISTED = (
    *(OSError, tarfile.TarError, EOFError, ValueError),
    *(OverflowError, RecursionError, MemoryError),
)


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        source: The name of the folder, list or tar.
        path: The path of the image in there, as a list has it, parts joined by ``/``.
        file: The file with its bytes: the image itself or the tar. Empty for an item of a dataset.
        place: The offset and length of the image in a tar.
        frame: The number of a frame of a video, whose ``path`` ends in it: ``clip.mp4#12``.
        time: The time of that frame in seconds.

    """

    source: str
    path: str
    file: str
    place: tuple[int, int] | None = None
    frame: int | None = None
    time: float | None = None

    def check(self) -> None:
        """Raise ``UnreadableFileError`` if it is no file: reading a pipe may never end."""
        if is_no_file(self.file):
            raise UnreadableFileError(
                "a file that can be read",
                f"{self.path}, which is a pipe, a device or a folder",
                "Leave it out of the source.",
            )

    def size(self, max_pixels: int | None) -> tuple[int, int]:
        """Return height and width as they are stored, of which only the header is read."""
        with self.opened() as file:
            return stored_size(Path(self.path), max_pixels, file)

    def read(self, max_pixels: int | None = None) -> bytes:
        """Return the bytes of the image, after a look at the header of a large one.

        Raises:
            UnreadableFileError: If it cannot be read, or a large file is no image.
            InvalidInputError: If it has too many pixels or bytes.

        """
        path = Path(self.path)
        with self.opened() as file:
            length = length_of(path, file)
            check_bytes(path, length, max_pixels)
            if length > LARGE:
                stored_size(path, max_pixels, file)
            file.seek(0)
            return file.read(length)  # not what is appended meanwhile

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open the image, or its place in a tar. Raises ``UnreadableFileError``."""
        try:
            with open(self.file, "rb") as file:
                yield file if self.place is None else cast("BinaryIO", _Section(file, *self.place))
        except Dinov2AttnError:
            raise
        except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise UnreadableFileError(
                "a file that can be read",
                f"{self.path} ({type(error).__name__}: {reason})",
                "Check the path and who may read it.",
            ) from error


class _Section(io.BufferedIOBase):
    """``length`` bytes of a file from ``start`` on, to be read as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def read(self, size: int | None = -1, /) -> bytes:
        rest = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        found = self._file.read(rest if size is None or size < 0 else min(size, rest))
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def list_items(
    sources: Sequence[str | Path], sieve: Sieve | None = None, sampling: Sampling = WHOLE
) -> list[Item]:
    """Return the images of all ``sources``, one source after the other.

    Args:
        sources: Each is one of

            - a folder: every file below it that has the suffix of an image, in the order of
              names. Links to folders are followed, and names that begin with a dot are skipped.
            - a tar: every image in it, in its order, including shards of WebDataset.
            - an image.
            - a video, whose frames are images. The other sources may hold videos too, but for tars.
            - a glob: the folders, tars and images that match, in the order of their paths.
            - any other file: a list with one path per line, absolute or relative to its folder.
        sieve: Counts the files that are no images.
        sampling: Which frames of videos are taken.

    Raises:
        UnreadableFileError: If a source cannot be read.
        InvalidInputError: If a source has no images or is compressed.

    """
    sieve = sieve or Sieve()
    items: list[Item] = []
    for source in map(Path, sources):
        found = list(_items_of(source, sieve))
        if not found:
            passed_over = sieve.passed_over
            raise InvalidInputError(
                f"images in {source}",
                "none called like one" + f" ({describe(passed_over)})" * bool(passed_over),
                "Name a folder, a tar, or a list with a path on each line.",
            )
        items += (frame for item in found for frame in _frames(item, sampling))
    if not items:
        raise InvalidInputError("a source of images", "none", "Name a folder, a list or a tar.")
    return items


def _frames(item: Item, sampling: Sampling) -> Iterator[Item]:
    """Yield the frames of a video, and any other item, or a video without frames, as it is."""
    path = Path(item.file)
    if not is_video(path):
        yield item
        return
    library()
    try:
        times = times_of(path)
    except Dinov2AttnError:  # reading it says why
        yield item
        return
    for number, time in sampling.of((one, one[1]) for one in enumerate(times)):
        name = f"{item.path}#{number}"
        yield replace(item, path=name, frame=number, time=round(float(time), 6))


def _items_of(source: Path, sieve: Sieve) -> Iterator[Item]:
    name = Path(os.path.abspath(source)).name
    try:
        if not os.path.lexists(source) and glob.has_magic(str(source)):
            yield from _in_glob(source, sieve)
        elif source.is_dir():
            yield from _in_folder(source, name, sieve)
        elif not stat.S_ISREG(source.stat().st_mode):
            raise InvalidInputError(
                "a folder or a file",
                f"{source}, which is neither",
                "Write a list into a file first: a pipe can be read only once.",
            )
        elif is_video(source) or sieve.takes(source.name, counted=False):
            yield Item(name, name, str(source))
        elif _is_tar(source):
            yield from _in_tar(source, name, sieve)
        else:
            yield from _in_list(source, name)
    except InvalidInputError:  # which is a ValueError
        raise
    except _UNLISTED as error:
        raise UnreadableFileError(
            "a folder, a list of paths, an uncompressed tar or an image",
            f"{source} ({type(error).__name__}: {error})",
            "Check the path and who may read it.",
        ) from error


def _in_folder(source: Path, name: str, sieve: Sieve) -> Iterator[Item]:
    for path in _walk(source, frozenset(), sieve):
        yield Item(name, path.relative_to(source).as_posix(), str(path))


def _walk(folder: Path, above: frozenset[str], sieve: Sieve, ours: bool = False) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that contains it
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    # The files of an extraction do not count as passed over.
    ours = ours or any(entry.name == ABOUT for entry in found)
    for entry in found:
        if is_hidden(entry.name):
            continue
        if _is_folder(entry):
            yield from _walk(folder / entry.name, above | {real}, sieve, ours)
        elif sieve.takes(entry.name, counted=not ours):
            yield folder / entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say
        return False


def _in_glob(pattern: Path, sieve: Sieve) -> Iterator[Item]:
    """Yield the matches of a glob, by their paths from the last folder without a pattern."""
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    root = Path(*fixed)
    name = Path(os.path.abspath(root)).name
    taken: set[str] = set()
    for match in sorted(map(Path, glob.glob(str(pattern), recursive=True))):
        for item in _matched(match, name, root, sieve):
            if item.path not in taken or item.place is not None:
                taken.add(item.path)
                yield item


def _matched(match: Path, name: str, root: Path, sieve: Sieve) -> Iterator[Item]:
    if match.is_dir():
        for path in _walk(match, frozenset(), sieve):
            yield Item(name, path.relative_to(root).as_posix(), str(path))
    elif match.suffix == ".tar":
        yield from _in_tar(match, match.name, sieve)
    elif sieve.takes(match.name):
        yield Item(name, match.relative_to(root).as_posix(), str(match))


def _in_tar(source: Path, name: str, sieve: Sieve) -> Iterator[Item]:
    for path, place in _members(source):
        if place is None:
            sieve.pass_over(LINKS)
        elif is_video(Path(path)):
            sieve.pass_over(f"{suffix_of(path)} in a tar")
        elif sieve.takes(path):
            yield Item(name, path, str(source), place)


def _in_list(source: Path, name: str) -> Iterator[Item]:
    content, is_text = _text_of(source)
    if not is_text or content.startswith((b"%!PS", b"%PDF")):
        if _is_image(source):
            yield Item(name, name, str(source))
            return
        package = plugin_for(content[:32]) or plugin_for(source)
        raise InvalidInputError(
            "a folder, an uncompressed tar, an image, or a text with a path on each line",
            f"{source}, which is none of these that can be read here",
            f"Install its reader with `pip install {package}`."
            if package
            else "Images are files that Pillow opens, such as .jpg, .png, .tif or .webp.",
        )
    # As Python decodes paths: bytes that are not UTF-8 are restored.
    text = content.decode("utf-8-sig", "surrogateescape")
    for line in text.split("\n"):
        if path := line.rstrip("\r"):
            yield Item(name, path, str(source.parent / path))


def _text_of(source: Path) -> tuple[bytes, bool]:
    """Return the bytes of a file, up to where it proves to be no text, and whether it is text."""
    parts: list[bytes] = []
    with source.open("rb") as file:
        while part := file.read(LARGE):
            parts.append(part)
            if b"\0" in part:
                return b"".join(parts), False
    return b"".join(parts), True


def _is_image(source: Path) -> bool:
    """Return whether a file without the suffix of an image is one."""
    try:
        stored_size(source)
    except UnreadableFileError:
        return False
    except InvalidInputError:  # too large a one
        return True
    return True


def _is_tar(source: Path) -> bool:
    """Return whether ``source`` is a tar; raise ``InvalidInputError`` if it is compressed."""
    with source.open("rb") as file:
        start = file.read(512)
    if start.startswith(_COMPRESSED):
        raise InvalidInputError(
            "a tar in which every image can be read by itself",
            f"{source}, which is compressed",
            "Decompress it first: images gain nothing from compression.",
        )
    return source.suffix == ".tar" or start[257:262] == b"ustar"


def _members(source: Path) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yield the name of each file in a tar with its offset and length.

    Devices, and links to files that do not come before them in the tar, have no place. A hard
    link is a second name of a file.
    """
    places: dict[str, tuple[int, int]] = {}
    behind = 0  # the header of the member before
    with tarfile.open(source, "r:") as tar:
        for member in tar:
            # Python before 3.11.14 goes back by a negative size, and on from there for ever.
            if member.size < 0 or member.offset < behind:
                raise tarfile.ReadError(f"a size of {member.size} bytes")
            behind = member.offset + tarfile.BLOCKSIZE
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
