"""The layout of the folder of an extraction, for writing and for reading.

::

    OUT/extraction.json            everything that decides the bytes of the other files
    OUT/README.md                  the same for readers: files, axes, preprocessing
    OUT/index.parquet              the same as a table, if it was asked for
    OUT/shards/00000.zarr.zip      the same tensors as zarr arrays, if they were asked for
    OUT/shards/00000.safetensors   tensors "N.maps" and "N.prefix" for image number N, "N.key",
                                   "N.entropy" and so on if facets or statistics were asked for,
                                   and as metadata axes, preprocessing and the sha256 of its index
    OUT/shards/00000.jsonl         a line for each of its images; exists when the shard is done
    OUT/index.jsonl                all lines with maps; exists when every shard is done
    OUT/unreadable.jsonl           all lines with the stage (decode, pass) that failed, and why
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_attn._files import check_is_file
from dinov2_attn.errors import UnreadableFileError

ABOUT, INDEX, UNREADABLE, SHARDS = "extraction.json", "index.jsonl", "unreadable.jsonl", "shards"
README, LOCK = "README.md", ".lock"

# The layout that this version writes and reads. Format 1 had no metadata.
FORMAT = 2

# What a line of the index has, and which of it are texts.
TEXTS = frozenset({"source", "path", "shard", "sha256", "checksum"})
LINE = TEXTS | {"number", "size", "grid", "prefix_mass", "entropy", "artifacts"}


def read_about(folder: Path) -> dict[str, Any]:
    """Return ``extraction.json`` of ``folder``; raise ``UnreadableFileError`` if it has none."""
    try:
        about = json.loads(read_text(folder / ABOUT))
        if isinstance(about, dict) and "format" in about:
            return about
        reason = "no JSON object with a format"
    except (OSError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise _no_extraction(folder, reason)


def _no_extraction(folder: Path, reason: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"an extraction at {folder}",
        f"{ABOUT} that cannot be read ({reason})",
        "Name the folder that `dinov2-attn extract -o` was given.",
    )


def check_about(folder: Path, about: dict[str, Any]) -> None:
    """Raise ``UnreadableFileError`` unless ``about`` says what readers need to know."""
    tensors, model = about.get("tensors"), about.get("model")
    if not (
        isinstance(tensors, dict)
        and _are(tensors.get("layers"), int)
        and _are(tensors.get("queries"), str)
    ):
        raise _no_extraction(folder, "no layers and queries of tensors")
    if not (isinstance(model, dict) and type(model.get("prefix")) is int):
        raise _no_extraction(folder, "no prefix of a model")


def fault_of(entry: dict[str, Any], layers: int) -> str | None:
    """Return what is wrong with the line of an image, ``None`` if nothing is."""
    if not (isinstance(entry, dict) and entry.keys() >= LINE):
        return "no line of an image"
    artifacts, numbers = entry["artifacts"], (int, float, type(None))
    of_layers = {name: entry[name] for name in ("prefix_mass", "entropy")}
    right = {
        "number": type(entry["number"]) is int,
        **{name: isinstance(entry[name], str) for name in TEXTS},
        **{name: _are(entry[name], int) and len(entry[name]) == 2 for name in ("size", "grid")},
        **{name: _are(one, *numbers) and len(one) >= layers for name, one in of_layers.items()},
        **{name: _are(entry.get(name, []), str) for name in ("facets", "statistics")},
        "frame": type(entry.get("frame", 0)) is int,
        "time": type(entry.get("time", 0.0)) in (int, float),
        "artifacts": artifacts is None
        or (isinstance(artifacts, dict) and isinstance(artifacts.get("tokens"), list)),
    }
    return next((f"another kind of {name}" for name, fits in right.items() if not fits), None)


def _are(found: object, *kinds: type) -> bool:
    """Return whether ``found`` is a list of values of these ``kinds``."""
    return isinstance(found, list) and all(type(one) in kinds for one in found)


def read_text(path: Path) -> str:
    """Return the text of a file; raise ``OSError`` if there is none. A pipe might never end."""
    check_is_file(path)
    return path.read_text()


def check_format(folder: Path, about: dict[str, Any]) -> None:
    """Raise ``UnreadableFileError`` if ``folder`` has another format than this version writes."""
    found = about["format"]
    # True equals 1, and 2.0 equals 2: neither was written here.
    if type(found) is int and found == FORMAT:
        return
    raise UnreadableFileError(
        f"an extraction of format {FORMAT} at {folder}",
        f"format {_shortened(found)}",
        "Read it with the version of dinov2-attn that wrote it, or extract again into another "
        "folder.",
    )


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def kinds(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return what is stored of an image: maps, prefix, and the facets and statistics asked for."""
    return ("maps", "prefix", *entry.get("facets", ()), *entry.get("statistics", ()))


def names(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the tensors of an image."""
    return tuple(f"{entry['number']}.{kind}" for kind in kinds(entry))


def checksum(*tensors: Tensor) -> str:
    """Return the sha256 of the bytes of all tensors of an image, in this order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
