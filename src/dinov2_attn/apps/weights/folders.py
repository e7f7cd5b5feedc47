"""Which files a checkpoint is in: a file, a folder of Hugging Face's, parts and their index."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from dinov2_attn.apps.weights.kinds import CHECKPOINT, distributed
from dinov2_attn.errors import UnreadableFileError

# What save_pretrained and timm's save_for_hf write, the safer first.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_INDEX = ".index.json"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.\w+$)")


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files that hold the weights of ``path``.

    It is a file, a folder as ``save_pretrained`` writes it, the index of parts, or a name on
    Hugging Face's hub that was downloaded. Raises ``UnreadableFileError`` if it is none of them.
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
    found = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
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
    """Return whether ``value`` names a file in a folder, and none outside of it."""
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; ``None`` if it is none, or too large for a description."""
    try:
        if path.is_file() and path.stat().st_size < 2**26:
            return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        pass
    return None


def _downloaded(name: str) -> Path:
    """Return the folder in which Hugging Face's cache has ``name``; download nothing."""
    if importlib.util.find_spec("huggingface_hub") is not None:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):  # not in the cache, or no name of a repository
            pass
    raise UnreadableFileError(
        CHECKPOINT,
        f"{name}, which is no path; as a name on Hugging Face's hub, it is not downloaded",
        f"Run `pip install huggingface_hub` and `hf download {name}`, then this again.",
    )


def some(names: list[str], shown: int = 5) -> str:
    """Join the first of ``names`` by commas."""
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
