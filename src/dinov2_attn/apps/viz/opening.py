"""Open an image file: with Pillow and its plug-ins, or with tifffile."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from dinov2_attn._files import is_no_file
from dinov2_attn._locks import fork_safe_lock
from dinov2_attn.errors import Dinov2AttnError, InvalidInputError, UnreadableFileError, is_failure

# Such an image takes 0.3 GB decoded and 1.2 GB as a tensor. Its attention would take petabytes.
MOST_PIXELS = 100_000_000
# Of a file, and of the values in it, for each pixel that is allowed: 4 floats, or 16 channels.
BYTES_PER_PIXEL = 16
# How often Pillow may read from a file until it knows the size. A damaged JPEG is read byte by
# byte, which takes a second for 3 MB.
MOST_READS = 20_000
# And how many bytes it has to get from each of the reads after that.
BYTES_PER_READ = 64
# Pillow decodes these in Python, some bytes at a time.
BY_PIXEL = frozenset({"BMP", "DIB", "DDS", "PPM", "QOI"})
# The start of a NumPy file, which is long enough for its header.
NUMPY_HEADER = 2**16

Content = bytes | BinaryIO | None

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@contextlib.contextmanager
def reported(path: Path, max_pixels: int | None) -> Iterator[None]:
    """Limit Pillow to ``max_pixels``, and turn its errors into errors of the package."""
    most = max_pixels or MOST_PIXELS
    try:
        with _limit(most):
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, most, str(error)) from error
    except Dinov2AttnError:
        raise
    except BaseException as error:  # Pillow's readers may raise anything, a panic in Rust too
        if not is_failure(error):
            raise
        raise UnreadableFileError(
            "a complete image file",
            f"{path}, which cannot be read ({type(error).__name__}: {error})",
            "Check the path and that an image viewer opens it.",
        ) from error


def most_bytes(max_pixels: int | None) -> int:
    """Return how many bytes a file of an image may have, and the values in it."""
    return BYTES_PER_PIXEL * max(max_pixels or 0, MOST_PIXELS)


@contextlib.contextmanager
def opened(path: Path, content: Content) -> Iterator[Image.Image]:
    """Open an image with Pillow or a plug-in.

    Raises:
        UnreadableFileError: If a plug-in is missing, or there is no header where one has to be.

    """
    register_plugins()
    with _counted(path, content) as file, _identified(path, content, file) as image:
        each = 1 if image.format in BY_PIXEL else BYTES_PER_READ
        file.left = MOST_READS + file.length // each
        yield image


def _identified(path: Path, content: Content, file: _Counted) -> Image.Image:
    try:
        image = Image.open(cast("BinaryIO", file))
    except UnidentifiedImageError as error:
        if package := plugin_for(header(path, content)) or plugin_for(path):
            raise UnreadableFileError(
                "an image that Pillow can open",
                f"{path}, whose format needs a plug-in that is not installed",
                f"Install it with `pip install {package}`.",
            ) from error
        raise
    if image.format == "EPS":  # a program, which Pillow would run with Ghostscript
        image.close()
        raise UnreadableFileError(
            "an image of pixels", f"{path}, which is PostScript", "Convert it to PNG."
        )
    return image


def header(path: Path, content: Content, size: int = 32) -> bytes:
    """Return the first bytes of a file."""
    if isinstance(content, bytes):
        return content[:size]
    if content is not None:
        content.seek(0)
        return content.read(size)
    check_is_file(path)
    with path.open("rb") as file:
        return file.read(size)


def check_is_file(path: Path) -> None:
    """Raise ``UnreadableFileError`` if ``path`` is a pipe, which may never end, or the like."""
    if is_no_file(path):
        raise UnreadableFileError(
            "a file of an image",
            f"{path}, which cannot be read: it is a pipe, a device or a folder",
            "Save the image in a file first.",
        )


def is_array(path: Path, content: Content) -> bool:
    """Return whether a file holds a NumPy array."""
    return header(path, content).startswith(b"\x93NUMPY")


def array_shape(path: Path, content: Content, max_pixels: int | None) -> tuple[int, ...]:
    """Return the shape of the array in a .npy file from its header.

    Raises:
        UnreadableFileError: If it is no image, or the file is shorter than the array.
        InvalidInputError: If it has too many pixels or bytes.

    """
    start = io.BytesIO(header(path, content, NUMPY_HEADER))
    formats: Any = np.lib.format
    version = formats.read_magic(start)
    # Version 3 differs from 2 only in the letters of names of fields.
    first = version == (1, 0)
    read = formats.read_array_header_1_0 if first else formats.read_array_header_2_0
    shape, _, dtype = read(start)
    if len(shape) not in (2, 3) or dtype.kind not in "buif" or not math.prod(shape):
        raise UnreadableFileError(
            "an array of numbers of shape (H, W) or (H, W, C)",
            f"{path} of {dtype} {shape}",
            "Save one image with its channels last.",
        )
    check_pixels(path, shape[:2], max_pixels)
    size = math.prod(shape) * dtype.itemsize
    check_bytes(path, size, max_pixels)
    if length_of(path, content) < start.tell() + size:
        raise UnreadableFileError(
            "a complete array",
            f"{path}, which is shorter than its {dtype} {shape}",
            "Save the array again.",
        )
    return tuple(shape)


def read_array(path: Path, content: bytes | None, max_pixels: int | None) -> npt.NDArray[Any]:
    """Return the array ``(H, W)`` or ``(H, W, C)`` of a .npy file, without unpickling."""
    array_shape(path, content, max_pixels)
    file: Any = path if content is None else io.BytesIO(content)
    mode: Any = "r" if content is None else None
    array: npt.NDArray[Any] = np.load(file, mmap_mode=mode, allow_pickle=False)
    return array


def length_of(path: Path, content: Content) -> int:
    """Return the number of bytes of a file."""
    if isinstance(content, bytes):
        return len(content)
    return os.stat(path).st_size if content is None else content.seek(0, os.SEEK_END)


def check_bytes(path: Path, size: int, max_pixels: int | None) -> None:
    """Raise ``InvalidInputError`` for a file, or for values in one, of more than ``most_bytes``."""
    most = most_bytes(max_pixels)
    if size > most:
        raise InvalidInputError(
            f"an image of at most {most:,} bytes, {BYTES_PER_PIXEL} for each pixel that is allowed",
            f"{path} ({size:,})",
            "Shrink it, or allow more with --max-pixels N.",
        )


def check_pixels(path: Path, size: tuple[int, ...], max_pixels: int | None) -> None:
    """Raise ``InvalidInputError`` for an image of more than ``max_pixels``."""
    most = max_pixels or MOST_PIXELS
    if size[0] * size[1] > most:
        raise _too_large(path, most, f"{size[0]} × {size[1]}")


@contextlib.contextmanager
def tiff_page(path: Path, content: Content) -> Iterator[Any]:
    """Open the first page of a TIFF with tifffile.

    Raises:
        UnreadableFileError: If tifffile is missing.
        ValueError: If the page has no image.

    """
    if importlib.util.find_spec("tifffile") is None:
        raise UnreadableFileError(
            "a complete image file, of a kind that Pillow reads",
            f"{path}, a TIFF that Pillow cannot read in full",
            "Check that an image viewer opens it. For TIFFs of several channels, of 16 bits in "
            "colour or of floats: `pip install tifffile`.",
        )
    import tifffile

    given: Any = io.BytesIO(content) if isinstance(content, bytes) else content or path
    if not isinstance(given, Path):
        given.seek(0)  # tifffile takes what comes next for the start of the file
    with tifffile.TiffFile(given) as file:
        page = file.pages[0]
        if not math.prod(page.shape or (0,)):
            raise ValueError("its first page has no image")
        yield page


def read_tiff(path: Path, content: bytes | None, max_pixels: int | None) -> npt.NDArray[Any]:
    """Read the first page of a TIFF, ``(H, W)`` or ``(H, W, C)``, with tifffile."""
    with tiff_page(path, content) as page:
        check_pixels(path, (page.imagelength, page.imagewidth), max_pixels)
        check_bytes(path, math.prod(page.shape) * page.dtype.itemsize, max_pixels)
        _check_parts(path, page, max_pixels)
        values: npt.NDArray[Any] = page.asarray()
        # Some files store the channels first.
        return np.moveaxis(values, 0, -1) if page.axes.startswith("S") else values


def _check_parts(path: Path, page: Any, max_pixels: int | None) -> None:
    """Raise unless each strip or tile of a page unpacks to no more than it has to.

    tifffile unpacks it whole, a thousand times its size or more.
    """
    unpacker = _UNPACKERS.get(page.compression)
    if unpacker is None:
        return
    each = math.prod(page.chunks) * page.dtype.itemsize
    check_bytes(path, each, max_pixels)
    file, total = page.parent.filehandle, 0
    for offset, length in zip(page.dataoffsets, page.databytecounts, strict=False):
        file.seek(offset)
        size = unpacked_size(unpacker(), io.BytesIO(file.read(min(length, file.size))), each)
        if size > each:
            raise ValueError(f"a part of {each:,} bytes unpacks to more")
        total += size
        check_bytes(path, total, max_pixels)


class Unpacker(Protocol):
    """Unpacks a stream piece by piece, as objects of ``zlib`` do."""

    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Lzma:
    """Unpacks LZMA as tifffile does, with no more memory than usual files need."""

    def __init__(self) -> None:
        import lzma  # which not every Python has

        self._made = lzma.LZMADecompressor(memlimit=2**28)

    @property
    def eof(self) -> bool:
        return self._made.eof

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._made.decompress(data, max_length)


# By TIFF's number of the compression. tifffile has no others of its own that unpack to much more
# than their size: those of imagecodecs are given the size that is wanted.
_UNPACKERS: dict[int, Callable[[], Unpacker]] = {
    8: zlib.decompressobj,
    32946: zlib.decompressobj,
    34925: _Lzma,
}
# How much is unpacked at once, to be counted.
_AT_ONCE = 2**20


def unpacked_size(unpacker: Unpacker, file: BinaryIO, most: int) -> int:
    """Return how many bytes the rest of ``file`` unpacks to, or a number above ``most``.

    What is damaged counts as far as it goes: who reads it later says what is wrong.
    """
    size, rest = 0, b""
    with contextlib.suppress(Exception):  # each format has an error of its own
        while size <= most and not unpacker.eof:
            given = rest or file.read(_AT_ONCE)
            found = unpacker.decompress(given, _AT_ONCE)
            rest = getattr(unpacker, "unconsumed_tail", b"")
            if not (given or found):
                break
            size += len(found)
    return size


def is_tiff(path: Path, content: Content) -> bool:
    """Return whether a file starts like a TIFF."""
    return header(path, content).startswith(_TIFF)


def _too_large(path: Path, most: int, found: str) -> InvalidInputError:
    return InvalidInputError(
        f"an image of at most {most:,} pixels",
        f"{path} ({found})",
        "Shrink it, or allow it with --max-pixels N.",
    )


class _Counted(io.BufferedIOBase):
    """A file that may be read ``left`` times more, and ``length`` bytes long.

    Pillow's errors show its name instead of an address in memory.
    """

    def __init__(self, file: BinaryIO, path: Path, length: int) -> None:
        self._file, self._path = file, path
        self.length, self.left = length, MOST_READS

    def __repr__(self) -> str:
        return repr(str(self._path))

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise UnreadableFileError(
                "an image file in which its parts are found",
                f"{self._path}, in which a reader goes on from byte to byte",
                "Check that an image viewer opens it.",
            )
        return self._file.read(-1 if size is None else size)

    def readline(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        return self._file.readline(-1 if size is None else size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


@contextlib.contextmanager
def _counted(path: Path, content: Content) -> Iterator[_Counted]:
    with contextlib.ExitStack() as stack:
        if content is None:
            check_is_file(path)
            file: BinaryIO = stack.enter_context(path.open("rb"))
        else:
            file = io.BytesIO(content) if isinstance(content, bytes) else content
        length = length_of(path, file)
        file.seek(0)
        yield _Counted(file, path, length)


# Pillow has one limit for the whole process.
_LIMIT = fork_safe_lock()


@contextlib.contextmanager
def _limit(pixels: int) -> Iterator[None]:
    """Make Pillow refuse images of more ``pixels`` by their headers."""
    with _LIMIT, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


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
