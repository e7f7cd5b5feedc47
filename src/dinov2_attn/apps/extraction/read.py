"""``AttentionDataset``: read the maps that ``extract`` stored, one image at a time."""

from __future__ import annotations

import json
from array import array
from operator import index
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from dinov2_attn import _imports
from dinov2_attn.apps.extraction import layout
from dinov2_attn.errors import OutOfRangeError, UnreadableFileError

# How many shards stay open. Only their headers are in memory.
MOST_OPEN = 16


class AttentionDataset(Dataset[dict[str, Any]]):
    """The attention maps in a folder that ``extract`` wrote, as a map-style dataset.

    >>> maps = AttentionDataset("out")
    >>> maps[0]["maps"]   # (layers, heads, queries, h, w), without heads for their mean
    >>> maps[0]["prefix"] # (layers, heads, queries, 1 + R): CLS and registers
    >>> maps[0]["path"]   # of the image
    >>> maps.entry(0)     # the whole line of the index

    Images without maps are not in it; ``unreadable()`` lists them. Shards are opened when they
    are first needed, in each worker of a ``DataLoader``. With a ``grid`` all maps have one shape,
    and torch's own collation makes batches of them.

    Args:
        folder: The folder that was ``out`` of ``extract``.
        verify: Whether to check the sha256 of every map that is read.

    Attributes:
        about: The model, the options and the source of the extraction.

    Raises:
        UnreadableFileError: If there is no finished extraction or, at an item with ``verify``, if
            a map differs from what was stored.

    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self._folder = Path(folder)
        self._verify = verify
        self.about = layout.read_about(self._folder)
        self._starts = _line_starts(self._folder)
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Row:
        """Return maps, prefix, path and number of the image at ``i``."""
        entry = self.entry(i)
        name = entry["shard"]
        try:
            file = self._shard(name)
            maps, prefix = (file.get_tensor(tensor) for tensor in layout.names(entry))
        except Exception as error:  # the reader may raise any exception for foreign bytes
            raise self._wrong(f"{name} ({type(error).__name__}: {error})") from error
        if self._verify and layout.checksum(maps, prefix) != entry["checksum"]:
            raise self._wrong(f"other bytes for image {entry['number']} in {name}")
        return Row(maps=maps, prefix=prefix, path=entry["path"], number=entry["number"])

    def entry(self, i: int) -> dict[str, Any]:
        """Return the line of the index at ``i``; negative numbers count from the end."""
        position = index(i)
        if not -len(self) <= position < len(self):
            raise OutOfRangeError(
                f"an image from 0 to {len(self) - 1}", str(i), "len() counts them."
            )
        with (self._folder / layout.INDEX).open("rb") as file:
            file.seek(self._starts[position])
            line = file.readline()
        try:
            entry: dict[str, Any] = json.loads(line)
            if {"number", "path", "shard", "checksum"} <= entry.keys():
                return entry
            reason = "no line of an image"
        except (ValueError, AttributeError) as error:  # no JSON, or no object
            reason = f"{type(error).__name__}: {error}"
        raise self._wrong(f"{layout.INDEX} that cannot be read at image {position} ({reason})")

    def unreadable(self) -> list[dict[str, Any]]:
        """Return number, source, path, stage and reason of each image without maps."""
        lines = (self._folder / layout.UNREADABLE).read_text().splitlines()
        return [json.loads(line) for line in lines]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files belong to this process

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            while len(self._open) >= MOST_OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[name] = _imports.safetensors().safe_open(self._folder / name, "pt")
        return self._open[name]

    def _wrong(self, found: str) -> UnreadableFileError:
        return UnreadableFileError(
            f"the shards at {self._folder} as they were written",
            found,
            "Remove the shard, its .jsonl and index.jsonl, and run the extraction again.",
        )


class Row(dict[str, Any]):
    """One image of an extraction, or a batch, by name.

    Rows compare by identity, since tensors do not compare to a single truth value.
    """

    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__  # type: ignore[assignment]  # a dict has none


def _line_starts(folder: Path) -> array[int]:
    """Return the offset of each line of the index, 8 bytes for an image."""
    starts, position = array("Q"), 0
    try:
        with (folder / layout.INDEX).open("rb") as file:
            for line in file:
                starts.append(position)
                position += len(line)
    except OSError as error:
        raise UnreadableFileError(
            f"a finished extraction at {folder}",
            f"no {layout.INDEX} that can be read ({type(error).__name__})",
            "Run the same `dinov2-attn extract` again: it continues where it was stopped.",
        ) from error
    return starts
