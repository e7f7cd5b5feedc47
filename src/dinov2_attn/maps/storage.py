"""Attention maps in a safetensors file, which any language reads and which runs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_attn import _optional
from dinov2_attn._files import atomic_file
from dinov2_attn.errors import InvalidInputError, UnreadableFileError, UnwritableOutputError
from dinov2_attn.maps.attention_maps import AttentionMaps


def save(maps: AttentionMaps[Any], path: Path) -> None:
    """Write ``maps`` to ``path``; see ``AttentionMaps.save``."""
    about = {key: getattr(maps, key) for key in ("layers", "grid", "prefix", "queries")}
    metadata = {key: json.dumps(value) for key, value in about.items()}
    content = _optional.safetensors().torch.save(_named(maps), metadata)
    try:
        with atomic_file(path) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise UnwritableOutputError(
            f"a file that can be written at {path}",
            f"{type(error).__name__}: {error}",
            "Nothing was left there. Name another file, or make the folder or room in it.",
        ) from error


def load(path: Path) -> AttentionMaps[Any]:
    """Read ``maps`` from ``path``; see ``AttentionMaps.load``."""
    library = _optional.safetensors()
    try:
        with library.safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers = tuple(about["layers"])
        return AttentionMaps(
            weights=tuple(_entry(tensors, layer) for layer in layers),
            layers=layers,
            grid=_tuples(about["grid"]),
            prefix=int(about["prefix"]),
            queries=_tuples(about["queries"]),
        )
    except Exception as error:  # the reader raises whatever foreign bytes provoke
        raise UnreadableFileError(
            "a file that AttentionMaps.save wrote",
            f"{path} ({type(error).__name__}: {error})",
            "Name the .safetensors file itself.",
        ) from error


def _named(maps: AttentionMaps[Any]) -> dict[str, Tensor]:
    named = {}
    for layer, entry in zip(maps.layers, maps.weights, strict=True):
        several = isinstance(entry, list)
        for i, weights in enumerate(entry if several else [entry]):
            if not isinstance(weights, Tensor):
                raise InvalidInputError(
                    "weights as tensors", type(weights).__name__, "Save before .numpy()."
                )
            # Of their own memory each: queries of several layers may be views of one.
            own = weights.detach().cpu().clone(memory_format=torch.contiguous_format)
            named[_name(layer, i if several else None)] = own
    return named


def _name(layer: int, batch: int | None) -> str:
    return f"layer.{layer}" if batch is None else f"layer.{layer}.{batch}"


def _entry(tensors: dict[str, Tensor], layer: int) -> Tensor | list[Tensor]:
    if _name(layer, None) in tensors:
        return tensors[_name(layer, None)]
    count = sum(name.startswith(f"layer.{layer}.") for name in tensors)
    if not count:
        raise KeyError(_name(layer, None))
    return [tensors[_name(layer, i)] for i in range(count)]


def _tuples(value: Any) -> Any:
    """Return what JSON made of a grid or of queries, or of a list of them."""
    if value is None:
        return None
    if any(isinstance(one, list) or one is None for one in value):
        return [_tuples(one) for one in value]
    return tuple(value)
