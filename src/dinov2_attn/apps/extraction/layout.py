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

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_attn.errors import UnreadableFileError

ABOUT, INDEX, UNREADABLE, SHARDS = "extraction.json", "index.jsonl", "unreadable.jsonl", "shards"
README, LOCK = "README.md", ".lock"

# The layout that this version writes and reads. Format 1 had no metadata.
FORMAT = 2


def read_about(folder: Path) -> dict[str, Any]:
    """Return ``extraction.json`` of ``folder``; raise ``UnreadableFileError`` if it has none."""
    try:
        about = json.loads(read_text(folder / ABOUT))
        if isinstance(about, dict) and "format" in about:
            return about
        reason = "no JSON object with a format"
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UnreadableFileError(
        f"an extraction at {folder}",
        f"{ABOUT} that cannot be read ({reason})",
        "Name the folder that `dinov2-attn extract -o` was given.",
    )


def read_text(path: Path) -> str:
    """Return the text of a file; raise ``OSError`` if there is none. A pipe might never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "There is something that is not a file", str(path))
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
