"""``AttentionDataset``: read the maps that ``extract`` stored, one image at a time."""

from __future__ import annotations

import copy
import difflib
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from operator import index
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from torch import Tensor
from torch.utils.data import Dataset

from dinov2_attn._files import check_is_file
from dinov2_attn.apps.extraction import layout
from dinov2_attn.apps.extraction.collate import collate
from dinov2_attn.apps.extraction.frame import frame_of
from dinov2_attn.apps.extraction.storages import opened
from dinov2_attn.errors import (
    InvalidInputError,
    OutOfRangeError,
    UnavailableError,
    UnreadableFileError,
)
from dinov2_attn.maps import _facts

if TYPE_CHECKING:
    import pandas

    from dinov2_attn.apps.extraction.contact_sheet import ContactSheet, SortKey
    from dinov2_attn.apps.extraction.heatmaps import Images
    from dinov2_attn.maps.attention_maps import AttentionMaps
    from dinov2_attn.maps.places import Head
    from dinov2_attn.math.token_names import Token

# An image by its number in the dataset, or by its path.
Key = SupportsIndex | str | PathLike[str]

# How many shards stay open. Only their headers are in memory.
MOST_OPEN = 16


class AttentionDataset(Dataset[dict[str, Any]]):
    """The attention maps in a folder that ``extract`` wrote, as a map-style dataset.

    >>> maps = AttentionDataset("out")
    >>> maps[0]["maps"]   # (layers, heads, queries, h, w), without heads for their mean
    >>> maps[0]["prefix"] # (layers, heads, queries, 1 + R): CLS and registers
    >>> maps[0]["key"]    # (layers, C, h, w), if extract was asked for facets="key"
    >>> maps[0]["distance"]  # (layers, heads, N), if it was asked for statistics="distance"
    >>> maps[0]["path"]   # of the image
    >>> maps.entry(0)     # the whole line of the index
    >>> maps["b/001.png"] # by its path
    >>> maps[10:20]       # a dataset of ten images
    >>> maps.frame()      # the index as a table of pandas
    >>> maps.maps(0)      # AttentionMaps, for pictures

    Images without maps are not in it; ``unreadable()`` lists them. Shards are opened when they
    are first needed, in each worker of a ``DataLoader``. With a ``grid`` all maps have one shape,
    and torch's own collation makes batches of them. Otherwise ``collate`` does, by padding.

    Args:
        folder: The folder that was ``out`` of ``extract``.
        verify: Whether to check the sha256 of every map that is read.

    Attributes:
        folder: The folder of the extraction.
        about: The model, the options and the source of the extraction.

    Raises:
        UnreadableFileError: If there is no finished extraction, one of another format or, at an
            item with ``verify``, if a map differs from what was stored.
        UnavailableError: At an item, if the library of its format is missing.

    """

    collate = staticmethod(collate)

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self._verify = verify
        self.about = layout.read_about(self.folder)
        layout.check_format(self.folder, self.about)
        layout.check_about(self.folder, self.about)
        self._starts = _line_starts(self.folder)
        self._open: dict[str, Any] = {}
        self._process = os.getpid()
        self._places: dict[str, list[int]] | None = None

    def __repr__(self) -> str:
        tensors = self.about["tensors"]
        layers, queries = (
            _facts.layers(tensors["layers"]),
            _facts.listed([*map(str, tensors["queries"])]),
        )
        return (
            f"AttentionDataset({str(self.folder)!r}, images={len(self)}, layers={layers}, "
            f"queries=[{queries}])"
        )

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, i: Key) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> AttentionDataset: ...

    def __getitem__(self, i: Key | slice) -> Row | AttentionDataset:
        """Return all that is stored of one image, by name, or the dataset of a slice.

        Args:
            i: A position, negative ones counted from the end; a path of the index; or a slice.

        Raises:
            OutOfRangeError: If there is no such position.
            InvalidInputError: If no image or several have the path.

        """
        return self._part(i) if isinstance(i, slice) else self._row(self.entry(i))

    def _part(self, i: slice) -> AttentionDataset:
        part = copy.copy(self)
        part._starts, part._open, part._places = self._starts[i], {}, None
        return part

    def _row(self, entry: dict[str, Any]) -> Row:
        name = entry["shard"]
        try:
            file = self._shard(name)
            found = [file.get_tensor(tensor) for tensor in layout.names(entry)]
        except UnavailableError:  # the shard is whole, and its library is missing
            raise
        except Exception as error:  # the reader may raise any exception for foreign bytes
            raise self._wrong(f"{name} ({type(error).__name__}: {error})") from error
        if self._verify and layout.checksum(*found) != entry["checksum"]:
            raise self._wrong(f"other bytes for image {entry['number']} in {name}")
        tensors = dict(zip(layout.kinds(entry), found, strict=True))
        return Row(**tensors, path=entry["path"], number=entry["number"])

    def maps(self, i: Key) -> AttentionMaps[Tensor]:
        """Return one image as ``AttentionMaps``, a batch of one: for pictures, or to save it.

        With a ``grid``, queries that are patches are the cells that contain their centres.
        """
        from dinov2_attn.apps.extraction.restored import restored

        entry = self.entry(i)
        return restored(self._row(entry), entry, self.about)

    def frame(self) -> pandas.DataFrame:
        """Return the index as a table: a row for each image, at its position in the dataset.

        ``prefix_mass_5`` and ``entropy_5`` are those of layer 5, ``height`` and ``width`` those of
        the image in pixels, ``rows`` and ``columns`` those of its patches. ``artifacts`` is the
        number of artifact tokens, missing if they were not looked for. ``frame`` and ``time``, in
        seconds, are those of a frame of a video, and missing for other images. Bytes of a path that
        are not UTF-8 are escaped: ``dataset[i]["path"]`` has them.

        Raises:
            UnavailableError: If pandas is missing.

        """
        return frame_of(self.entries(), self.about["tensors"]["layers"])

    def fiftyone(
        self,
        images: Images,
        samples: Iterable[Any] | None = None,
        *,
        field: str = "attention",
        layer: int | None = None,
        head: Head = "mean",
        query: Token | None = None,
        folder: str | Path | None = None,
    ) -> list[Any]:
        """Return samples of FiftyOne with the maps as heatmaps.

        >>> dataset = fo.Dataset("photos")
        >>> dataset.add_samples(AttentionDataset("out").fiftyone("photos"))
        >>> AttentionDataset("out").fiftyone("photos", dataset)  # of samples that are there

        A heatmap has the attention weights of the patches, and ends at the highest of them.
        FiftyOne draws it over the whole image, so that it is up to a patch too wide where the
        extraction cropped. Frames of videos are left out.

        Args:
            images: The folder of the images, or a folder for each source by its name.
            samples: A dataset, a view or samples of FiftyOne, which get the heatmaps by their
                files. By default new samples are made.
            field: The name of the field.
            layer: One of the layers that are stored, by default the last.
            head: The number of a head, or ``"mean"``.
            query: ``"cls"``, ``"register:2"``, a patch or a position; by default the only one.
            folder: Where to write maps as PNG files. By default they are part of the samples.

        Raises:
            UnavailableError: If fiftyone is missing.
            InvalidInputError: If an image is not there, or several queries are stored.

        """
        from dinov2_attn.apps.extraction.heatmaps import samples_of

        return samples_of(self, images, samples, field, layer, head, query, folder)

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield the line of the index of each image."""
        with (self.folder / layout.INDEX).open("rb") as file:
            at = 0
            for position, start in enumerate(self._starts):
                if start != at:  # a seek would empty the buffer
                    file.seek(start)
                line = file.readline()
                at = start + len(line)
                yield self._parsed(line, position)

    def sheet(
        self,
        by: SortKey = "prefix_mass",
        *,
        layer: int | None = None,
        count: int = 100,
        lowest: bool = False,
        images: str | Path | None = None,
    ) -> ContactSheet:
        """Return a page with the maps of the images that come first in an order.

        It shows the first query that is stored, and the mean of heads.

        Args:
            by: ``"prefix_mass"``; ``"entropy"``, as a share of its maximum; or ``"artifacts"``,
                the number of artifact tokens.
            layer: One of the layers that are stored, by default the last.
            count: How many images to show at most.
            lowest: Whether the lowest come first.
            images: The folder of the images, to show them too. A file that is not the one of the
                extraction is not shown.

        Raises:
            InvalidInputError: If ``by`` or ``count`` is wrong, or artifacts were not looked for.
            OutOfRangeError: If the layer is not stored.

        """
        from dinov2_attn.apps.extraction.contact_sheet import contact_sheet

        return contact_sheet(self, by, layer, count, lowest, images)

    def positions(self, path: str | PathLike[str], source: str | None = None) -> list[int]:
        """Return the positions of all images with this path, or of those in one source."""
        if self._places is None:
            self._places = {}
            for position, entry in enumerate(self.entries()):
                self._places.setdefault(entry["path"], []).append(position)
        name = path if isinstance(path, str) else Path(path).as_posix()
        found = self._places.get(name, [])
        return [at for at in found if source in (None, self.entry(at)["source"])]

    def _position_of(self, path: str | PathLike[str]) -> int:
        found = self.positions(path)
        if len(found) == 1:
            return found[0]
        expected = "the path of one image in the index"
        if found:
            raise InvalidInputError(
                expected,
                f"{_shown(path)} at {len(found)} positions",
                "Choose one: dataset.positions(path, source) lists them.",
            )
        near = difflib.get_close_matches(str(path), self._places or {}, 1)
        raise InvalidInputError(
            expected,
            _shown(path) + (f"; {_shown(near[0])} is there" if near else ""),
            "dataset.entries() has all paths, and dataset.unreadable() those without maps.",
        )

    def entry(self, i: Key) -> dict[str, Any]:
        """Return the line of the index at a position or of a path, as ``dataset[i]`` takes it."""
        position = self._position_of(i) if isinstance(i, str | PathLike) else index(i)
        if not -len(self) <= position < len(self):
            raise OutOfRangeError(
                f"an image from 0 to {len(self) - 1}", str(i), "len() counts them."
            )
        with (self.folder / layout.INDEX).open("rb") as file:
            file.seek(self._starts[position])
            return self._parsed(file.readline(), position)

    def _parsed(self, line: bytes, position: int) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = json.loads(line)
            reason = layout.fault_of(entry, len(self.about["tensors"]["layers"]))
            if reason is None:
                return entry
        except (ValueError, RecursionError) as error:  # no JSON
            reason = f"{type(error).__name__}: {error}"
        raise self._wrong(f"{layout.INDEX} that cannot be read at image {position} ({reason})")

    def unreadable(self) -> list[dict[str, Any]]:
        """Return number, source, path, stage and reason of each image without maps."""
        try:
            lines = layout.read_text(self.folder / layout.UNREADABLE).splitlines()
            return [dict(json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError, RecursionError) as error:
            reason = f"{layout.UNREADABLE} that cannot be read ({type(error).__name__}: {error})"
            raise self._wrong(reason) from error

    def __getstate__(self) -> dict[str, Any]:
        # Open files belong to this process, and paths are read again where they are needed.
        return {**self.__dict__, "_open": {}, "_places": None}

    def _shard(self, name: str) -> Any:
        if self._process != os.getpid():  # a fork shares the offset of an open file with its parent
            self._open, self._process = {}, os.getpid()
        if name not in self._open:
            while len(self._open) >= MOST_OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[name] = opened(self.folder / name)
        return self._open[name]

    def _wrong(self, found: str) -> UnreadableFileError:
        return UnreadableFileError(
            f"the shards at {self.folder} as they were written",
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
        check_is_file(folder / layout.INDEX)
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


def _shown(path: object) -> str:
    """Return a path as a Python literal, in ASCII and at most 200 letters long."""
    text = ascii(str(path))
    return text if len(text) <= 200 else f"{text[:200]}…"
