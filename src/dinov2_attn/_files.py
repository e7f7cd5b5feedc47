"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from dinov2_attn.errors import UnwritableOutputError

# The prefix of temporary folders, which a killed process leaves behind.
UNFINISHED = ".unfinished-"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and move the file written there to ``path`` at the end.

    The file is flushed to disk before it is moved. A crash cannot leave an empty file.

    Args:
        path: The destination. An existing file is replaced.

    Yields:
        Where to write the file. Nothing is moved if the block raises.

    Raises:
        OSError: if the file cannot be written, or ``path`` is a folder, a pipe or a device.

    """
    _check_replaceable(path)
    # In the folder of the destination, so that the move is one rename.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as folder:
        unfinished = Path(folder) / path.name
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)


@contextlib.contextmanager
def atomic_folder(folder: Path, without: Iterable[str] = ()) -> Iterator[Path]:
    """Yield an empty folder, and move its files to ``folder`` at the end, all or none.

    Args:
        folder: The destination. It is created if it does not exist. Files of the same names
            are replaced, others are kept.
        without: The names of files in ``folder`` that are removed with the move.

    Yields:
        Where to write the files. If the block raises, ``folder`` is restored or removed.

    Raises:
        UnwritableOutputError: if a file cannot be written.

    """
    folder = Path(os.path.abspath(folder))  # mkdir would not resolve `..` in new folders
    try:
        with ExitStack() as undo:
            _make(folder, undo)
            # Inside the folder, because only there the file system is sure to be the same.
            with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as temporary:
                new, old = Path(temporary, "new"), Path(temporary, "old")
                new.mkdir()
                old.mkdir()
                yield new
                _move(new, folder, old, without)
            undo.pop_all()
    except OSError as error:
        raise UnwritableOutputError(
            f"a folder that can be written at {folder}",
            f"{type(error).__name__}: {error}",
            "Nothing was left there. Name another folder or make room in this one.",
        ) from error


def _check_replaceable(path: Path) -> None:
    """Raise ``OSError`` for a folder, a pipe or a device: a rename would destroy it."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "There is something that is not a file", str(path))


def _make(folder: Path, undo: ExitStack) -> None:
    """Create ``folder`` and its missing parents; ``undo`` removes them."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir()
        undo.callback(path.rmdir)


def _move(source: Path, folder: Path, backup: Path, without: Iterable[str]) -> None:
    """Move all files of ``source`` into ``folder``, or none of them; remove those ``without``."""
    with ExitStack() as undo:
        for name in without:
            _set_aside(folder / name, backup, undo)
        for file in sorted(source.iterdir()):
            final = folder / file.name
            _set_aside(final, backup, undo)
            os.replace(file, final)
            undo.callback(final.unlink)
        undo.pop_all()


def _set_aside(file: Path, backup: Path, undo: ExitStack) -> None:
    """Move ``file`` into ``backup`` if it is there; ``undo`` brings it back."""
    if file.is_file() or file.is_symlink():
        os.replace(file, backup / file.name)
        undo.callback(os.replace, backup / file.name, file)
    else:
        _check_replaceable(file)
