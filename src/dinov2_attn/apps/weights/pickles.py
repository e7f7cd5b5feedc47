"""What a pickle names, seen before PyTorch reads it. Nothing in it runs."""

from __future__ import annotations

import io
import struct
from collections.abc import Collection
from pathlib import Path
from typing import IO

from dinov2_attn._compat import look_at_classes, record_of_archive

# Letters in the name of a class, with its module. Real ones have less than a hundred.
_LONGEST = 1000

# An old file has five pickles: a number, a version, a system, the content and names of storages.
_PICKLES = 5


def refuse_long_names(path: Path, records: Collection[str] | None) -> None:
    """Raise ``EndlessNameError`` if a pickle names a class in more letters than any has.

    PyTorch refuses such a class too. But then it searches its own message, for a time that grows
    with the square of the name: a day for a megabyte.

    Args:
        path: The file.
        records: The names in a zip file, None for a file of the format before.

    """
    if records is not None:
        if "data.pkl" in records:
            _check(io.BytesIO(record_of_archive(path, "data.pkl")))
        return
    with path.open("rb") as file:
        all(_check(file) for _ in range(_PICKLES))


def _check(file: IO[bytes]) -> bool:
    """Return whether the next pickle of ``file`` could be read to its end."""
    try:
        return look_at_classes(_Lines(file))
    except _DAMAGED:  # PyTorch refuses it
        return False


# What a reader of pickles raises for damaged ones.
_DAMAGED = (
    *(EOFError, struct.error, ValueError, IndexError, AssertionError),
    *(OverflowError, MemoryError),
)


class _Lines:
    """A file whose lines, the names of classes, may not be long."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read, self._file = file.read, file

    def readline(self) -> bytes:
        line = self._file.readline(_LONGEST + 1)
        if len(line) > _LONGEST:
            raise EndlessNameError(f"the name of a class has more than {_LONGEST:,} letters")
        return line


class EndlessNameError(Exception):
    """The name of a class has no end."""
