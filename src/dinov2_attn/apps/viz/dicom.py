"""Images in DICOM files, read with pydicom: their numbers, with the range that the file states."""

from __future__ import annotations

import io
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dinov2_attn._imports import is_installed
from dinov2_attn.apps.viz.opening import (
    Content,
    check_bytes,
    header,
    most_bytes,
    unpacked_size,
)
from dinov2_attn.apps.viz.reading import Range, Raw
from dinov2_attn.errors import Dinov2AttnError, UnreadableFileError, shown_name

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".dcm", ".dicom"})
# Such a file has these letters behind a preamble of 128 bytes. Old ones have neither.
PREAMBLE, LETTERS = 128, b"DICM"
PACKAGE = "pydicom"
# The name of the one form of DICOM that is packed as a whole.
_DEFLATED = "1.2.840.10008.1.2.1.99"


def is_readable() -> bool:
    """Return whether pydicom is installed."""
    return is_installed(PACKAGE)


def is_called_dicom(path: Path) -> bool:
    """Return whether a file has a suffix of DICOM."""
    return path.suffix.lower() in SUFFIXES


def is_dicom(path: Path, content: Content) -> bool:
    """Return whether a file is DICOM by its first bytes, which old files do not have."""
    return header(path, content, PREAMBLE + len(LETTERS))[PREAMBLE:] == LETTERS


def dicom_size(path: Path, content: Content, max_pixels: int | None = None) -> tuple[int, int]:
    """Return the height and width of the image in a file, from its header."""
    return _size(_dataset(path, content, max_pixels, pixels=False), path)


def read_dicom(
    path: Path, content: bytes | None, wanted: Range, max_pixels: int | None = None
) -> Raw:
    """Return the numbers of the image, or of its first frame.

    Grey values are those of the rescale slope and intercept, such as Hounsfield units. Their range
    is the first window of the file, or else that of its stored bits if these are fewer than 16.
    Low values of MONOCHROME1 are white. Colours become RGB.

    Args:
        path: The file, or only its name if ``content`` is given.
        content: The bytes of the file.
        wanted: The range that is asked for. Without one a VOI LUT of the file is applied.
        max_pixels: The largest image that is read. So large may the file be when it is unpacked.

    Raises:
        UnreadableFileError: If pydicom is missing, or the file has no image that it can decode.

    """
    dataset = _dataset(path, content, max_pixels)
    _size(dataset, path)
    with _decoding(path):
        from pydicom.pixels import apply_color_lut, pixel_array

        frames = int(dataset.get("NumberOfFrames", 1) or 1)
        if frames > 1:
            log.info("%s has %d frames: the first is taken", shown_name(path), frames)
        values = pixel_array(dataset, index=0)
        kind = str(dataset.PhotometricInterpretation)
        if kind == "PALETTE COLOR":
            values = apply_color_lut(values, dataset)
            return Raw(values[..., :3], (0.0, float(np.iinfo(values.dtype).max)))
        if values.ndim == 3:
            return Raw(values, (0.0, 2.0 ** int(dataset.BitsStored) - 1))
        grey = _rescaled(values, dataset)
        return _grey(grey, dataset, wanted, inverted=kind == "MONOCHROME1")


def _rescaled(values: npt.NDArray[Any], dataset: Any) -> npt.NDArray[Any]:
    """Return stored numbers in the unit of the file, such as Hounsfield."""
    if "ModalityLUTSequence" in dataset:
        from pydicom.pixels import apply_modality_lut

        table: npt.NDArray[Any] = apply_modality_lut(values, dataset)
        return table
    slope, intercept = _rescale(dataset)
    return values if (slope, intercept) == (1, 0) else values * slope + intercept


def _rescale(dataset: Any) -> tuple[float, float]:
    slope = _number(dataset, "RescaleSlope")
    return 1.0 if slope is None else slope, _number(dataset, "RescaleIntercept") or 0.0


