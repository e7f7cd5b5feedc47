"""The plan of an extraction: which images go into which shard, and how plans differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import dinov2_attn
from dinov2_attn.apps.extraction.described import preprocessing_of, tensors_of
from dinov2_attn.apps.extraction.items import Item
from dinov2_attn.apps.extraction.layout import FORMAT
from dinov2_attn.apps.extraction.options import Options
from dinov2_attn.backbone.structure import name_of
from dinov2_attn.maps.geometry import geometry_of
from dinov2_attn.typing import Model

NO_MEANING = "random weights: these maps carry no meaning"


@dataclass(frozen=True)
class Plan:
    """All images in their order, split into shards of ``shard_size``; the same for every run.

    ``about`` is the content of ``extraction.json``: everything that decides the bytes of shards.
    ``passed_over`` counts the other files of the source by suffix.
    """

    items: Sequence[Item]
    shard_size: int
    about: dict[str, Any]
    passed_over: dict[str, int]

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-len(self.items) // self.shard_size)

    def numbered(self, shard: int) -> Iterator[tuple[int, Item]]:
        """Yield the images of a shard with their numbers among all."""
        start = shard * self.shard_size
        return enumerate(self.items[start : start + self.shard_size], start)

    def others(self, shards: Sequence[int]) -> list[int]:
        """Return all shards but these."""
        return sorted(set(range(self.shards)) - set(shards))

    def count(self, shards: Sequence[int]) -> int:
        """Return how many images these shards have."""
        starts = (shard * self.shard_size for shard in shards)
        return sum(min(self.shard_size, len(self.items) - start) for start in starts)


def plan(
    model: Model,
    items: Sequence[Item],
    options: Options,
    name: str | None,
    warning: str | None,
    passed_over: dict[str, int],
    transform: str | None = None,
) -> Plan:
    """Return the plan for ``items``.

    ``name`` is the name of the model, and ``transform`` identifies what is done to pictures.
    """
    about = {
        "format": FORMAT,
        "model": {
            "name": name or name_of(type(model)),
            "patch_size": list(geometry_of(model).patch_size),
            "prefix": geometry_of(model).prefix,
            "weights": weights_digest(model),
            "code": _code(model),
            "warning": warning,
        },
        "tensors": tensors_of(model, options),
        "preprocessing": preprocessing_of(model, options, transform),
        "options": asdict(options),
        "source": {"images": len(items), "listing": _listing(items), "transform": transform},
    }
    # Converted by JSON, so that it equals what is read from a file.
    about = json.loads(json.dumps(about))
    return Plan(items, options.shard_size, about, passed_over)


def differences(mine: object, theirs: object, where: str = "") -> list[str]:
    """Return one line for each difference between the contents of two plans, each once."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = list(dict.fromkeys([*theirs, *mine]))
        nested = (differences(mine.get(key), theirs.get(key), key) for key in keys)
        return list(dict.fromkeys(line for lines in nested for line in lines))
    return [] if mine == theirs else [f"{where}: {json.dumps(theirs)}, now {json.dumps(mine)}"]


def weights_digest(model: Model) -> str:
    """Return a sha256 of all weights, by name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}\n".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _code(model: Model) -> str | None:
    """Return the recognised revision of the model: revisions interpolate positions differently."""
    module = type(model).__module__
    recognised = dinov2_attn.status().recognised.items()
    return next((how for target, how in recognised if module.startswith(f"{target}.")), None)


def _listing(items: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.source, item.path]).encode())
    return digest.hexdigest()
