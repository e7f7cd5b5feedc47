"""What one process does with its shards: decode, look, and write beside the next look."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dinov2_attn.dataset import shards
from dinov2_attn.dataset.buckets import Buckets
from dinov2_attn.dataset.decode import Decoder, Measurer, Picture, Refused
from dinov2_attn.dataset.items import Item
from dinov2_attn.dataset.look import Seen, look
from dinov2_attn.dataset.options import Options
from dinov2_attn.dataset.plan import Plan
from dinov2_attn.errors import (
    Dinov2AttnError,
    OutOfRange,
    Unavailable,
    UnreadableFile,
    UnwritableOutput,
    in_one_line,
)

# Images that each worker decodes ahead.
AHEAD = 4
# A process takes seconds to start, in which this one has decoded as many.
WORTH_A_WORKER = 64


@dataclass(frozen=True)
class Run:
    """One process's way through its shards; ``bar`` is a tqdm, which images are counted on."""

    model: Any
    plan: Plan
    options: Options
    folder: Path
    workers: int
    strict: bool
    bar: Any

    def __call__(self, own: Sequence[int]) -> int:
        """Write the shards ``own``; return their bytes."""
        size = self.plan.about["model"]["patch_size"][0]
        decoder = Decoder(size, self.options.image_size, self.options.max_pixels)
        numbered = (item for shard in own for item in self.plan.numbered(shard))
        decoding = decoded(decoder, numbered, self.plan.count(own), self.workers)
        done = 0
        # One shard is written while the next is made; a third would be memory without need.
        writing: Future[int] | None = None
        with self.bar, contextlib.closing(decoding) as pictures, ThreadPoolExecutor(1) as writer:
            for shard in own:
                seen, refused = self._see(shard, pictures)
                done += self._bytes_of(writing)
                writing = writer.submit(shards.write, self.folder, shard, seen, refused)
            return done + self._bytes_of(writing)

    def _bytes_of(self, writing: Future[int] | None) -> int:
        with writing_to(self.folder):
            return writing.result() if writing else 0

    def _see(
        self, shard: int, pictures: Iterator[Picture | Refused]
    ) -> tuple[list[Seen], list[Refused]]:
        """Return what the model looks at in the images of a shard, and those without maps."""
        seen: list[Seen] = []
        refused: list[Refused] = []
        for batch in self._batches(shard, pictures, refused):
            try:
                seen += look(self.model, batch, self.options)
            except OutOfRange as error:  # a query that images of this size do not have
                reason = in_one_line(error)
                for origin in (picture.origin for picture in batch):
                    self._pass_over(Refused(origin.number, origin.item, reason), refused)
        return seen, refused

    def _batches(
        self, shard: int, pictures: Iterator[Picture | Refused], refused: list[Refused]
    ) -> Iterator[list[Picture]]:
        buckets = Buckets(self.options.batch_size)
        for _ in self.plan.numbered(shard):
            found = next(pictures)
            if isinstance(found, Refused):
                self._pass_over(found, refused)
            else:
                yield from buckets.add(found)
            self.bar.update()
        yield from buckets.rest()

    def _pass_over(self, one: Refused, refused: list[Refused]) -> None:
        if self.strict:
            refuse(one.reason)
        refused.append(one)


def refuse(*reasons: str) -> None:
    """Raise ``UnreadableFile`` where a strict run has a reason to."""
    if reasons:
        raise UnreadableFile(
            "images that can all be read, since the run is strict",
            reasons[0],
            "Mend the image and run with --retry, or run without --strict.",
        )


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raise ``UnwritableOutput`` for an error of the file system."""
    try:
        yield
    except OSError as error:
        raise UnwritableOutput(
            f"a folder that can be written at {folder}",
            f"{type(error).__name__}: {error}",
            "Finished shards are whole. Make room, or name another folder, and run again.",
        ) from error


def decoded(
    decoder: Decoder | Measurer, numbered: Iterable[tuple[int, Item]], count: int, workers: int
) -> Generator[Any, None, None]:
    """Yield what ``decoder`` makes of ``count`` items, in their order, by up to ``workers``."""
    workers = min(workers, count // WORTH_A_WORKER)
    loader: DataLoader[Any] = DataLoader(
        decoder,  # type: ignore[arg-type]  # whatever has keys is a dataset
        sampler=numbered,
        batch_size=None,
        num_workers=workers,
        # A fork of a process with threads may hang, and may hold on to the folder's lock when
        # this process is killed.
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=AHEAD if workers else None,
        generator=torch.Generator(),  # the global one is not drawn from
    )
    try:
        yield from loader
    except RuntimeError as error:
        if isinstance(error, Dinov2AttnError) or "worker" not in str(error):
            raise
        raise Unavailable(
            f"{workers} processes that decode images",
            str(error).partition("\n")[0],
            "Their memory may not suffice: try fewer workers, or a smaller --max-pixels.",
        ) from error