def _grey(values: npt.NDArray[Any], dataset: Any, wanted: Range, *, inverted: bool) -> Raw:
    if wanted is None and "VOILUTSequence" in dataset:
        from pydicom.pixels import apply_voi

        shown = apply_voi(values, dataset)
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return Raw(shown, (0.0, 2.0**bits - 1), inverted=inverted)
    window = _window(dataset)
    if window is not None:
        return Raw(values, window, inverted=inverted)
    if "ModalityLUTSequence" in dataset:
        bits = int(dataset.ModalityLUTSequence[0].LUTDescriptor[2])
        return Raw(values, (0.0, 2.0**bits - 1), inverted=inverted)
    low, high = _stored(dataset)
    if int(dataset.BitsStored) < 16:
        return Raw(values, (low, high), inverted=inverted)
    # All bits of the data type: as for any other file this is a range only without a sign.
    plain = (low, high) == (0, 2.0**16 - 1)
    return Raw(values, (low, high) if plain else None, assumed=True, inverted=inverted)


def _window(dataset: Any) -> tuple[float, float] | None:
    """Return what becomes black and white by the first window of the file."""
    centre, width = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    if centre is None or width is None or not width > 0:
        return None
    if (_found(dataset, "VOILUTFunction") or "LINEAR") == "LINEAR":
        # It counts whole numbers: DICOM PS3.3, C.11.2.1.2.1.
        centre, width = centre - 0.5, max(width - 1, 1e-3)
    return centre - width / 2, centre + width / 2


def _stored(dataset: Any) -> tuple[float, float]:
    """Return the range of the stored bits, rescaled."""
    bits = int(dataset.BitsStored)
    ends = (0, 2**bits - 1)
    if int(dataset.get("PixelRepresentation", 0)):
        ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    slope, intercept = _rescale(dataset)
    low, high = sorted(end * slope + intercept for end in ends)
    return low, high


def _number(dataset: Any, name: str) -> float | None:
    """Return a number of the file, the first of several; None if there is none."""
    value = _found(dataset, name)
    if value is None or value == "":
        return None
    if hasattr(value, "append"):
        return float(value[0]) if len(value) else None
    return float(value)


def _found(dataset: Any, name: str) -> Any:
    """Return an element of the file, or of its first frame where frames have their own."""
    if dataset.get(name) is not None:
        return dataset.get(name)
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in list(dataset.get(groups) or [])[:1]:
            for element in group:
                for item in list(element.value)[:1] if element.VR == "SQ" else []:
                    if item.get(name) is not None:
                        return item.get(name)
    return None


def _size(dataset: Any, path: Path) -> tuple[int, int]:
    rows, columns = dataset.get("Rows"), dataset.get("Columns")
    if not rows or not columns:
        raise UnreadableFileError(
            "a DICOM file with an image",
            f"{path}, a {dataset.get('Modality') or 'file'} without rows and columns",
            "Leave it out: reports, structures and indexes have no pixels.",
        )
    return int(rows), int(columns)


def _dataset(path: Path, content: Content, max_pixels: int | None, *, pixels: bool = True) -> Any:
    if not is_readable():
        raise UnreadableFileError(
            "an image that Pillow can open",
            f"{path}, a DICOM file, for which pydicom is not installed",
            "Install it with `pip install 'dinov2-attn[dicom]'`.",
        )
    import pydicom

    if content is None:
        with path.open("rb") as file:
            return _dataset(path, file, max_pixels, pixels=pixels)
    given: Any = io.BytesIO(content) if isinstance(content, bytes) else content
    with _decoding(path):
        if _is_packed(given):
            most = most_bytes(max_pixels)
            check_bytes(path, unpacked_size(zlib.decompressobj(-15), given, most), max_pixels)
        given.seek(0)
        # Forced: old files have no letters at their start.
        return pydicom.dcmread(
            given,
            force=is_called_dicom(path),
            stop_before_pixels=not pixels,
        )


def _is_packed(file: BinaryIO) -> bool:
    """Return whether all behind the header is packed, and go there.

    pydicom unpacks it whole, a thousand times its size.
    """
    from pydicom.filereader import read_dataset, read_preamble

    file.seek(0)
    read_preamble(file, force=True)
    found = read_dataset(file, False, True, stop_when=_is_behind_header)
    return str(found.get("TransferSyntaxUID", "")) == _DEFLATED


def _is_behind_header(tag: Any, vr: str | None, length: int) -> bool:
    return int(tag) >> 16 != 2


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except Dinov2AttnError:
        raise
    except Exception as error:  # pydicom and its decoders raise many kinds
        raise UnreadableFileError(
            "a complete DICOM file whose pixels pydicom can decode",
            f"{path} ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
            "Check that a viewer opens it. Compressed files may need "
            "`pip install 'pylibjpeg[all]'`.",
        ) from error
