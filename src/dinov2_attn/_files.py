"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What a killed process may leave behind begins so.
UNFINISHED = ".unfinished-"


def check_replaceable(path: Path) -> None:
    """Raise ``OSError`` for a folder, a pipe or a device, which replacing would take away."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "There is something that is not a file", str(path))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file that takes the place of ``path`` when the block ends well.

    It is on the disk before it is there, so that no crash of the machine leaves an empty one.
    Raises ``OSError``, for a pipe or a device at ``path`` too, which would be taken away.
    """
    check_replaceable(path)
    # Beside the destination, so that the move is one rename.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as folder:
        unfinished = Path(folder) / path.name
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
