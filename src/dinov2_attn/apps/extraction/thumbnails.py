"""The small pictures of a contact sheet: maps with their artifact tokens, and photographs."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from dinov2_attn.apps.extraction.decode import decode_frame
from dinov2_attn.apps.extraction.items import Item
from dinov2_attn.apps.viz.decoding import decode, shown
from dinov2_attn.apps.viz.images import fit
from dinov2_attn.apps.viz.limits import scale
from dinov2_attn.apps.viz.reading import Reading
from dinov2_attn.apps.viz.style import Style
from dinov2_attn.errors import is_failure

# The longer side of a photograph in pixels, twice what the page shows.
SIDE = 320


@dataclass(frozen=True, eq=False)
class MapPicture:
    """A map ``(h, w)`` in colours, in multiples of uniform attention.

    ``highest`` is the number of the last colour, and ``marks`` are the places of artifact tokens.
    """

    values: npt.NDArray[np.float32]
    pixels: npt.NDArray[np.uint8]
    highest: float
    marks: list[tuple[int, int]]

    def html(self, name: str) -> str:
        """Return the picture as HTML, with a sentence for readers who do not see it."""
        height, width = self.values.shape
        return (
            f'<div class="map"><img src="{_png(self.pixels)}" width="{width}" height="{height}" '
            f'alt="{escape(self._sentence(name))}">{self._marked(height, width)}</div>'
        )

    def _sentence(self, name: str) -> str:
        if not np.isfinite(self.values).any():
            return f"Map of {name}, without finite numbers"
        place = int(np.nanargmax(self.values))
        row, column = divmod(place, self.values.shape[1])
        number = f"{self.values.flat[place]:.3g}"
        return f"Map of {name}: highest in row {row}, column {column}, {number} times uniform"

    def _marked(self, height: int, width: int) -> str:
        if not self.marks:
            return ""
        cells = [
            f'<rect class="{kind}" x="{column}" y="{row}" width="1" height="1"/>'
            for row, column in self.marks
            for kind in ("below", "above")
        ]
        return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(cells)}</svg>'


def map_picture(row: dict[str, Tensor], place: int, entry: dict[str, Any]) -> MapPicture:
    """Return the picture of the first query in one layer, averaged over heads.

    Args:
        row: The tensors of one image, as ``dataset[i]`` returns them.
        place: The place of the layer.
        entry: The line of the index.

    """
    layer = row["maps"][place].float()
    first = (layer.mean(0) if layer.ndim == 4 else layer)[0]
    patches = entry["grid"][0] * entry["grid"][1]
    tokens = patches + row["prefix"].shape[-1]
    # A cell of a resampled map has the weights of several patches, or of a part of one.
    values = (first * (tokens * first.numel() / patches)).numpy()
    marks = _marks(entry, (values.shape[0], values.shape[1]))
    mask = np.zeros(values.shape, dtype=np.bool_)
    mask[tuple(np.array(marks, dtype=np.int64).reshape(-1, 2).T)] = True
    norm = scale(values, Style(), mask)
    colours = matplotlib.colormaps["viridis"](norm(values), bytes=True)[..., :3]
    return MapPicture(values, colours, float(norm.vmax or 1), marks)


def _marks(entry: dict[str, Any], grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the artifact tokens, unless the maps were resampled to another grid."""
    if entry["artifacts"] is None or list(grid) != entry["grid"]:
        return []
    return [(token["row"], token["col"]) for token in entry["artifacts"]["tokens"]]


@dataclass
class Photographs:
    """The images of an extraction, found again in a folder.

    Attributes:
        about: ``extraction.json``.
        folder: Where they are, or ``None`` to show none.
        absent: How many were not found there, and how many were other files.

    """

    about: dict[str, Any]
    folder: Path | None
    absent: dict[str, int] = field(default_factory=dict)

    def html(self, entry: dict[str, Any]) -> str:
        """Return the photograph as the model saw it, as HTML."""
        if self.folder is None:
            return ""
        try:
            pixels = self._pixels(entry)
        except _AbsentError as absent:
            return self._missing(str(absent))
        except BaseException as error:  # the reader of images may raise any exception
            if not is_failure(error):
                raise
            return self._missing("unreadable")
        small = Image.fromarray(shown(pixels))
        small.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=80)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        return f'<img src="{url}" width="{small.width}" height="{small.height}" alt="The image">'

    def sentences(self) -> list[str]:
        """Return what is to be said of photographs that are not shown."""
        return [f"Photographs {why}: {count:,}." for why, count in self.absent.items()]

    def _missing(self, why: str) -> str:
        self.absent[why] = self.absent.get(why, 0) + 1
        return f'<div class="missing">{why}</div>'

    def _pixels(self, entry: dict[str, Any]) -> npt.NDArray[np.uint8]:
        frame = entry.get("frame")
        name = entry["path"] if frame is None else entry["path"].removesuffix(f"#{frame}")
        path = Path(self.folder or "", name)
        if not path.is_file():
            raise _AbsentError("not found")
        options = self.about["options"]
        size, reading = options["image_size"], _reading(options["reading"])
        item = Item(entry["source"], entry["path"], str(path), frame=frame)
        if frame is None:
            content = item.read()
            decoded, digest = decode(path, reading, None, content), _digest(content)
        else:
            decoded, digest = decode_frame(item, reading, None)
        if digest != entry["sha256"]:
            raise _AbsentError("changed since")
        patch: Any = tuple(self.about["model"]["patch_size"])
        return fit(decoded.pixels, patch, tuple(size) if isinstance(size, list) else size, path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _AbsentError(Exception):
    """There is no such photograph."""


def _reading(stored: dict[str, Any]) -> Reading:
    values = stored["range"]
    return Reading(
        stored["channels"],
        tuple(values) if isinstance(values, list) else values,
        tuple(stored["mean"]),
        tuple(stored["std"]),
    )


def _png(pixels: npt.NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
