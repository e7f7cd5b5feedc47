"""Which files Pillow can open here, the plug-ins for HEIC, JPEG XL and AVIF included."""

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
    """A package that lets Pillow open more formats.

    ========  ==================================================================
    package   its name on PyPI
    module    the module to import
    format    what Pillow calls the format, once the plug-in is registered
    suffixes  how such files are called, in lower case
    matches   whether the first bytes of a file are of this format
    ========  ==================================================================
    """

    package: str
    module: str
    format: str
    suffixes: frozenset[str]
    matches: Callable[[bytes], bool]

    def register(self) -> bool:
        """Register the plug-in with Pillow, once; return whether the format can be opened."""
        Image.init()
        if self.format not in Image.OPEN:
            with contextlib.suppress(ImportError):
                module: Any = importlib.import_module(self.module)
                # The others register when they are imported.
                getattr(module, "register_heif_opener", lambda: None)()
        return self.format in Image.OPEN


def register_plugins() -> None:
    """Register with Pillow every plug-in that is installed."""
    for plugin in _PLUGINS:
        plugin.register()


def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of all files that Pillow can decode here, as ``".png"``.

    Left out are formats that Pillow only recognises (HDF5, GRIB, MPEG), and PostScript, which
    is a program.
    """
    register_plugins()
    extensions = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in extensions.items() if _decodes(kind))


def plugin_for(path_or_header: str | os.PathLike[str] | bytes) -> str | None:
    """Return which package on PyPI would let Pillow open this file.

    A path is judged by its suffix, bytes (the first 32 of a file) by their content. ``None`` if
    no plug-in is known for the format, or if it can be opened already.
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


# MPEG files are identified and not decoded.
_NO_PIXELS = {"EPS", "MPEG"}


def _brand(*brands: bytes) -> Callable[[bytes], bool]:
    """Return whether a header is that of an ISO media file with one of these major brands."""
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
    # Pillow reads AVIF itself from version 11.3 on, where it was built with libavif.
    Plugin(
        "pillow-avif-plugin",
        "pillow_avif",
        "AVIF",
        frozenset({".avif", ".avifs"}),
        _brand(b"avif", b"avis"),
    ),
)
