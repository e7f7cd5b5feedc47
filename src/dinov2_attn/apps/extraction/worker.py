"""One process with its shards: it decodes, runs the model, and writes meanwhile."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from dinov2_attn.apps.extraction import shards
from dinov2_attn.apps.extraction.bar import Bar
from dinov2_attn.apps.extraction.decode import OfItems, Picture, Refused, Size, T
from dinov2_attn.apps.extraction.inference import BatchMaps, attend_batch
from dinov2_attn.apps.extraction.items import Item
from dinov2_attn.apps.extraction.options import Options, images_together
from dinov2_attn.apps.extraction.plan import Plan
from dinov2_attn.apps.extraction.processes import ending_context
from dinov2_attn.apps.viz.inference import is_out_of_memory, summary_of
from dinov2_attn.apps.viz.reading import warn
from dinov2_attn.errors import (
    Dinov2AttnError,
    UnavailableError,
    UnreadableFileError,
    UnwritableOutputError,
)
from dinov2_attn.typing import Model

log = logging.getLogger(__name__)

# Images that each worker decodes ahead.
AHEAD = 4
# A process takes seconds to start. Meanwhile this one decodes as many images.
WORTH_A_WORKER = 64

# How many batches of pictures may wait for others of their size.
WAITING = 8

# The shape and dtype that all pictures of a batch share.
Kind = tuple[tuple[int, ...], str]


class Buckets:
    """Pictures grouped by size, so that batches need no padding.

    The batches depend on the order of the pictures alone, so that every run makes the same.
    """

    def __init__(self, batch_size: int, together: Callable[[Size], int] | None = None) -> None:
        self._batch_size = batch_size
        self._together = together or (lambda _: batch_size)
        self._waiting: dict[Kind, list[Picture]] = {}
        self._most: dict[Kind, int] = {}  # how many of a kind run together

    def add(self, picture: Picture) -> Iterator[list[Picture]]:
        """Add a picture; yield the batch that it fills, or the fullest one if too many wait."""
        kind = tuple(picture.pixels.shape), str(picture.pixels.dtype)
        if kind not in self._most:
            self._most[kind] = self._together(picture.sides)
        bucket = self._waiting.setdefault(kind, [])
        bucket.append(picture)
        if len(bucket) >= self._most[kind]:
            yield self._waiting.pop(kind)
        elif sum(map(self._full, self._waiting)) >= WAITING:
            yield self._waiting.pop(max(self._waiting, key=self._full))

    def _full(self, kind: Kind) -> Fraction:
        """Return how much of its batch waits."""
        return Fraction(len(self._waiting[kind]), self._most[kind])

    def rest(self) -> Iterator[list[Picture]]:
        """Yield the remaining batches, smallest pictures first."""
        for kind in sorted(self._waiting):
            yield self._waiting.pop(kind)


@dataclass(frozen=True)
class Run:
    """The run of one process through its shards.

    ``decoder`` makes pictures of items, and ``bar`` counts images.
    """

    model: Model
    plan: Plan
    options: Options
    decoder: OfItems[Picture]
    folder: Path
    workers: int
    strict: bool
    bar: Bar
    doubts: list[str] = field(default_factory=list)

    def __call__(self, own: Sequence[int]) -> int:
        """Write the shards ``own``; return their bytes."""
        numbered = (item for shard in own for item in self.plan.numbered(shard))
        decoding = decoded(self.decoder, numbered, self.plan.count(own), self.workers)
        done = 0
        # One shard is written while the next is made. A third would only need more memory.
        writing: Future[int] | None = None
        with self.bar, contextlib.closing(decoding) as pictures, ThreadPoolExecutor(1) as writer:
            for shard in own:
                batches, refused = self._attend(shard, pictures)
                done += self._bytes_of(writing)
                writing = writer.submit(
                    shards.write, self.folder, self.plan, shard, batches, refused
                )
            return done + self._bytes_of(writing)

    def _bytes_of(self, writing: Future[int] | None) -> int:
        try:
            with writing_to(self.folder):
                return writing.result() if writing else 0
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UnavailableError(
                f"memory for a shard of {self.options.shard_size} images",
                summary_of(error),
                "Give a smaller --shard-size.",
            ) from error

    def _attend(
        self, shard: int, pictures: Iterator[Picture | Refused]
    ) -> tuple[list[BatchMaps], list[Refused]]:
        """Return the maps of the images of a shard, and the images without maps."""
        batches: list[BatchMaps] = []
        refused: list[Refused] = []
        for batch in self._batches(shard, pictures, refused):
            for found in attend_batch(self.model, batch, self.options):
                if isinstance(found, Refused):
                    self._pass_over(found, refused)
                else:
                    batches.append(found)
        return batches, refused

    def _batches(
        self, shard: int, pictures: Iterator[Picture | Refused], refused: list[Refused]
    ) -> Iterator[list[Picture]]:
        together = partial(images_together, self.model, self.options)
        buckets = Buckets(self.options.batch_size, together)
        for _ in self.plan.numbered(shard):
            found = next(pictures)
            if isinstance(found, Refused):
                self._pass_over(found, refused)
            else:
                self._warn_once(found.doubt)
                yield from buckets.add(found)
            self.bar.update()
        yield from buckets.rest()

    def _warn_once(self, doubt: str | None) -> None:
        """Warn of the first image with a doubtful range; others are probably alike."""
        if doubt is not None and not self.doubts:
            warn(f"{doubt}. Others like it are not reported")
            self.doubts.append(doubt)

    def _pass_over(self, one: Refused, refused: list[Refused]) -> None:
        if self.strict:
            refuse(one.item.path, one.reason)
        refused.append(one)


def refuse(path: str, reason: str) -> None:
    """Raise ``UnreadableFileError`` for the first image without maps of a strict run."""
    raise UnreadableFileError(
        "images that can all be read and run, since the run is strict",
        (reason if path in reason else f"{path}: {reason}").rstrip("."),
        "Fix the image and run with --retry, or run without --strict.",
    )


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raise ``UnwritableOutputError`` for an error of the file system."""
    try:
        yield
    except OSError as error:
        raise UnwritableOutputError(
            f"a folder that can be written at {folder}",
            f"{type(error).__name__}: {error}",
            "Finished shards are whole. Make room, or name another folder, and run again.",
        ) from error


