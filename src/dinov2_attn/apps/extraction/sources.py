"""What ``extract`` is given: files, or a dataset; each lists its items and decodes them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, Protocol

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from dinov2_attn.apps.extraction.decode import Decoder, Measurer, OfItems, Picture, Size
from dinov2_attn.apps.extraction.given import (
    ByDecoding,
    FileReader,
    GivenDecoder,
    Wanted,
    check_first,
)
from dinov2_attn.apps.extraction.items import Item, list_items
from dinov2_attn.apps.extraction.options import Options
from dinov2_attn.apps.extraction.passed_over import Sieve
from dinov2_attn.apps.viz.videos import WHOLE, Sampling
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.geometry import geometry_of
from dinov2_attn.typing import Model

Transform = Callable[[Any], Any] | None


class Source(Protocol):
    """Where images come from. ``transform`` is ``None`` if nothing is done to them."""

    @property
    def transform(self) -> str | None: ...

    def items(self, sieve: Sieve) -> list[Item]: ...

    def check(self, items: Sequence[Item], wanted: Wanted) -> None: ...

    def decoder(self, wanted: Wanted) -> OfItems[Picture]: ...

    def measurer(self, wanted: Wanted) -> OfItems[Size]: ...


@dataclass(frozen=True)
class Files:
    """Folders, tars, lists of paths, images and globs."""

    sources: Sequence[str | Path]
    own: Transform
    sampling: Sampling = WHOLE  # of videos

    @property
    def transform(self) -> str | None:
        """A text that identifies the transform."""
        return fingerprint(self.own)

    def items(self, sieve: Sieve) -> list[Item]:
        """Return all images; ``sieve`` counts the other files."""
        return list_items(self.sources, sieve, self.sampling)

    def check(self, items: Sequence[Item], wanted: Wanted) -> None:
        """Raise ``InvalidInputError`` if the transform makes no pictures."""
        if self.own is not None:
            check_first(self._with_transform(wanted), items)

    def decoder(self, wanted: Wanted) -> OfItems[Picture]:
        """Return the decoder of numbered items."""
        if self.own is None:
            return Decoder(wanted.patch_size, wanted.image_size, wanted.max_pixels, wanted.reading)
        return self._with_transform(wanted)

    def measurer(self, wanted: Wanted) -> OfItems[Size]:
        """Return what measures numbered items: by their headers, if there is no transform."""
        if self.own is None:
            return Measurer(wanted.patch_size, wanted.image_size, wanted.max_pixels)
        return ByDecoding(self._with_transform(wanted))

    def _with_transform(self, wanted: Wanted) -> GivenDecoder:
        return GivenDecoder(FileReader(wanted.reading, wanted.max_pixels), self.own, wanted)


@dataclass(frozen=True, eq=False)
class Given:
    """A map-style dataset, or a list of pictures."""

    dataset: Any
    own: Transform

    @property
    def transform(self) -> str | None:
        """A text that identifies the dataset's transform and the one after it."""
        return fingerprint(own_transform(self.dataset), self.own)

    def items(self, _: Sieve) -> list[Item]:
        """Return the items, named by their files or by their numbers."""
        name = type(self.dataset).__name__
        return [Item(name, path, "") for path in paths_of(self.dataset)]

    def check(self, items: Sequence[Item], wanted: Wanted) -> None:
        """Raise ``InvalidInputError`` if there are no pictures."""
        check_first(self.decoder(wanted), items)

    def decoder(self, wanted: Wanted) -> GivenDecoder:
        """Return the decoder of numbered items."""
        stays = isinstance(self.dataset, list | tuple)  # a list in memory is not copied to workers
        return GivenDecoder(self._read, self.own, wanted, stays)

    def measurer(self, wanted: Wanted) -> ByDecoding:
        """Return what measures numbered items, by decoding them."""
        return ByDecoding(self.decoder(wanted))

    def _read(self, number: int, _: Item) -> tuple[object, None]:
        return self.dataset[number], None


def wanted(model: Model, options: Options) -> Wanted:
    """Return the form of pictures that ``model`` takes."""
    return Wanted(
        geometry_of(model).patch_size[0], options.reading, options.image_size, options.max_pixels
    )


