"""The files of a checkpoint: which ones a path stands for, and which are no checkpoint at all."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from dinov2_attn.errors import UnreadableFileError

CHECKPOINT = "a checkpoint by torch.save or by safetensors"
SAVE_AGAIN = "Where the model was made, save its weights: torch.save(model.state_dict(), PATH)."

# Written by save_pretrained and by timm's save_for_hf; the safer format first.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_INDEX = ".index.json"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.\w+$)")


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files that hold the weights of ``path``.

    Args:
        path: A file, a folder by ``save_pretrained``, the index of a checkpoint in parts, or the
            name of a downloaded model on Hugging Face's hub.

    Raises:
        UnreadableFileError: If ``path`` is none of these.

    """
    if path.is_dir():
        return _in_folder(path)
    if not path.exists() and _HUB_NAME.fullmatch(str(path)) and path.suffix not in _SUFFIXES:
        return _in_folder(_downloaded(str(path)))
    if not path.is_file():
        raise UnreadableFileError(
            f"a checkpoint at {path}", "nothing", "Name the .pth file itself."
        )
    if path.name.endswith(_INDEX):
        return _parts(path)
    if _PART.search(path.name):
        raise UnreadableFileError(
            "a whole checkpoint",
            f"{path}, one of its parts",
            f"Name the folder, with all parts and their index: {path.parent}",
        )
    return (path,)


def _in_folder(folder: Path) -> tuple[Path, ...]:
    if (folder / ".metadata").is_file():
        raise distributed(folder)
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return (folder / name,)
        if (folder / f"{name}{_INDEX}").is_file():
            return _parts(folder / f"{name}{_INDEX}")
    files = (file for file in folder.iterdir() if file.suffix in _SUFFIXES)
    found = sorted(file.name for file in files if file.is_file())
    if len(found) == 1 and not _PART.search(found[0]):
        return (folder / found[0],)
    raise UnreadableFileError(
        f"a checkpoint at {folder}",
        f"a directory with {some(found) if found else 'no file of weights'}",
        "Name the .pth file itself, or a folder with one file of weights.",
    )


def _parts(index: Path) -> tuple[Path, ...]:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not (isinstance(names, dict) and names and all(map(_is_name, names.values()))):
        raise UnreadableFileError(
            "an index of a checkpoint's parts, with the file of each weight",
            f"{index}, which names no files",
            "Download it again, or name the file of weights itself.",
        )
    files = [index.parent / name for name in dict.fromkeys(names.values())]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UnreadableFileError(
            f"all {len(files)} parts of a checkpoint beside {index}",
            f"no {some(missing)}",
            "Download the parts into the folder of their index.",
        )
    return tuple(files)


def _is_name(value: object) -> bool:
    """Return whether ``value`` is a plain file name, without a path to another folder."""
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def read_json(path: Path) -> object:
    """Return the content of a JSON file; ``None`` if it is not JSON or larger than 64 MiB."""
    try:
        if path.is_file() and path.stat().st_size < 2**26:
            return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        pass
    return None


def _downloaded(name: str) -> Path:
    """Return the folder of ``name`` in Hugging Face's cache, without downloading it."""
    if importlib.util.find_spec("huggingface_hub") is not None:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):  # not in the cache, or not the name of a repository
            pass
    raise UnreadableFileError(
        CHECKPOINT,
        f"{name}, which is neither a path nor a downloaded model of Hugging Face's hub",
        f"Run `pip install huggingface_hub` and `hf download {name}`, then this again.",
    )


def some(names: list[str], shown: int = 5) -> str:
    """Return the first ``shown`` of ``names``, joined by commas."""
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")


# Files of other kinds

_DOWNLOAD = "Download it again."
_OTHER_FORMAT = f"Take the .pth or .safetensors file of the model. {SAVE_AGAIN}"


class Kind(NamedTuple):
    """A kind of file that is not a checkpoint, and what to do instead."""

    what: str
    next_step: str


_HTML = Kind(
    "a web page",
    "Download the file itself: the address leads to a page, for example a login page.",
)
_LFS = Kind(
    "a pointer of Git LFS in place of the file",
    "Run `git lfs pull` in its repository.",
)
_IMAGE = Kind("an image", "Name the checkpoint. Images are given before the options.")
_PACKED = Kind("a compressed file", "Unpack it and name the file inside.")
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

# Formats that cannot be recognised by their first bytes.
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
_TAR = Kind("a tar archive, which PyTorch would unpack", "Unpack it and name the file inside.")
_CUT_SHORT = Kind("a file by torch.save that was cut short or damaged", f"{_DOWNLOAD} {SAVE_AGAIN}")


def distributed(folder: Path) -> UnreadableFileError:
    """Return the error for PyTorch's distributed format, with the command that converts it."""
    return UnreadableFileError(
        CHECKPOINT,
        f"{folder}, a checkpoint in PyTorch's distributed format, in a folder of parts",
        "If you trust it (its .metadata is a pickle, which can run code), convert it: "
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        f"{shlex.quote(str(folder))} NEW.pth",
    )


def refuse_others(path: Path) -> None:
    """Raise ``UnreadableFileError`` if ``path`` is of a kind that is not a checkpoint."""
    if path.suffix == ".distcp" or path.name == ".metadata":
        raise distributed(path.parent)
    kind = kind_of(path)
    if kind is not None:
        raise UnreadableFileError(CHECKPOINT, f"{path}, {kind.what}", kind.next_step)


def kind_of(path: Path) -> Kind | None:
    """Return the kind of ``path``; ``None`` if it may be a file by PyTorch."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return Kind("an empty file", f"{_DOWNLOAD} {SAVE_AGAIN}")
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    known = next((kind for first, kind in _BY_START.items() if start.startswith(first)), None)
    if known is None and start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        known = _IMAGE
    if known is None and _is_tar(path):
        known = _TAR
    return known or _kind_of_text(start) or _BY_SUFFIX.get(path.suffix) or _kind_of_graph(start)


def _is_tar(path: Path) -> bool:
    # Not is_tarfile: it tries decompressors, and LZMA's takes gigabytes for some eight bytes.
    try:
        with tarfile.open(path, "r:"):
            return True
    except (tarfile.TarError, EOFError, ValueError, OverflowError):
        return False


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
    """Return the kind of a text file; ``None`` for binary files, as PyTorch's are."""
    try:
        # The last character may be incomplete.
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
    """Recognise ONNX: field 1 is a version, field 2 the name of the program that wrote it."""
    length = start[3] if len(start) > 3 else 0
    name = start[4 : 4 + length]
    is_graph = start[:1] == b"\x08" and start[2:3] == b"\x12" and 0 < len(name) == length < 64
    return _ONNX if is_graph and name.isascii() and name.decode().isprintable() else None
