"""A preview of an extraction, from the headers of its images."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import tee
from pathlib import Path

from dinov2_attn.apps.extraction.bar import Bar
from dinov2_attn.apps.extraction.decode import OfItems, Refused, Size
from dinov2_attn.apps.extraction.options import Options, stored_bytes
from dinov2_attn.apps.extraction.passed_over import describe
from dinov2_attn.apps.extraction.plan import Plan
from dinov2_attn.apps.extraction.worker import decoded
from dinov2_attn.apps.viz.tokens import resolve
from dinov2_attn.errors import OutOfRangeError, in_one_line, shown_name
from dinov2_attn.typing import Grid, Model

# How many unreadable images are listed.
NAMED = 20


@dataclass(frozen=True)
class Preview:
    """What an extraction would do.

    Attributes:
        images: The number of images of the source.
        shards: The number of shards of the source.
        finished: The number of shards that exist and would be skipped.
        finished_images: The number of images in these shards.
        unreadable: The images that would have no maps. Decoding may find more.
        bytes: The bytes of maps that would be written.
        free: The free bytes of the disk.
        passed_over: The number of other files in the source, by suffix.

    """

    images: int
    shards: int
    finished: int
    finished_images: int
    unreadable: tuple[Refused, ...]
    bytes: int
    free: int
    passed_over: dict[str, int] = field(hash=False)

    def __str__(self) -> str:
        remaining = self.images - self.finished_images - len(self.unreadable)
        lines = [
            f"{self.images:,} images in {self.shards:,} shards",
            f"finished, to be passed over: {self.finished_images:,} images in "
            f"{self.finished:,} shards",
            f"unreadable by their headers: {len(self.unreadable):,}",
            *(f"  {shown_name(one.item.path)}: {one.reason}" for one in self.unreadable[:NAMED]),
            *[f"  and {len(self.unreadable) - NAMED:,} more"] * (len(self.unreadable) > NAMED),
            f"to be written: the maps of {remaining:,} images, {self.bytes:,} bytes and an index "
            f"(free: {self.free:,})",
            *[describe(self.passed_over)] * bool(self.passed_over),
        ]
        return "\n".join(lines)


def preview(
    model: Model,
    made: Plan,
    options: Options,
    measurer: OfItems[Size],
    folder: Path,
    done: list[int],
    workers: int,
    new_bar: Callable[[int], Bar],
) -> Preview:
    """Return what a run of the plan ``made`` would do; ``done`` are its finished shards."""
    rest = made.others(done)
    numbered, again = tee(item for shard in rest for item in made.numbered(shard))
    refused: list[Refused] = []
    grids: Counter[Grid] = Counter()
    with new_bar(made.count(rest)) as bar:
        measured = decoded(measurer, numbered, made.count(rest), workers)
        for (number, item), found in zip(again, measured, strict=True):
            bar.update()
            if isinstance(found, Refused):
                refused.append(found)
            elif reason := _lacks(found, made, options):
                refused.append(Refused(number, item, reason))
            else:
                height, width = found  # the loader turns tuples into lists
                grids[height, width] += 1
    return Preview(
        images=len(made.items),
        shards=made.shards,
        finished=len(done),
        finished_images=made.count(done),
        unreadable=tuple(refused),
        bytes=sum(n * stored_bytes(model, options, grid) for grid, n in grids.items()),
        free=shutil.disk_usage(_existing(folder)).free,
        passed_over=made.passed_over,
    )


def _lacks(grid: Grid, made: Plan, options: Options) -> str | None:
    """Return the reason if images of ``grid`` do not have all queries."""
    try:
        resolve(options.queries, made.about["model"]["prefix"], grid)
    except OutOfRangeError as error:
        return in_one_line(error)
    return None


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