def decoded(
    decoder: OfItems[T], numbered: Iterable[tuple[int, Item]], count: int, workers: int
) -> Generator[T | Refused, None, None]:
    """Yield the pictures of ``count`` items in their order, decoded by up to ``workers``."""
    workers = min(workers, count // WORTH_A_WORKER)
    if workers and not can_be_sent(decoder):
        log.info("images are decoded in this process: its dataset or transform cannot be pickled")
        workers = 0
    loader: DataLoader[Any] = DataLoader(
        cast("Dataset[Any]", decoder),  # it has items, which is all that is needed
        sampler=numbered,
        batch_size=None,
        num_workers=workers,
        # A fork of a process with threads may hang, and may hold on to the folder's lock when
        # this process is killed.
        multiprocessing_context=ending_context() if workers else None,
        prefetch_factor=AHEAD if workers else None,
        generator=torch.Generator(),  # leave the global generator unchanged
    )
    try:
        yield from loader
    except (RuntimeError, MemoryError) as error:
        ours = isinstance(error, Dinov2AttnError)
        if ours or not workers or not ("worker" in str(error) or is_out_of_memory(error)):
            raise
        raise UnavailableError(
            f"{workers} processes that decode images",
            summary_of(error),
            "Their memory may not suffice: try fewer workers, or a smaller --max-pixels.",
        ) from error


def can_be_sent(decoder: object) -> bool:
    """Return whether ``decoder`` can be sent to a new process."""
    if getattr(decoder, "stays", False):
        return False
    try:
        content = bytes(ForkingPickler.dumps(decoder))  # as it would be sent
    except Exception:  # an object's own pickling may raise any exception
        return False
    # A class defined in a notebook or at a prompt exists in this process only.
    return hasattr(sys.modules["__main__"], "__file__") or b"__main__" not in content
