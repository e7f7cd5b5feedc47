"""The file of a shard: safetensors, or zarr arrays in a zip. Tensors are called ``N.maps`` in both.

Equal tensors give equal bytes, so that a run that was killed and continued writes what another
would have written.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dinov2_attn import _imports
from dinov2_attn._files import check_is_file
from dinov2_attn.errors import InvalidInputError, UnavailableError

Format = Literal["safetensors", "zarr"]
SUFFIXES: dict[str, str] = {"safetensors": ".safetensors", "zarr": ".zarr.zip"}

# The axes of arrays behind that of images; facets and statistics have none here.
DIMENSIONS = {
    "maps": ("layer", "head", "query", "row", "column"),
    "prefix": ("layer", "head", "query", "token"),
}
# A chunk of zarr holds images of about so many bytes. Reading one image reads a chunk.
CHUNK_BYTES = 2**18


class Shard(Protocol):
    """A shard that is open for reading."""

    def metadata(self) -> dict[str, str]: ...

    def keys(self) -> Any: ...

    def get_tensor(self, name: str) -> Tensor: ...

    def __enter__(self) -> Shard: ...

    def __exit__(self, *error: Any) -> None: ...


def check_format(name: object, dtype: str) -> str:
    """Return the name of a format; raise if there is no such one, or its library is missing."""
    if not isinstance(name, str) or name not in SUFFIXES:
        raise InvalidInputError(
            f"a format: {' or '.join(SUFFIXES)}", repr(name), "Leave it out for safetensors."
        )
    if name == "zarr":
        _require_zarr()
        if dtype == "bfloat16":
            raise InvalidInputError(
                "a dtype that zarr has: float32 or float16", dtype, "Store float16, or safetensors."
            )
    return name


def encoded(name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the bytes of the file of a shard in the format ``name``."""
    if name == "zarr":
        return _zipped(_arrays(tensors, metadata))
    content: bytes = _imports.safetensors().torch.save(dict(tensors), metadata)
    return content


def opened(path: Path) -> Shard:
    """Open the file of a shard, by its suffix."""
    check_is_file(path)
    if path.name.endswith(SUFFIXES["zarr"]):
        return ZarrShard(path)
    shard: Shard = _imports.safetensors().safe_open(path, "pt")
    return shard


class ZarrShard:
    """A zip of zarr arrays.

    Images whose tensors have the same shapes are rows of the same arrays: ``0/maps``, ``0/prefix``,
    and ``0/number`` with their numbers. Images of other shapes are in ``1``, and so on.
    """

    def __init__(self, path: Path) -> None:
        _require_zarr()
        import zarr

        self._store = zarr.storage.ZipStore(path, mode="r")
        self._root: Any = zarr.open_group(self._store, mode="r")
        self._places = {
            int(number): (group, row)
            for group in sorted(self._root.group_keys(), key=int)
            for row, number in enumerate(self._root[f"{group}/number"][:])
        }
        self._kinds = {
            group: [kind for kind in self._root[group].array_keys() if kind != "number"]
            for group in self._root.group_keys()
        }

    def __enter__(self) -> ZarrShard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._store.close()

    def metadata(self) -> dict[str, str]:
        """Return the attributes of the root."""
        return dict(self._root.attrs)

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return [
            f"{number}.{kind}"
            for number, (group, _) in self._places.items()
            for kind in self._kinds[group]
        ]

    def get_tensor(self, name: str) -> Tensor:
        """Return one tensor of an image."""
        number, _, kind = name.partition(".")
        group, row = self._places[int(number)]
        import numpy as np

        return torch.from_numpy(np.array(self._root[f"{group}/{kind}"][row]))


def _require_zarr() -> None:
    found = _imports.is_installed("zarr")
    if found:
        import zarr

        found = int(zarr.__version__.partition(".")[0]) >= 3
    if not found:
        raise UnavailableError(
            "the library zarr, version 3, which needs Python 3.11",
            "none in this environment",
            "Install it with `pip install 'dinov2-attn[zarr]'`.",
        )


def _arrays(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> dict[str, bytes]:
    """Return the files of a zarr group by their names."""
    import numpy as np
    import zarr

    files: dict[str, Any] = {}
    root = zarr.create_group(zarr.storage.MemoryStore(files), attributes=dict(metadata))
    for name, images in enumerate(_by_shape(tensors).values()):
        group = root.create_group(str(name))
        _add(group, "number", np.array(list(images), np.int64), ["image"])
        for kind, first in next(iter(images.values())).items():
            values = torch.stack([own[kind] for own in images.values()]).numpy()
            _add(group, kind, values, _dimensions(kind, first.ndim))
    return {name: buffer.to_bytes() for name, buffer in files.items()}


def _by_shape(tensors: Mapping[str, Tensor]) -> dict[Any, dict[int, dict[str, Tensor]]]:
    """Return the tensors of each image by kind, images with the same shapes together."""
    images: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, kind = name.partition(".")
        images.setdefault(int(number), {})[kind] = tensor
    alike: dict[Any, dict[int, dict[str, Tensor]]] = {}
    for image, own in sorted(images.items()):
        shapes = tuple((kind, tuple(one.shape)) for kind, one in own.items())
        alike.setdefault(shapes, {})[image] = own
    return alike


def _add(group: Any, name: str, values: Any, dimensions: list[str] | None) -> None:
    each = max(1, values[:1].nbytes)
    count = min(len(values), max(1, CHUNK_BYTES // each))
    group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(count, *(max(1, side) for side in values.shape[1:])),
        dimension_names=dimensions,
    )
    if values.size:
        group[name][:] = values


def _dimensions(kind: str, ndim: int) -> list[str] | None:
    names = DIMENSIONS.get(kind)
    if names is None:
        return None
    return ["image", *(name for name in names if name != "head" or ndim == len(names))]


def _zipped(files: Mapping[str, bytes]) -> bytes:
    """Return a zip of ``files`` that depends on nothing but them."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            archive.writestr(info, files[name])
    return content.getvalue()
