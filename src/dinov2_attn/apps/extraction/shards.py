"""Writing shards atomically, each with its index, and the index of all."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2_attn import _imports
from dinov2_attn._files import UNFINISHED, atomic_file
from dinov2_attn.apps.extraction.decode import Refused
from dinov2_attn.apps.extraction.inference import BatchMaps
from dinov2_attn.apps.extraction.layout import (
    ABOUT,
    INDEX,
    LOCK,
    SHARDS,
    UNREADABLE,
    checksum,
    names,
    read_about,
)
from dinov2_attn.apps.extraction.plan import Plan, differences
from dinov2_attn.errors import InvalidInputError


def check(folder: Path, plan: Plan) -> None:
    """Raise ``InvalidInputError`` unless ``folder`` belongs to ``plan`` or is empty."""
    if (folder / ABOUT).exists():
        found = differences(plan.about, read_about(folder))
        if found:
            raise InvalidInputError(
                f"the extraction that {folder} was begun for",
                "another: " + "; ".join(found),
                "Name another folder, or run with the original options.",
            )
    elif any(not path.name.startswith((LOCK, UNFINISHED)) for path in folder.iterdir()):
        raise InvalidInputError(
            f"a folder of an extraction, or an empty one, at {folder}",
            "other files there",
            "Name another folder.",
        )


def prepare(folder: Path, plan: Plan) -> None:
    """Prepare ``folder`` for shards, after ``check``.

    Unfinished files of a killed run are removed.
    """
    for left in (*folder.glob(f"{UNFINISHED}*"), *folder.glob(f"{SHARDS}/{UNFINISHED}*")):
        shutil.rmtree(left)
    # This file comes first: it marks the folder as an extraction.
    if not (folder / ABOUT).exists():
        _write(folder / ABOUT, json.dumps(plan.about, indent=1) + "\n")
    (folder / SHARDS).mkdir(exist_ok=True)


def finished(folder: Path, count: int) -> list[int]:
    """Return which of ``count`` shards are complete and have their index."""
    return [shard for shard in range(count) if _is_finished(folder, shard)]


def _is_finished(folder: Path, shard: int) -> bool:
    tensors, index = _paths(folder, shard)
    if not index.exists():
        return False
    try:
        expected = {name for line in _lines(index) if "shard" in line for name in names(line)}
        with _imports.safetensors().safe_open(tensors, "pt") as file:
            return set(file.keys()) == expected
    except Exception:  # a shard that cannot be read is written again
        return False


def write(folder: Path, shard: int, batches: list[BatchMaps], refused: list[Refused]) -> int:
    """Write a shard, then its index; return the number of bytes."""
    path, index = _paths(folder, shard)
    tensors: dict[str, Tensor] = {}
    lines = [_refusal(one) for one in refused]
    for batch in batches:
        for entry, maps, prefix in _entries(batch):
            entry["shard"] = path.relative_to(folder).as_posix()
            tensors |= dict(zip(names(entry), (maps, prefix), strict=True))
            lines.append(entry)
    lines.sort(key=lambda entry: int(entry["number"]))
    # No metadata: safetensors writes several entries in a random order.
    with atomic_file(path) as unfinished:
        unfinished.write_bytes(_imports.safetensors().torch.save(tensors))
    _write(index, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    return path.stat().st_size + index.stat().st_size


def merge(folder: Path, shards: int) -> Counter[str]:
    """Merge the lines of all shards into one index, and one list of images without maps.

    Returns the number of images that failed in each stage.
    """
    stages: Counter[str] = Counter()
    with (
        atomic_file(folder / INDEX) as index,
        atomic_file(folder / UNREADABLE) as unreadable,
        index.open("w") as stored,
        unreadable.open("w") as refused,
    ):
        for shard in range(shards):
            for line in _paths(folder, shard)[1].read_text().splitlines(keepends=True):
                entry = json.loads(line)
                (stored if "shard" in entry else refused).write(line)
                stages.update(() if "shard" in entry else (entry["stage"],))
    return stages


def refusals(folder: Path, shard: int) -> list[dict[str, Any]]:
    """Return the entries of a finished shard's images without maps."""
    return [line for line in _lines(_paths(folder, shard)[1]) if "reason" in line]


def _entries(batch: BatchMaps) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
    """Yield each image's line of the index, without its shard, and its tensors."""
    reports = batch.artifacts.cpu().report() if batch.artifacts else [None] * len(batch.origins)
    each = zip(batch.origins, batch.maps.cpu(), batch.prefix.cpu(), reports, strict=True)
    for origin, maps, prefix, artifacts in each:
        mass = prefix.float().sum(-1).flatten(1).mean(1).tolist()
        entry = {
            "number": origin.number,
            "source": origin.item.source,
            "path": origin.item.path,
            "size": list(origin.size),
            "grid": list(batch.grid),
            "prefix_mass": [number if math.isfinite(number) else None for number in mass],
            "artifacts": artifacts,
            "sha256": origin.sha256,
            "checksum": checksum(maps, prefix),
        }
        # Safetensors requires that tensors do not share memory.
        yield entry, maps.clone(), prefix.clone()


def _refusal(refused: Refused) -> dict[str, Any]:
    return {
        "number": refused.number,
        "source": refused.item.source,
        "path": refused.item.path,
        "stage": refused.stage,
        "reason": refused.reason,
    }


def _paths(folder: Path, shard: int) -> tuple[Path, Path]:
    path = folder / SHARDS / f"{shard:05d}"
    return path.with_suffix(".safetensors"), path.with_suffix(".jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as unfinished:
        unfinished.write_text(text)
