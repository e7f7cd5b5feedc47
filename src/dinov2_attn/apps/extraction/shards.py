"""Writing shards atomically, each with its index, and the index of all."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2_attn._files import UNFINISHED, atomic_file
from dinov2_attn.apps.extraction.decode import Refused
from dinov2_attn.apps.extraction.described import metadata_of, readme
from dinov2_attn.apps.extraction.inference import BatchMaps
from dinov2_attn.apps.extraction.items import Item
from dinov2_attn.apps.extraction.layout import (
    ABOUT,
    INDEX,
    LOCK,
    README,
    SHARDS,
    UNREADABLE,
    checksum,
    names,
    read_about,
)
from dinov2_attn.apps.extraction.plan import Plan, differences
from dinov2_attn.apps.extraction.storages import SUFFIXES, encoded, opened
from dinov2_attn.errors import InvalidInputError, shown_name

log = logging.getLogger(__name__)


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
    if not (folder / README).exists():
        _write(folder / README, readme(plan.about))
    (folder / SHARDS).mkdir(exist_ok=True)


def finished(folder: Path, plan: Plan, verify: bool = False) -> list[int]:
    """Return which shards of ``plan`` are complete and unchanged.

    Each index is compared with the plan and with the sha256 in its shard, and the names of the
    tensors with the index. With ``verify`` all tensors are read and compared with their checksums.
    """
    return [shard for shard in range(plan.shards) if _is_finished(folder, plan, shard, verify)]


def _is_finished(folder: Path, plan: Plan, shard: int, verify: bool) -> bool:
    path, index = _paths(folder, shard, plan.about["options"]["format"])
    if not index.is_file():
        return False
    try:
        content = index.read_bytes()
        lines = [json.loads(line) for line in content.splitlines()]
        listed = [(line["number"], line["source"], line["path"]) for line in lines]
        planned = [(number, item.source, item.path) for number, item in plan.numbered(shard)]
        metadata = metadata_of(plan.about, content)
        whole = listed == planned and _is_whole(path, metadata, lines, verify)
    except Exception:  # the readers may raise any exception for foreign bytes
        whole = False
    if not whole:
        log.warning("%s or its index was changed or damaged: it is written again", shown_name(path))
    return whole


def _is_whole(
    path: Path, metadata: dict[str, str], lines: list[dict[str, Any]], verify: bool
) -> bool:
    if not path.is_file():  # a pipe might never end
        return False
    entries = [line for line in lines if "shard" in line]
    expected = {name for entry in entries for name in names(entry)}
    with opened(path) as file:
        if file.metadata() != metadata or set(file.keys()) != expected:
            return False
        return not verify or all(_is_stored(file, entry) for entry in entries)


def _is_stored(file: Any, entry: dict[str, Any]) -> bool:
    tensors = (file.get_tensor(name) for name in names(entry))
    return bool(checksum(*tensors) == entry["checksum"])


def write(
    folder: Path, plan: Plan, shard: int, batches: list[BatchMaps], refused: list[Refused]
) -> int:
    """Write a shard, then its index; return the number of bytes."""
    form = plan.about["options"]["format"]
    path, index = _paths(folder, shard, form)
    tensors: dict[str, Tensor] = {}
    lines = [_refusal(one) for one in refused]
    for batch in batches:
        for entry, own in _entries(batch):
            entry["shard"] = path.relative_to(folder).as_posix()
            tensors |= dict(zip(names(entry), own, strict=True))
            lines.append(entry)
    lines.sort(key=lambda entry: int(entry["number"]))
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    metadata = metadata_of(plan.about, text.encode())
    with atomic_file(path) as unfinished:
        unfinished.write_bytes(encoded(form, tensors, metadata))
    _write(index, text)
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


def _entries(batch: BatchMaps) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
    """Yield each image's line of the index, without its shard, and its tensors."""
    reports = batch.artifacts.cpu().report() if batch.artifacts else [None] * len(batch.origins)
    stored = [one.cpu() for one in _tensors(batch)]
    each = zip(batch.origins, reports, batch.entropy.cpu(), *stored, strict=True)
    for origin, artifacts, entropy, *tensors in each:
        mass = tensors[1].float().sum(-1).flatten(1).mean(1)
        entry = {
            "number": origin.number,
            "source": origin.item.source,
            "path": origin.item.path,
            "size": list(origin.size),
            "grid": list(batch.grid),
            "prefix_mass": _finite(mass),
            "entropy": _finite(entropy),
            "artifacts": artifacts,
            "sha256": origin.sha256,
            "checksum": checksum(*tensors),
            **_of_frame(origin.item),
            **({"facets": list(batch.facets)} if batch.facets else {}),
            **({"statistics": list(batch.statistics)} if batch.statistics else {}),
        }
        # Safetensors requires that tensors do not share memory.
        yield entry, [tensor.clone() for tensor in tensors]


def _of_frame(item: Item) -> dict[str, Any]:
    """Return the number and the time in seconds of a frame of a video."""
    return {} if item.frame is None else {"frame": item.frame, "time": item.time}


def _tensors(batch: BatchMaps) -> list[Tensor]:
    """Return what is stored, in the order of ``layout.kinds``."""
    return [batch.maps, batch.prefix, *batch.facets.values(), *batch.statistics.values()]


def _finite(numbers: Tensor) -> list[float | None]:
    """Return ``numbers`` as JSON has them: without NaN and infinity."""
    return [number if math.isfinite(number) else None for number in numbers.tolist()]


def _refusal(refused: Refused) -> dict[str, Any]:
    return {
        "number": refused.number,
        "source": refused.item.source,
        "path": refused.item.path,
        "stage": refused.stage,
        "reason": refused.reason,
    }


def _paths(folder: Path, shard: int, form: str = "safetensors") -> tuple[Path, Path]:
    path = folder / SHARDS / f"{shard:05d}"
    return path.with_suffix(SUFFIXES[form]), path.with_suffix(".jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as unfinished:
        unfinished.write_bytes(text.encode())
