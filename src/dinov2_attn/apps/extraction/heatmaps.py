"""The maps of an extraction as heatmaps of FiftyOne."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dinov2_attn.errors import InvalidInputError, UnavailableError

if TYPE_CHECKING:
    from dinov2_attn.apps.extraction.read import AttentionDataset
    from dinov2_attn.maps.places import Head
    from dinov2_attn.math.token_names import Token

# The folder of the images, or one for each source.
Images = str | Path | Mapping[str, str | Path]


def samples_of(
    dataset: AttentionDataset,
    images: Images,
    samples: Iterable[Any] | None,
    field: str,
    layer: int | None,
    head: Head,
    query: Token | None,
    folder: str | Path | None,
) -> list[Any]:
    """Return samples of FiftyOne whose ``field`` is a heatmap: see ``AttentionDataset.fiftyone``.

    Raises:
        UnavailableError: If fiftyone is missing.
        InvalidInputError: If an image is not there.

    """
    fo = _library()
    given = None if samples is None else {_real(one.filepath): one for one in samples}
    found = []
    for position, path in _files(dataset, images):
        sample = fo.Sample(filepath=str(path)) if given is None else given.get(_real(path))
        if sample is None:  # a view may have some of the images only
            continue
        values, ends = heatmap_of(dataset, position, layer, head, query)
        sample[field] = fo.Heatmap(map=values, range=ends)
        if folder is not None:
            # A folder may hold several fields.
            name = f"{field}-{dataset.entry(position)['number']:08d}.png"
            sample[field].export_map(str(Path(folder).resolve() / name), update=True)
        if given is not None and sample.in_dataset:
            sample.save()
        found.append(sample)
    return found


def heatmap_of(
    dataset: AttentionDataset, i: int, layer: int | None, head: Head, query: Token | None
) -> tuple[npt.NDArray[np.float32], list[float]]:
    """Return the map ``(h, w)`` of one image, and the range of its numbers from zero on."""
    stored = dataset.about["tensors"]["queries"]
    if query is None and (len(stored) > 1 or stored[0] in ("all", "patches", "registers")):
        raise InvalidInputError(
            "one of the queries that are stored",
            ", ".join(map(str, stored)),
            'Say which: query="cls" or query=(3, 17).',
        )
    token = stored[0] if query is None else query
    maps = dataset.maps(i)
    values: npt.NDArray[np.float32] = maps.at(layer, head, token).float().numpy()
    return values, [0.0, float(values.max()) or 1.0]


def _files(dataset: AttentionDataset, images: Images) -> Iterator[tuple[int, Path]]:
    """Yield the position and the file of each image. Frames of videos have no file."""
    for position, entry in enumerate(dataset.entries()):
        if "frame" in entry:
            continue
        root = images.get(entry["source"]) if isinstance(images, Mapping) else images
        path = Path(os.path.abspath(Path(root or "") / entry["path"]))
        if root is None or not path.is_file():
            raise InvalidInputError(
                f"images as the folder of the source {entry['source']!r}",
                f"no file {path}",
                "Name the folder that the paths of the index are below.",
            )
        yield position, path


def _real(path: str | Path) -> str:
    return os.path.realpath(path)


def _library() -> Any:
    try:
        import fiftyone
    except ImportError as error:
        raise UnavailableError(
            "the library fiftyone",
            str(error),
            "Install it with `pip install 'dinov2-attn[fiftyone]'`.",
        ) from error
    return fiftyone
