"""What a pickle names, seen before PyTorch reads it. Nothing in it runs."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dinov2_attn._compat import record_of_archive, records_of_archive

# Letters in the name of a class, with its module. Real ones have less than a hundred.
_LONGEST = 1000

# Before its tensors an old file has four pickles: a number, a version, a system and the content.
_PICKLES = 4


def refuse_long_names(path: Path, *, is_zip: bool) -> None:
    """Raise ``UnpicklingError`` if a pickle names a class in more letters than any has.

    PyTorch refuses such a class too. But then it searches its own message, for a time that grows
    with the square of the name: a day for a megabyte.
    """
    if is_zip:
        if "data.pkl" in records_of_archive(path):
            _check(io.BytesIO(record_of_archive(path, "data.pkl")))
        return
    with path.open("rb") as file:
        for _ in range(_PICKLES):
            _check(file)


def _check(file: IO[bytes]) -> None:
    for name in _classes(file):
        if len(name) > _LONGEST:
            raise pickle.UnpicklingError(f"the name of a class has {len(name):,} letters")


def _classes(file: IO[bytes]) -> Iterator[str]:
    try:
        for code, argument, _ in pickletools.genops(file):
            if code.name in ("GLOBAL", "INST"):
                yield str(argument)
    except (ValueError, IndexError, OverflowError, MemoryError, EOFError):
        return  # a damaged pickle, which PyTorch refuses
