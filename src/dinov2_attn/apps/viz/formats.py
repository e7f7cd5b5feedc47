"""Which files Pillow can open, with the plug-ins for HEIC, JPEG XL and AVIF."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile


@dataclass(frozen=True)
class Plugin:
    """A package with which Pillow opens another format.

    Attributes:
        package: Its name on PyPI.
        module: The module to import.
        format: Pillow's name of the format after the plug-in is registered.
        suffixes: The suffixes of such files, in lower case.
        matches: Whether the first bytes of a file are of this format.

    """

    package: str
    module: str
    format: str
    suffixes: frozenset[str]
    matches: Callable[[bytes], bool]

    def register(self) -> bool:
        """Register the plug-in with Pillow once. Return whether the format can be opened."""
        Image.init()
        if self.format not in Image.OPEN:
            with contextlib.suppress(ImportError):
                module: Any = importlib.import_module(self.module)
                # The others register when they are imported.
                getattr(module, "register_heif_opener", lambda: None)()
        return self.format in Image.OPEN


def register_plugins() -> None:
    """Register every installed plug-in with Pillow."""
    for plugin in _PLUGINS:
        plugin.register()


def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of all files that Pillow can decode, such as ``".png"``.

    Formats that Pillow only recognises (HDF5, GRIB, MPEG) are excluded, and PostScript, which is
    a program.
    """
    register_plugins()
    extensions = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in extensions.items() if _decodes(kind))


def plugin_for(path_or_header: str | os.PathLike[str] | bytes) -> str | None:
    """Return the package on PyPI with which Pillow could open this file.

    Args:
        path_or_header: A path, of which only the suffix counts, or the first 32 bytes of a file.

    Returns:
        Its name, or ``None`` if no plug-in is known or needed.

    """
    for plugin in _PLUGINS:
        if _is_of(plugin, path_or_header) and not plugin.register():
            return plugin.package
    return None


def _is_of(plugin: Plugin, path_or_header: str | os.PathLike[str] | bytes) -> bool:
    if isinstance(path_or_header, bytes):
        return plugin.matches(path_or_header)
    return Path(path_or_header).suffix.lower() in plugin.suffixes


def _decodes(kind: str) -> bool:
    if kind not in Image.OPEN or kind in _NO_PIXELS:
        return False
    factory: Any = Image.OPEN[kind][0]
    return not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))


# Pillow identifies MPEG files without decoding them.
_NO_PIXELS = {"EPS", "MPEG"}


def _brand(*brands: bytes) -> Callable[[bytes], bool]:
    """Return a test for the header of an ISO media file with one of these major brands."""
    return lambda header: header[4:8] == b"ftyp" and header[8:12] in brands


_JPEG_XL = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")

_PLUGINS = (
    Plugin(
        "pillow-heif",
        "pillow_heif",
        "HEIF",
        frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"}),
        _brand(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
    ),
    Plugin(
        "pillow-jxl-plugin",
        "pillow_jxl",
        "JXL",
        frozenset({".jxl"}),
        lambda header: header.startswith(_JPEG_XL),
    ),
    # Pillow reads AVIF from version 11.3 on, if it was built with libavif.
    Plugin(
        "pillow-avif-plugin",
        "pillow_avif",
        "AVIF",
        frozenset({".avif", ".avifs"}),
        _brand(b"avif", b"avis"),
    ),
)
