"""What the items of a dataset are called, and what the dataset does to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.utils.data import Subset


def paths_of(dataset: Any) -> list[str]:
    """Return what each item is called.

    That is the file it comes from, below the dataset's root, where the dataset tells
    (``samples`` or ``imgs``, as torchvision's ``ImageFolder``), or else its number: item-000017.
    """
    return _files_of(dataset) or [f"item-{number:06d}" for number in range(len(dataset))]


def own_transform(dataset: Any) -> Any:
    """Return the transform of a dataset, or of the one that it is a part of."""
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


def _below(root: Any, path: Path) -> str:
    if isinstance(root, str | Path) and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return os.fspath(path)
