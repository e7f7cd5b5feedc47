"""What a file is that is no checkpoint: told by its first bytes, in words for its owner."""

from __future__ import annotations

import shlex
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from dinov2_attn.errors import UnreadableFileError

CHECKPOINT = "a checkpoint by torch.save or by safetensors"

SAVE_AGAIN = "Where the model was made, save its weights: torch.save(model.state_dict(), PATH)."
_DOWNLOAD = "Download it again."
_OTHER_FORMAT = f"Take the .pth or .safetensors file of the model. {SAVE_AGAIN}"


class Kind(NamedTuple):
    """A kind of file: what it is, and what to do instead."""

    what: str
    next_step: str


_HTML = Kind(
    "a web page and not the file",
    "Download the file itself: the address led to a page, such as one that asks to log in.",
)
_LFS = Kind(
    "a pointer of Git LFS in the place of the file",
    "Run `git lfs pull` in the repository that it is from.",
)
_IMAGE = Kind("an image", "Name the checkpoint; images go before the options.")
_PACKED = Kind("a compressed file", "Unpack it, and name the file that was inside.")
_ARRAYS = Kind(
    "arrays of NumPy",
    "Save them as tensors: torch.save({name: torch.from_numpy(array), …}, PATH).",
)
_HDF5 = Kind("an HDF5 file, as Keras and TensorFlow save weights", _OTHER_FORMAT)
_ONNX = Kind("an ONNX graph", _OTHER_FORMAT)

_BY_START = {
    b"version https://git-lfs": _LFS,
    b"GGUF": Kind("a GGUF file, the format of llama.cpp", _OTHER_FORMAT),
    b"ggml": Kind("a GGML file, the format of llama.cpp", _OTHER_FORMAT),
    b"\x93NUMPY": _ARRAYS,
    b"\x89HDF\r\n\x1a\n": _HDF5,
    b"\x89PNG": _IMAGE,
    b"\xff\xd8\xff": _IMAGE,
    b"GIF8": _IMAGE,
    b"II*\0": _IMAGE,
    b"MM\0*": _IMAGE,
    b"BM": _IMAGE,
    b"%PDF": Kind("a PDF document", "Name the checkpoint."),
    b"\x1f\x8b": _PACKED,
    b"BZh": _PACKED,
    b"\xfd7zXZ\0": _PACKED,
    b"7z\xbc\xaf": _PACKED,
    b"Rar!": _PACKED,
    b"\x28\xb5\x2f\xfd": _PACKED,
}

# Of formats whose first bytes say nothing.
_BY_SUFFIX = {
    ".onnx": _ONNX,
    ".h5": _HDF5,
    ".pb": Kind("a graph of TensorFlow", _OTHER_FORMAT),
    ".tflite": Kind("a model of TensorFlow Lite", _OTHER_FORMAT),
    ".msgpack": Kind("weights of Flax", _OTHER_FORMAT),
    ".engine": Kind("an engine of TensorRT", _OTHER_FORMAT),
    ".gguf": _BY_START[b"GGUF"],
}

_TORCHSCRIPT = Kind(
    "a TorchScript archive, which holds code",
    "If you trust it, save its weights: torch.save(torch.jit.load(PATH).state_dict(), NEW).",
)
_EXPORTED = Kind(
    "a program by torch.export, which holds code",
    "If you trust it, save its weights: torch.save(torch.export.load(PATH).state_dict, NEW).",
)
_TAR = Kind(
    "a tar archive, which PyTorch would unpack", "Unpack it, and name the file that was inside."
)
_CUT_SHORT = Kind("a file by torch.save that was cut short or damaged", f"{_DOWNLOAD} {SAVE_AGAIN}")


def distributed(folder: Path) -> UnreadableFileError:
    """Return the error for PyTorch's distributed format, and how to convert it."""
    return UnreadableFileError(
        CHECKPOINT,
        f"{folder}, a checkpoint in PyTorch's distributed format, in a folder of parts",
        "If you trust it (its .metadata is a pickle, which can run code), convert it: "
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        f"{shlex.quote(str(folder))} NEW.pth",
    )


def refuse_others(path: Path) -> None:
    """Raise ``UnreadableFileError`` if ``path`` is a file of a known other kind."""
    if path.suffix == ".distcp" or path.name == ".metadata":
        raise distributed(path.parent)
    kind = kind_of(path)
    if kind is not None:
        raise UnreadableFileError(CHECKPOINT, f"{path}, {kind.what}", kind.next_step)


def kind_of(path: Path) -> Kind | None:
    """Return what other kind of file ``path`` is; ``None`` if PyTorch may have written it."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return Kind("an empty file", f"{_DOWNLOAD} {SAVE_AGAIN}")
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    known = next((kind for first, kind in _BY_START.items() if start.startswith(first)), None)
    if known is None and start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        known = _IMAGE
    if known is None and tarfile.is_tarfile(path):
        known = _TAR
    return known or _kind_of_text(start) or _BY_SUFFIX.get(path.suffix) or _kind_of_graph(start)


def _kind_of_zip(path: Path) -> Kind | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # what damaged lists raise
        return _CUT_SHORT
    if "constants.pkl" in names:
        return _TORCHSCRIPT
    if "serialized_exported_program.json" in names or "archive_format" in names:
        return _EXPORTED
    if names and all(name.endswith(".npy") for name in names):
        return _ARRAYS
    if "data.pkl" in names:
        return None
    return Kind("a zip archive that torch.save did not write", _PACKED.next_step)


def _kind_of_text(start: bytes) -> Kind | None:
    """Tell text from bytes: PyTorch's files begin with bytes that no text has."""
    try:
        # A character may be cut in two at the end.
        text = start.decode("utf-8-sig", "strict" if len(start) < 512 else "ignore").strip()
    except UnicodeDecodeError:
        return None
    if not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    lower = text.lower()
    if lower.startswith("<") and any(sign in lower for sign in ("html", "<?xml", "<!doctype")):
        return _HTML
    if text.startswith(("{", "[")):
        return Kind("a JSON file", "Name the file of weights, or the folder that holds both.")
    return Kind(f"text that begins with {text[:20]!r}", f"Name the checkpoint. {_DOWNLOAD}")


def _kind_of_graph(start: bytes) -> Kind | None:
    """Tell ONNX: a version as field 1, then the name of the program that wrote it as field 2."""
    length = start[3] if len(start) > 3 else 0
    name = start[4 : 4 + length]
    is_graph = start[:1] == b"\x08" and start[2:3] == b"\x12" and 0 < len(name) == length < 64
    return _ONNX if is_graph and name.isascii() and name.decode().isprintable() else None
