"""The images of a source: a folder, a list of paths, a tar, or one image."""

from __future__ import annotations

import glob
import itertools
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dinov2_attn.apps.extraction.item import Item
from dinov2_attn.apps.extraction.layout import ABOUT
from dinov2_attn.apps.extraction.passed_over import LINKS, Sieve, describe, is_hidden
from dinov2_attn.apps.extraction.tars import is_tar, members
from dinov2_attn.apps.viz.decoding import stored_size
from dinov2_attn.apps.viz.formats import plugin_for
from dinov2_attn.errors import InvalidInputError, UnreadableFileError


def list_items(sources: Sequence[str | Path], sieve: Sieve | None = None) -> list[Item]:
    """Return the images of all ``sources``, one after the other, in an order of their own.

    ========  ======================================================================
    a folder  every file below it that is called like an image, folders and files in the
              order of their names; links to folders are followed, what begins with a
              dot is not looked at
    a tar     every image in it, in its order, WebDataset's shards among them
    an image  itself
    a glob    what it matches, folders, tars and images, in the order of their paths
    a list    any other file: a path on each line, absolute or from the list's own folder
    ========  ======================================================================

    What lies beside them is counted by ``sieve``. Raises ``UnreadableFileError`` for a source that
    cannot be read and ``InvalidInputError`` for one without images, or compressed.
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
        items += found
    if not items:
        raise InvalidInputError("a source of images", "none", "Name a folder, a list or a tar.")
    return items


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
        elif sieve.takes(source.name, counted=False):
            yield Item(name, name, str(source))
        elif is_tar(source):
            yield from _in_tar(source, name, sieve)
        else:
            yield from _in_list(source, name)
    except InvalidInputError:  # which is a ValueError
        raise
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
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
    if real in above:  # a link to a folder that it is in
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    # What an extraction has written is nothing that was passed over.
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
    """Yield what a glob matches, called by its path from the last folder without a pattern."""
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
    for path, place in members(source):
        if place is None:
            sieve.pass_over(LINKS)
        elif sieve.takes(path):
            yield Item(name, path, str(source), place)


def _in_list(source: Path, name: str) -> Iterator[Item]:
    content = source.read_bytes()
    if b"\0" in content or content.startswith((b"%!PS", b"%PDF")):
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
    # As paths are decoded: bytes that are no UTF-8 come back as they were.
    text = content.decode("utf-8-sig", "surrogateescape")
    for line in text.split("\n"):
        if path := line.rstrip("\r"):
            yield Item(name, path, str(source.parent / path))


def _is_image(source: Path) -> bool:
    """Return whether a file that is not called like an image is one."""
    try:
        stored_size(source)
    except UnreadableFileError:
        return False
    except InvalidInputError:  # too large a one
        return True
    return True