def source_of(source: object, transform: Transform, sampling: Sampling = WHOLE) -> Source:
    """Return the source of ``extract``; raise ``InvalidInputError`` if it is none.

    ``sampling`` is of the videos in folders, lists and globs.
    """
    if transform is not None and not callable(transform):
        raise InvalidInputError("transform as a function", repr(transform), "Leave it out.")
    if isinstance(source, str | Path):
        return Files([source], transform, sampling)
    if isinstance(source, Tensor | Image.Image):
        several = isinstance(source, Tensor) and source.ndim == 4
        return Given(list(source) if several else [source], transform)  # type: ignore[arg-type]
    if isinstance(source, list | tuple):
        return _of_list(source, transform, sampling)
    _check_dataset(source)
    return Given(source, transform)


def _of_list(source: Sequence[object], transform: Transform, sampling: Sampling) -> Source:
    paths = [one for one in source if isinstance(one, str | Path)]
    if len(paths) == len(source):
        return Files(paths, transform, sampling)
    if paths:
        other = next(i for i, one in enumerate(source) if not isinstance(one, str | Path))
        raise InvalidInputError(
            "paths, or pictures",
            f"a list with both, a {type(source[other]).__name__} at {other}",
            "Open the images of the paths: PIL.Image.open(path).",
        )
    return Given(source, transform)


def _check_dataset(source: Any) -> None:
    """Raise ``InvalidInputError`` if ``source`` has no items by number."""
    expected = "paths, a map-style dataset or a list of pictures"
    if isinstance(source, DataLoader):
        iterable = isinstance(source.dataset, IterableDataset)
        inner = "list(loader.dataset), where that fits in memory" if iterable else "loader.dataset"
        raise InvalidInputError(expected, "a DataLoader", f"Give {inner}: batches are made here.")
    has_items = hasattr(source, "__getitem__") and not isinstance(source, Mapping)
    if isinstance(source, IterableDataset) or not has_items:
        iterable = hasattr(source, "__iter__") and not isinstance(source, Mapping)
        raise InvalidInputError(
            expected,
            f"{type(source).__name__}, whose items have no numbers to go on with",
            "Give list(source), where that fits in memory, or images in a folder or a tar."
            if iterable
            else "Give a list of pictures.",
        )
    try:
        count = len(source)
    except TypeError as error:
        advice = "Give it a __len__, or make a list of its items."
        raise InvalidInputError(
            expected, f"{type(source).__name__} without length", advice
        ) from error
    if not count:
        raise InvalidInputError("a source of images", "none", "Give at least one.")


def paths_of(dataset: Any) -> list[str]:
    """Return a path for each item.

    It is the file of the item, below the dataset's root, if the dataset lists its files
    (``samples`` or ``imgs``, as torchvision's ``ImageFolder``), or else its number: item-000017.
    """
    return _files_of(dataset) or [f"item-{number:06d}" for number in range(len(dataset))]


def own_transform(dataset: Any) -> Any:
    """Return the transform of a dataset, or of the dataset that it is a subset of."""
    if isinstance(dataset, Subset):
        return own_transform(dataset.dataset)
    return getattr(dataset, "transform", None) or getattr(dataset, "transforms", None)


def _files_of(dataset: Any) -> list[str] | None:
    if isinstance(dataset, Subset):
        whole = _files_of(dataset.dataset)
        return whole and [whole[int(i)] for i in dataset.indices]
    samples = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    if not isinstance(samples, list | tuple) or len(samples) != len(dataset):
        return None
    firsts = [one[0] if isinstance(one, list | tuple) and one else one for one in samples]
    if not all(isinstance(first, str | Path) for first in firsts):
        return None
    root = getattr(dataset, "root", None)
    return [_below(root, Path(first)) for first in firsts]


def _below(root: object, path: Path) -> str:
    if isinstance(root, str | Path) and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return os.fspath(path)


def fingerprint(*transforms: object) -> str | None:
    """Return a text that identifies ``transforms``: their ``repr``, and the code of functions.

    It is the same in every process, and ``None`` without transforms.
    """
    return "; ".join(_identified(one) for one in transforms if one is not None) or None


def _identified(transform: object) -> str:
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(transform))
    code = getattr(transform, "__code__", None)
    if isinstance(code, CodeType):
        text += f" {hashlib.sha256(repr(_parts(code)).encode()).hexdigest()[:12]}"
    return text


def _parts(code: CodeType) -> list[object]:
    consts = [_parts(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), code.co_names, consts]
