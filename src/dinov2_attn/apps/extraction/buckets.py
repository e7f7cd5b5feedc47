"""Pictures put together by size, so that batches need no padding."""

from __future__ import annotations

from collections.abc import Iterator

from dinov2_attn.apps.extraction.decode import Picture

# Batches' worth of pictures that may wait for others of their size.
WAITING = 8

# Shape and dtype, of which pictures of a batch have one.
Kind = tuple[tuple[int, ...], str]


class Buckets:
    """Pictures that wait for others of their size.

    Which pictures make a batch depends on their order alone, so that the same images make
    the same batches in every run.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._waiting: dict[Kind, list[Picture]] = {}

    def add(self, picture: Picture) -> Iterator[list[Picture]]:
        """Take a picture, and yield the batch that it fills, or the fullest of too many."""
        kind = tuple(picture.pixels.shape), str(picture.pixels.dtype)
        bucket = self._waiting.setdefault(kind, [])
        bucket.append(picture)
        if len(bucket) == self._batch_size:
            yield self._waiting.pop(kind)
        elif sum(map(len, self._waiting.values())) >= WAITING * self._batch_size:
            yield self._waiting.pop(max(self._waiting, key=lambda key: len(self._waiting[key])))

    def rest(self) -> Iterator[list[Picture]]:
        """Yield what is left, smallest pictures first."""
        for kind in sorted(self._waiting):
            yield self._waiting.pop(kind)
