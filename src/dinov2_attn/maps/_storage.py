"""Results in safetensors files, which any language reads and which run no code."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dinov2_attn import _imports
from dinov2_attn._files import atomic_file
from dinov2_attn.errors import InvalidInputError, UnreadableFileError, UnwritableOutputError

R = TypeVar("R")


def write(path: Path, kind: str, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write ``tensors`` to ``path``, with ``kind`` and ``about`` as JSON in the metadata.

    Raises:
        InvalidInputError: Something in ``tensors`` is not a tensor.
        UnwritableOutputError: ``path`` cannot be written. The file appears whole or not at all.

    """
    metadata = {
        key: json.dumps(value, default=operator.index)
        for key, value in {"kind": kind, **about}.items()
    }
    own = {name: _of_its_own_memory(tensor) for name, tensor in tensors.items()}
    content = _imports.safetensors().torch.save(own, metadata)
    try:
        with atomic_file(path) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise UnwritableOutputError(
            f"a file that can be written at {path}",
            f"{type(error).__name__}: {error}",
            "Nothing was left there. Name another file, or make the folder or room in it.",
        ) from error


def read(path: Path, kind: str, build: Callable[[dict[str, Tensor], dict[str, Any]], R]) -> R:
    """Return what ``build`` makes of the tensors and the metadata that ``write`` wrote.

    Raises:
        UnreadableFileError: The file is missing, damaged or holds no ``kind``.

    """
    library = _imports.safetensors()
    try:
        with library.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = {key: _tuples(json.loads(value)) for key, value in metadata.items()}
        _check_kind(kind, about.pop("kind", kind))
        return build(tensors, about)
    except Exception as error:  # foreign bytes can make the reader raise anything
        raise UnreadableFileError(
            f"a file that {kind}.save wrote",
            f"{path} ({type(error).__name__}: {error})",
            "Name the .safetensors file itself.",
        ) from error


def _of_its_own_memory(tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise InvalidInputError(
            "weights as tensors",
            type(tensor).__name__,
            "Save before .numpy(), and let reduce return tensors.",
        )
    # safetensors refuses shared memory: rows of several layers may be views of one tensor.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _check_kind(wanted: str, found: object) -> None:
    if found != wanted:
        raise ValueError(f"it holds {found}")


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
