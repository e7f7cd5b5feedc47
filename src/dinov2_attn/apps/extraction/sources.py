"""What ``extract`` is given: files, or a dataset; each lists its items and decodes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dinov2_attn.apps.extraction.decode import Decoder, Measurer
from dinov2_attn.apps.extraction.given import (
    ByDecoding,
    FileReader,
    GivenDecoder,
    Wanted,
    check_first,
)
from dinov2_attn.apps.extraction.identity import own_transform, paths_of
from dinov2_attn.apps.extraction.item import Item
from dinov2_attn.apps.extraction.items import list_items
from dinov2_attn.apps.extraction.options import Options
from dinov2_attn.apps.extraction.passed_over import Sieve
from dinov2_attn.apps.extraction.pickled import fingerprint
from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.errors import InvalidInputError

Transform = Callable[[Any], Any] | None


class Source(Protocol):
    """Where images come from. ``transform`` tells what is done to them, ``None`` for nothing."""

    @property
    def transform(self) -> str | None: ...

    def items(self, sieve: Sieve) -> list[Item]: ...

    def check(self, items: Sequence[Item], wanted: Wanted) -> None: ...

    def decoder(self, wanted: Wanted) -> Any: ...

    def measurer(self, wanted: Wanted) -> Any: ...


@dataclass(frozen=True)
class Files:
    """Folders, tars, lists of paths, images and globs."""

    sources: Sequence[str | Path]
    own: Transform

    @property
    def transform(self) -> str | None:
        """What tells the transform from others."""
        return fingerprint(self.own)

    def items(self, sieve: Sieve) -> list[Item]:
        """Return all images; ``sieve`` counts what lies beside them."""
        return list_items(self.sources, sieve)

    def check(self, items: Sequence[Item], wanted: Wanted) -> None:
        """Raise ``InvalidInputError`` where a transform makes no pictures."""
        if self.own is not None:
            check_first(self.decoder(wanted), items)

    def decoder(self, wanted: Wanted) -> Any:
        """Return what makes pictures of numbered items."""
        if self.own is None:
            return Decoder(wanted.patch_size, wanted.image_size, wanted.max_pixels, wanted.reading)
        return GivenDecoder(FileReader(wanted.reading, wanted.max_pixels), self.own, wanted)

    def measurer(self, wanted: Wanted) -> Any:
        """Return what measures numbered items: by their headers, where nothing is done to them."""
        if self.own is None:
            return Measurer(wanted.patch_size, wanted.image_size, wanted.max_pixels)
        return ByDecoding(self.decoder(wanted))


@dataclass(frozen=True, eq=False)
class Given:
    """A map-style dataset, or a list of pictures."""

    dataset: Any
    own: Transform

    @property
    def transform(self) -> str | None:
        """What tells the dataset's transform and the one that follows it from others."""
        return fingerprint(own_transform(self.dataset), self.own)

    def items(self, _: Sieve) -> list[Item]:
        """Return the items, called by the files they come from or by their numbers."""
        name = type(self.dataset).__name__
        return [Item(name, path, "") for path in paths_of(self.dataset)]

    def check(self, items: Sequence[Item], wanted: Wanted) -> None:
        """Raise ``InvalidInputError`` where there are no pictures."""
        check_first(self.decoder(wanted), items)

    def decoder(self, wanted: Wanted) -> Any:
        """Return what makes pictures of numbered items."""
        stays = isinstance(self.dataset, list | tuple)  # what is in memory is not sent about
        return GivenDecoder(self._read, self.own, wanted, stays)

    def measurer(self, wanted: Wanted) -> Any:
        """Return what measures numbered items, by making their pictures."""
        return ByDecoding(self.decoder(wanted))

    def _read(self, number: int, _: Item) -> tuple[Any, None]:
        return self.dataset[number], None


def wanted(model: Any, options: Options) -> Wanted:
    """Return what pictures have to be for ``model``."""
    return Wanted(
        Backbone(model).patch_size[0], options.reading, options.image_size, options.max_pixels
    )


def source_of(source: Any, transform: Transform) -> Source:
    """Return what ``extract`` was given as a source. Raises ``InvalidInputError``."""
    if transform is not None and not callable(transform):
        raise InvalidInputError("transform as a function", repr(transform), "Leave it out.")
    if isinstance(source, str | Path):
        return Files([source], transform)
    if isinstance(source, Tensor | Image.Image):
        several = isinstance(source, Tensor) and source.ndim == 4
        return Given(list(source) if several else [source], transform)  # type: ignore[arg-type]
    if isinstance(source, list | tuple):
        return _of_list(source, transform)
    _check_dataset(source)
    return Given(source, transform)


def _of_list(source: Sequence[Any], transform: Transform) -> Source:
    paths = [isinstance(one, str | Path) for one in source]
    if all(paths):
        return Files(source, transform)
    if any(paths):
        other = source[paths.index(False)]
        raise InvalidInputError(
            "paths, or pictures",
            f"a list with both, a {type(other).__name__} at {paths.index(False)}",
            "Open the images of the paths: PIL.Image.open(path).",
        )
    return Given(source, transform)


def _check_dataset(source: Any) -> None:
    """Raise ``InvalidInputError`` for what has no items by number."""
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
